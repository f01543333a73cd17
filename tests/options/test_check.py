"""Options are refused by name, or named as without effect; others pass in silence."""

import copy
import dataclasses
import enum

import pytest
from transformers import PretrainedConfig
from vllm.config import MultiModalConfig
from vllm.engine.arg_utils import EngineArgs

from tests.tiny_models import save_checkpoint
from vllm_metal.errors import UserError
from vllm_metal.options import check
from vllm_metal.options.table import APPLIED, ENVIRONMENT, NO_EFFECT, OPTIONS, UNSEEN, WHOLE
from vllm_metal.platform import MetalPlatform

CHECKED = [o for o in OPTIONS if o.owner != UNSEEN and (o.outcome != APPLIED or o.allowed)]
ARCHITECTURE = {
    "llama": "LlamaForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "qwen3_next": "Qwen3NextForCausalLM",
    "mamba": "MambaForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
}


def as_checked(folder, **settings):
    """vLLM's configuration as the platform's check finds it: vLLM goes on to fill it in."""
    found = []
    own_check = MetalPlatform.check_and_update_config

    def note(vllm_config):
        found.append(copy.deepcopy(vllm_config))
        own_check(vllm_config)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MetalPlatform, "check_and_update_config", staticmethod(note))
        EngineArgs(
            str(folder), skip_tokenizer_init=True, max_model_len=128, **settings
        ).create_engine_config()
    return found[0]


@pytest.fixture(scope="module")
def plain(checkpoint):
    return as_checked(checkpoint)


@pytest.fixture
def config(plain):
    config = copy.deepcopy(plain)
    config.model_config.multimodal_config = MultiModalConfig()
    return config


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        *((model_type, {}) for model_type in ARCHITECTURE),
        ("llama", {"enforce_eager": True, "distributed_executor_backend": "mp"}),
    ],
    ids=str,
)
def test_a_plain_configuration_gives_nothing(tmp_path, model_type, settings):
    """Neither do values that vLLM sets by itself."""
    folder = save_checkpoint(tmp_path, model_type, architectures=[ARCHITECTURE[model_type]])
    config = as_checked(folder, **settings)
    assert check.refusals(config) == []
    assert check.without_effect(config) == []


def another(value):
    """A value of a like kind that no option has by default."""
    if isinstance(value, enum.Enum):
        return next(member for member in type(value) if member != value)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 7
    if isinstance(value, str) or value is None:
        return "another"
    if dataclasses.is_dataclass(value):
        return object()
    return type(value)(["another"]) if not isinstance(value, dict) else {"another": 1}


def change(config, option) -> None:
    """Gives the option a value that is neither its default nor allowed."""
    if option.owner == "additional_config":
        config.additional_config[option.attribute] = "another"
        return
    owner = config
    for name in option.owner.split(".") if option.owner != "vllm_config" else ():
        owner = getattr(owner, name)
    attribute = option.attribute
    if attribute == WHOLE:
        names = [field.name for field in dataclasses.fields(owner) if field.init]
        attribute = next(name for name in names if name not in option.set_by_vllm)
    object.__setattr__(owner, attribute, another(getattr(owner, attribute)))


