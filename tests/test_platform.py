"""What is refused before anything is loaded, and what vLLM is told about the platform."""

import inspect
import json

import pytest
import torch
from vllm.config import CompilationMode, CUDAGraphMode
from vllm.platforms import current_platform
from vllm.platforms.interface import Platform

from tests.tiny_models import config_of, save_checkpoint
from vllm_metal import platform
from vllm_metal.errors import UserError
from vllm_metal.machine.cache_folder import STARTUP_CACHE_VARIABLE
from vllm_metal.machine.device import DEVICE_VARIABLE
from vllm_metal.metal_kernel_backend.turboquant.presets import VLLM_PRESETS
from vllm_metal.platform import MetalPlatform, unsupported

WATERMARK = {"key": 1}


class Unchanged:
    """A function for `--hf-overrides` whose name is the same in every process."""

    def __new__(cls, config):
        return config


ARCHITECTURE = {
    "qwen3_next": "Qwen3NextForCausalLM",
    "mamba": "MambaForCausalLM",
    "rwkv7": "RWKV7ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
}


@pytest.fixture
def said(monkeypatch) -> list[str]:
    """What the platform logs. vLLM's loggers do not propagate once an engine has run."""
    lines = []
    for level in ("info", "warning"):
        monkeypatch.setattr(platform.logger, level, lambda text, *args: lines.append(text % args))
    return lines


def refusal(make_config, **settings) -> str:
    with pytest.raises(UserError) as error:
        make_config(**settings)
    return str(error.value)


def test_every_override_is_a_hook_of_vllm():
    """A hook that vLLM renames would be dead without a sound."""
    own = {name for name in vars(MetalPlatform) if not name.startswith("_")}
    assert own <= set(dir(Platform)) | set(Platform.__annotations__)


@pytest.mark.parametrize(
    "name", [n for n, v in vars(MetalPlatform).items() if isinstance(v, classmethod)]
)
def test_hooks_take_what_vllm_passes(name):
    expected = inspect.signature(getattr(Platform, name))
    assert list(inspect.signature(getattr(MetalPlatform, name)).parameters) == list(
        expected.parameters
    )


def test_a_plain_configuration_is_served(make_config):
    config = make_config()
    assert unsupported(config) == []
    assert config.parallel_config.worker_cls == "vllm_metal.worker.MetalWorker"
    assert config.compilation_config.mode == CompilationMode.NONE
    assert config.compilation_config.cudagraph_mode == CUDAGraphMode.NONE
    assert config.parallel_config.disable_custom_all_reduce


def test_checking_twice_changes_nothing(make_config):
    """vLLM asks in the main process and again in the engine's."""
    config = make_config()
    before = repr(config)
    MetalPlatform.check_and_update_config(config)
    assert repr(config) == before


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"tensor_parallel_size": 2}, "--tensor-parallel-size 2 is not supported: one process"),
        ({"data_parallel_size": 2}, "--data-parallel-size 2"),
        ({"pipeline_parallel_size": 2}, "--pipeline-parallel-size 2"),
        ({"runner": "pooling"}, "--runner pooling is not supported"),
        ({"kv_offloading_size": 1.0}, "--kv-offloading-size"),
        ({"skip_tokenizer_init": True, "kv_cache_dtype": "turboquant_k8v4"}, "calibrate its keys"),
        ({"kv_cache_dtype": "fp8"}, "--kv-cache-dtype fp8"),
        ({"additional_config": {"turbo_quant": True}}, "unknown key 'turbo_quant'"),
        ({"enable_lora": True}, "--enable-lora"),
        ({"enable_prompt_embeds": True}, "--enable-prompt-embeds"),
        ({"hf_overrides": Unchanged}, "--hf-overrides as a function"),
        ({"quantization": "fp8", "dtype": "bfloat16"}, "--quantization fp8 is not supported"),
        ({"disable_hybrid_kv_cache_manager": True}, "--disable-hybrid-kv-cache-manager is not"),
        ({"watermark_config": WATERMARK}, "--watermark-config is not supported: it needs vLLM's"),
        (
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 9}},
            "--speculative-config: num_speculative_tokens 9 is not supported",
        ),
        (
            {
                "kv_transfer_config": {
                    "kv_connector": "ExampleConnector",
                    "kv_role": "kv_both",
                }
            },
            "--kv-transfer-config kv_connector ExampleConnector is not supported",
        ),
        ({"num_gpu_blocks_override": -3}, "--num-gpu-blocks-override -3"),
    ],
    ids=str,
)
def test_settings_that_are_refused(make_config, settings, reason):
    assert reason in refusal(make_config, **settings)


def test_an_override_reaches_the_structure(make_config, said):
    """The number of layers decides nothing here, but mlx-lm has to read it."""
    assert make_config(hf_overrides={"num_hidden_layers": 2}).cache_config.enable_prefix_caching
    assert said == []


def test_all_reasons_come_at_once(make_config):
    text = refusal(
        make_config,
        block_size=256,
        kv_cache_dtype="fp8",
        tensor_parallel_size=2,
        additional_config={"nonsense": 1},
    )
    assert text.startswith("vllm_metal: This configuration cannot be served:\n  - ")
    for part in ("--block-size 256", "fp8", "--tensor-parallel-size 2", "'nonsense'"):
        assert part in text


