"""What vLLM hears about quantised weights."""

import pickle

import pytest
import torch
from vllm.model_executor.layers.quantization import get_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from vllm_metal.model.quantization_config import NAME, MlxQuantizationConfig


def test_vllm_knows_it():
    assert get_quantization_config(NAME) is MlxQuantizationConfig


@pytest.mark.parametrize("method", ["awq", "bitnet", "fp8", "unheard_of"])
@pytest.mark.parametrize("asked", [None, NAME, "same"])
def test_it_answers_for_every_method(method, asked):
    asked = method if asked == "same" else asked
    answer = MlxQuantizationConfig.override_quantization_method({"quant_method": method}, asked)
    assert answer == NAME


@pytest.mark.parametrize(("method", "asked"), [("", None), (None, None), ("awq", "gptq")])
def test_it_leaves_mlxs_own_format_and_other_wishes_to_vllm(method, asked):
    settings = {"quant_method": method}
    assert MlxQuantizationConfig.override_quantization_method(settings, asked) is None


def test_it_takes_every_type_of_activations_and_builds_nothing():
    config = MlxQuantizationConfig.from_config({"quant_method": "awq"})
    assert {torch.float32, torch.float16, torch.bfloat16} == set(config.get_supported_act_dtypes())
    assert config.get_quant_method(torch.nn.Linear(1, 1), "") is None
    assert config.get_name() == NAME and config.get_min_capability() == 0
    assert config.get_config_filenames() == []


def test_every_method_is_one_of_vllms():
    """One that vLLM renames would be dead."""
    own = {name for name in vars(MlxQuantizationConfig) if not name.startswith("_")}
    assert own <= set(dir(QuantizationConfig))


def test_it_passes_between_processes():
    copied = pickle.loads(pickle.dumps(MlxQuantizationConfig()))
    assert isinstance(copied, MlxQuantizationConfig)