@pytest.mark.parametrize("option", CHECKED, ids=lambda option: option.name)
def test_every_option_is_seen_once_it_is_given(config, option):
    change(config, option)
    refused, idle = check.refusals(config), check.without_effect(config)
    if option.outcome == NO_EFFECT:
        assert refused == []
        assert check.flag(option.name) in idle
    else:
        assert idle == []
        [reason] = refused
        assert reason.startswith(f"{check.flag(option.name)} ")


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"model_impl": "transformers"}, "--model-impl transformers is not supported: a model"),
        ({"mamba_ssm_cache_dtype": "float16"}, "(allowed: auto, float32)"),
        ({"mamba_cache_dtype": "float16"}, "--mamba-cache-dtype float16"),
        ({"worker_cls": "a.B"}, "--worker-cls a.B is not supported: this platform has its own"),
        ({"pooler_config": {"pooling_type": "MEAN"}}, "--pooler-config is not supported"),
        ({"offload_backend": "uva", "cpu_offload_gb": 1}, "--offload-backend uva is not supp"),
        ({"offload_group_size": 2}, "--offload-group-size 2 is not supported: weights stay in"),
        ({"kv_cache_dtype_skip_layers": ["1"]}, 'use "skip_layers" of additional_config'),
        ({"code_revision": "x"}, "--code-revision x is not supported"),
        ({"hf_token": "hf_secret"}, "--hf-token is not supported: set the environment variable"),
        ({"profiler_config": {"profiler": "torch", "torch_profiler_dir": "/tmp"}}, "Instruments"),
        ({"distributed_executor_backend": "external_launcher"}, "(allowed: uni, mp)"),
        ({"load_format": "dummy"}, "mlx-lm loads safetensors files (allowed: auto, safetensors)"),
        ({"block_size": 256}, "--block-size 256 is not supported (allowed: 8, 16, 32, 64, 128)"),
    ],
    ids=str,
)
def test_options_that_are_refused(make_config, checkpoint, settings, reason):
    settings = {k: str(checkpoint) if v == "MODEL" else v for k, v in settings.items()}
    with pytest.raises(UserError) as error:
        make_config(**settings)
    assert reason.replace("MODEL", str(checkpoint)) in str(error.value)
    assert "hf_secret" not in str(error.value)


def test_a_config_in_mistrals_own_format_is_refused(config):
    """vLLM itself refuses the format for a folder that has no such config."""
    config.model_config.config_format = "mistral"
    [reason] = check.refusals(config)
    expected = "--config-format mistral is not supported: mlx-lm reads the config.json"
    assert reason.startswith(expected)


@pytest.mark.parametrize(
    ("settings", "flag"),
    [
        ({"attention_backend": "FLASH_ATTN"}, "--attention-backend"),
        ({"attention_config": {"use_non_causal": True}}, "--attention-config"),
        ({"ignore_patterns": ["*.bin"]}, "--ignore-patterns"),
        ({"pt_load_map_location": "cuda"}, "--pt-load-map-location"),
        ({"compilation_config": {"compile_sizes": [1]}}, "--compilation-config"),
        ({"cudagraph_capture_sizes": [1, 2]}, "--cudagraph-capture-sizes"),
        ({"moe_backend": "triton"}, "--moe-backend"),
        ({"gdn_prefill_backend": "triton"}, "--gdn-prefill-backend"),
        ({"optimization_level": 0}, "--optimization-level"),
        ({"dp_sync_interval": 4}, "--dp-sync-interval"),
        ({"kv_sharing_fast_prefill": True}, "--kv-sharing-fast-prefill"),
        ({"enable_layerwise_nvtx_tracing": True}, "--enable-layerwise-nvtx-tracing"),
    ],
    ids=str,
)
def test_options_without_effect(checkpoint, settings, flag):
    assert check.without_effect(as_checked(checkpoint, **settings)) == [flag]


@pytest.mark.parametrize("name", ENVIRONMENT)
def test_environment_variables_without_effect(config, monkeypatch, name):
    monkeypatch.setenv(name, "0")
    assert check.without_effect(config) == []
    monkeypatch.setenv(name, "1")
    assert check.without_effect(config) == [name]


def test_keys_that_vllm_puts_into_additional_config(checkpoint):
    own = {"turboquant": False}
    config = as_checked(checkpoint, gdn_prefill_backend="triton", additional_config=own)
    check.remove_idle_keys(config)
    assert config.additional_config == {"turboquant": False}


def test_a_value_from_the_models_own_config_is_not_the_users(config):
    config.cache_config.mamba_ssm_cache_dtype = "bfloat16"
    assert "--mamba-ssm-cache-dtype bfloat16" in check.refusals(config)[0]
    config.model_config.hf_text_config = PretrainedConfig(mamba_ssm_dtype="bfloat16")
    assert check.refusals(config) == []