def test_a_models_routed_experts_are_refused(make_config, tmp_path):
    """vLLM leaves the check to a platform that is not its own."""
    folder = str(save_checkpoint(tmp_path, "mixtral", architectures=["MixtralForCausalLM"]))
    text = refusal(make_config, model=folder, enable_return_routed_experts=True)
    assert "--enable-return-routed-experts is not supported" in text


def test_the_second_runner_is_refused(make_config, monkeypatch):
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    assert "Model Runner V2 is not supported" in refusal(make_config)


@pytest.mark.parametrize("preset", VLLM_PRESETS)
def test_presets_are_served(make_config, said, preset):
    """vLLM adds the first and the last layers to those that are skipped."""
    config = make_config(kv_cache_dtype=preset, skip_tokenizer_init=False)
    assert config.cache_config.kv_cache_dtype_skip_layers == []
    assert any(f"--kv-cache-dtype {preset} compresses all layers" in line for line in said)


def test_layers_that_the_user_skips_are_refused_with_a_preset_too(make_config):
    text = refusal(
        make_config,
        kv_cache_dtype="turboquant_k8v4",
        kv_cache_dtype_skip_layers=["sliding_window"],
        skip_tokenizer_init=False,
    )
    assert "--kv-cache-dtype-skip-layers is not supported: use" in text


def test_options_without_effect_are_named_in_one_line(make_config, said):
    make_config(attention_backend="FLASH_ATTN", pt_load_map_location="cuda")
    assert said == ["No effect on this platform: --pt-load-map-location, --attention-backend"]


def test_mla_is_refused_with_turboquant_before_weights_are_read(make_config, tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps(config_of("deepseek_v3", architectures=["DeepseekV3ForCausalLM"]))
    )
    settings = {"model": str(tmp_path), "skip_tokenizer_init": False}
    with pytest.raises(UserError, match="TurboQuant cannot compress this model") as error:
        make_config(**settings, additional_config={"turboquant": True})
    assert "(MLA)" in str(error.value)
    assert unsupported(make_config(**settings)) == []


@pytest.mark.parametrize("size", [8, 16, 32, 64, 128])
def test_block_sizes_that_are_served(make_config, size):
    assert make_config(block_size=size).cache_config.block_size == size


@pytest.mark.parametrize("dtype", ["auto", "float16", "bfloat16"])
def test_page_types_that_are_served(make_config, dtype):
    assert make_config(kv_cache_dtype=dtype).cache_config.cache_dtype == dtype


@pytest.mark.parametrize("model_type", ["qwen3_next", "rwkv7"])
def test_recurrent_states_are_kept_for_prefixes(make_config, tmp_path, said, model_type):
    """By default, also for a model that vLLM takes for a Llama."""
    folder = str(save_checkpoint(tmp_path, model_type, architectures=[ARCHITECTURE[model_type]]))
    cache = make_config(model=folder).cache_config
    assert cache.enable_prefix_caching
    assert (cache.mamba_cache_mode, cache.mamba_block_size) == ("align", 16)
    assert said == []


def test_states_alone_are_kept_where_the_user_asks(make_config, tmp_path):
    """vLLM's own default for a model that it knows to be without attention is off."""
    folder = str(save_checkpoint(tmp_path, "mamba", architectures=[ARCHITECTURE["mamba"]]))
    assert not make_config(model=folder).cache_config.enable_prefix_caching
    cache = make_config(model=folder, enable_prefix_caching=True).cache_config
    assert cache.enable_prefix_caching and cache.mamba_cache_mode == "align"


def test_prefix_caching_is_on_elsewhere(make_config, tmp_path, said):
    architecture = ARCHITECTURE["gemma3_text"]
    folder = str(save_checkpoint(tmp_path, "gemma3_text", architectures=[architecture]))
    cache = make_config(model=folder, mamba_cache_mode="align").cache_config
    assert cache.enable_prefix_caching and cache.mamba_cache_mode == "none"
    assert said == []


def test_an_unknown_device_is_refused_at_once(make_config, monkeypatch):
    monkeypatch.setenv(DEVICE_VARIABLE, "tpu")
    assert "VLLM_METAL_DEVICE='tpu'" in refusal(make_config)


def test_an_unknown_value_for_the_startup_cache_is_refused_at_once(make_config, monkeypatch):
    monkeypatch.setenv(STARTUP_CACHE_VARIABLE, "maybe")
    assert "VLLM_METAL_STARTUP_CACHE='maybe'" in refusal(make_config)


def test_vllm_knows_the_environment_variables(monkeypatch):
    """It refuses unknown ones that begin with VLLM_ when it checks hard."""
    monkeypatch.setenv(DEVICE_VARIABLE, "cpu")
    monkeypatch.setenv(STARTUP_CACHE_VARIABLE, "on")
    MetalPlatform.validate_environ(hard_fail=True)
    monkeypatch.setenv("VLLM_METAL_DEVCE", "cpu")
    with pytest.raises(Exception, match="VLLM_METAL_DEVCE"):
        MetalPlatform.validate_environ(hard_fail=True)


def test_device_facts():
    assert current_platform.get_device_name()
    assert current_platform.get_device_total_memory() > 1 << 30
    assert not current_platform.is_pin_memory_available()
    assert torch.float32 in current_platform.supported_dtypes


def test_a_seed_seeds_torch():
    MetalPlatform.manual_seed_all(5)
    first = torch.rand(3)
    MetalPlatform.manual_seed_all(5)
    assert torch.equal(torch.rand(3), first)
