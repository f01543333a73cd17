"""Every option of vLLM's engine is decided, and the configuration holds what the table names."""

import dataclasses
from collections import Counter

import pytest
from vllm.config import MultiModalConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

from vllm_metal.options.check import WITHOUT_FLAG, flag
from vllm_metal.options.table import APPLIED, NO_EFFECT, OPTIONS, REFUSED, UNSEEN, WHOLE

CANNOT_BE_SEEN = {
    REFUSED: {
        "quantization",  # by the platform, which names the method that the checkpoint uses
        "disable_hybrid_kv_cache_manager",  # by the platform: vLLM sets it for some models
    },
    NO_EFFECT: {
        # Dropped without their owner, which is refused.
        "allow_deprecated_quantization",
        *("max_loras", "max_lora_rank", "default_mm_loras", "fully_sharded_loras"),
        *("max_cpu_loras", "lora_dtype", "lora_target_modules", "enable_tower_connector_lora"),
        *("specialize_active_lora", "enable_mixed_moe_lora_format", "enable_moe_shared_loras"),
        "max_lora_cls_labels",
        # vLLM fills them in, or checks them against a single device.
        *("elastic_ep_max_dp_size", "data_parallel_rank", "data_parallel_start_rank"),
        *("data_parallel_size_local", "data_parallel_address", "disable_custom_all_reduce"),
        *("data_parallel_multi_port_external_lb", "disable_nccl_for_dp_synchronization"),
        *("mamba_cache_mode", "mamba_block_size", "ir_op_priority", "enable_flashinfer_autotune"),
        *("mm_processor_device", "mm_device_do_normalize"),
        "disable_cascade_attn",  # vLLM itself says that it has no effect
        "mamba_config",  # its fields have options of their own
    },
}
"""Options that change nothing or are refused, and that the check cannot read."""


def test_every_option_is_decided_once():
    """An option that a new vLLM brings is neither ignored nor applied unseen."""
    assert Counter(option.name for option in OPTIONS) == Counter(
        field.name for field in dataclasses.fields(EngineArgs)
    )


@pytest.mark.parametrize("outcome", [REFUSED, NO_EFFECT])
def test_few_decided_options_cannot_be_seen(outcome):
    unseen = {o.name for o in OPTIONS if o.outcome == outcome and o.owner == UNSEEN}
    assert unseen == CANNOT_BE_SEEN[outcome]


def test_every_decision_has_a_reason():
    assert [o.name for o in OPTIONS if not o.why or o.why.endswith(".")] == []
    assert {o.outcome for o in OPTIONS} == {APPLIED, REFUSED, NO_EFFECT}


def test_the_configuration_holds_what_the_table_names(make_config):
    config = make_config()
    config.model_config.multimodal_config = MultiModalConfig()
    for option in OPTIONS:
        if option.owner in (UNSEEN, "additional_config"):
            continue
        owner = config
        for name in option.owner.split(".") if option.owner != "vllm_config" else ():
            owner = getattr(owner, name)
        names = option.set_by_vllm if option.attribute == WHOLE else [option.attribute]
        assert [name for name in names if not hasattr(owner, name)] == [], option


def test_options_have_the_flags_of_vllms_command_line():
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    flags = {flag for action in parser._actions for flag in action.option_strings}
    served = {"tokens_only"}  # an option of `vllm serve` beside those of the engine
    named = {option.name for option in OPTIONS} - served
    assert {name for name in named if flag(name) not in flags} == WITHOUT_FLAG
