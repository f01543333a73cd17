"""Model types that only mlx-lm knows reach vLLM's configuration, and no other is touched."""

import json
import pickle

import mlx.core as mx
import mlx_lm.utils
import pytest
import torch
from transformers import AutoConfig, LlamaConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.models import ModelRegistry
from vllm.transformers_utils.config import HFConfigParser

from tests import transformers_checkpoints
from tests.serving import Serving
from tests.tiny_models import config_of, save_checkpoint, tiny_model
from vllm_metal.errors import ChangedLibraryError, UserError
from vllm_metal.model import register_models
from vllm_metal.model.register_models import (
    MlxLmConfig,
    mlx_lm_model_types,
    register_model_types,
    register_text_models,
    served_model_types,
)

PROMPT = [5, 3, 8, 1, 9, 2, 7] * 4


@pytest.fixture(autouse=True)
def registered():
    register_models.register_models()


def test_every_model_file_is_known_afterwards():
    found = mlx_lm_model_types()
    assert {"llama", "afm7", "deepseek_v3"} <= found
    assert not {"base", "cache", "rope_utils", "switch_layers"} & found
    assert found <= set(CONFIG_MAPPING.keys()) | register_models._vllm_types()


def test_what_is_known_is_not_replaced():
    assert CONFIG_MAPPING["llama"] is LlamaConfig
    own = [name for name in CONFIG_MAPPING if issubclass(CONFIG_MAPPING[name], MlxLmConfig)]
    assert {"afm7", "openelm", "exaone"} <= set(own) <= mlx_lm_model_types()
    assert register_model_types() == []


@pytest.mark.parametrize(
    ("model_type", "heads", "layers"), [("afm7", 4, 4), ("openelm", 8, 3), ("exaone", 4, 3)]
)
def test_vllm_reads_the_settings_under_its_names(tmp_path, model_type, heads, layers):
    settings = {"architectures": [f"{model_type}OnlyHere"], "max_position_embeddings": 512}
    for name in ("num_attention_heads", "num_hidden_layers", "hidden_size"):
        settings[name] = None
    folder = save_checkpoint(tmp_path / "model", "llama", architectures=["LlamaForCausalLM"])
    config = json.loads((folder / "config.json").read_text()) | settings
    config = {name: value for name, value in config.items() if value is not None}
    given = {
        "afm7": {"hidden_dim": 64, "num_layers": 4, "num_heads": 4},
        "openelm": {"model_dim": 64, "num_transformer_layers": 3, "num_query_heads": [4, 4, 8]}
        | {"num_kv_heads": [1, 4, 2], "num_key_value_heads": None},
        "exaone": {"hidden_size": 64, "num_layers": 3, "num_attention_heads": 4},
    }[model_type]
    config = config | {"model_type": model_type, **given}
    config = {name: value for name, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    model = EngineArgs(model=str(folder), skip_tokenizer_init=True).create_model_config()
    assert model.hf_config.model_type == model_type
    assert model.get_hidden_size() == 64
    assert model.model_arch_config.total_num_attention_heads == heads
    assert model.model_arch_config.total_num_hidden_layers == layers
    assert f"{model_type}OnlyHere" in ModelRegistry.get_supported_archs()


def test_a_model_that_only_mlx_lm_knows_is_served(make_config, tmp_path):
    folder = save_checkpoint(
        tmp_path / "model",
        "afm7",
        architectures=["AFMForCausalLM"],
        hidden_size=None,
        num_hidden_layers=None,
        num_attention_heads=None,
    )
    [generated] = Serving(make_config(model=str(folder))).generate([PROMPT])
    model = tiny_model("afm7")
    tokens = list(PROMPT)
    for _ in generated:
        tokens.append(int(model(mx.array([tokens]))[0, -1].argmax()))
    assert generated == tokens[len(PROMPT) :]


def test_settings_survive_the_way_between_processes(tmp_path):
    folder = save_checkpoint(tmp_path / "model", "afm7", architectures=["AnotherForCausalLM"])
    config = AutoConfig.from_pretrained(folder)
    restored = pickle.loads(pickle.dumps(config))
    assert isinstance(restored, MlxLmConfig)
    assert restored.to_dict() == config.to_dict()
    assert restored.num_kv_heads == restored.num_key_value_heads == 2


def test_a_checkpoints_own_code_is_used_where_it_is_trusted(tmp_path):
    folder = save_checkpoint(
        tmp_path / "model", "afm7", auto_map={"AutoConfig": "configuration_own.OwnConfig"}
    )
    (folder / "configuration_own.py").write_text(
        "from transformers import PretrainedConfig\n"
        "class OwnConfig(PretrainedConfig):\n"
        "    model_type = 'afm7'\n"
    )
    trusted = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert type(trusted).__name__ == "OwnConfig"
    assert isinstance(AutoConfig.from_pretrained(folder, trust_remote_code=False), MlxLmConfig)


@pytest.mark.parametrize("table", [None, {}, ["llama"]], ids=str)
@pytest.mark.parametrize(
    ("name", "use"),
    [
        ("vllm.transformers_utils.config._CONFIG_REGISTRY", register_model_types),
        ("vllm.model_executor.models.registry._MULTIMODAL_MODELS", register_text_models),
    ],
)
def test_a_vllm_without_one_of_its_tables_is_named(monkeypatch, name, use, table):
    """vLLM does not promise to keep them; to go on without one would go wrong much later."""
    if table is None:
        monkeypatch.delattr(name)
    else:
        monkeypatch.setattr(name, table)
    with pytest.raises(ChangedLibraryError, match=f"vllm .*{name}"):
        use()


def test_an_mlx_lm_without_its_table_is_named(monkeypatch, tmp_path):
    (tmp_path / "utils.py").write_text("OTHER = {}")
    monkeypatch.setattr(register_models, "_mlx_lm_folders", lambda: [tmp_path])
    served_model_types.cache_clear()
    with pytest.raises(ChangedLibraryError, match=r"mlx-lm .*MODEL_REMAPPING"):
        served_model_types()


def test_a_transformers_that_compares_no_modules_is_named(monkeypatch, tmp_path):
    """It matters for a checkpoint with code of its own, and there it is told."""
    own = {"auto_map": {"AutoConfig": "configuration_own.OwnConfig"}}
    with_code = save_checkpoint(tmp_path / "code", "afm7", **own)
    without = save_checkpoint(tmp_path / "none", "afm7")
    check = register_models.require_that_code_of_checkpoints_comes_first
    monkeypatch.setattr(
        register_models.inspect, "getsource", lambda _: "def from_pretrained(): ..."
    )
    check.cache_clear()
    assert isinstance(AutoConfig.from_pretrained(without), MlxLmConfig)
    with pytest.raises(ChangedLibraryError, match=r"transformers .*AutoConfig\.from_pretrained"):
        AutoConfig.from_pretrained(with_code, trust_remote_code=False)
    check.cache_clear()


def test_types_that_mlx_lm_runs_with_the_file_of_another():
    assert {"mistral", "qwen2_5_vl", "kimi_k2"} <= served_model_types() - mlx_lm_model_types()
    assert served_model_types() == mlx_lm_model_types() | set(mlx_lm.utils.MODEL_REMAPPING)


@pytest.mark.parametrize("model_type", ["qwen3_vl", "gemma3", "mistral3"])
def test_the_language_model_of_a_checkpoint_with_a_vision_part(make_config, tmp_path, model_type):
    """vLLM does not import the vision part, and so needs none of its packages."""
    folder = transformers_checkpoints.save(tmp_path / "model", model_type)
    config = make_config(model=str(folder))
    assert config.model_config.multimodal_config is None
    [generated] = Serving(config).generate([PROMPT])
    model = transformers_checkpoints.make_model(model_type)
    tokens = list(PROMPT)
    with torch.inference_mode():
        for _ in generated:
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    assert generated == tokens[len(PROMPT) :]


@pytest.mark.parametrize("model_type", ["lfm2-vl", "muse_spark"])
def test_a_text_part_of_a_type_that_only_mlx_lm_knows(make_config, tmp_path, model_type):
    settings = config_of(model_type, architectures=["OnlyHereForConditionalGeneration"])
    (tmp_path / "config.json").write_text(json.dumps(settings))
    model = EngineArgs(model=str(tmp_path), skip_tokenizer_init=True).create_model_config()
    assert model.get_head_size() == settings["text_config"]["head_dim"]
    restored = pickle.loads(pickle.dumps(model.hf_config))
    assert restored.get_text_config().num_hidden_layers == 4


def own_config(folder, **changes):
    """A model folder with a configuration only."""
    (folder / "config.json").write_text(json.dumps(config_of("llama", **changes)))
    return str(folder)


@pytest.mark.parametrize("known_to_vllm", [False, True])
def test_architectures_that_vllm_cannot_inspect(make_config, monkeypatch, tmp_path, known_to_vllm):
    """mlx-lm chooses its model by `model_type`. vLLM would fail where an import does."""
    in_this_process = "vllm.model_executor.models.registry._run_in_subprocess"
    monkeypatch.setattr(in_this_process, lambda inspect: inspect())
    architecture = f"Strange{known_to_vllm}ForCausalLM"
    if known_to_vllm:
        ModelRegistry.register_model(architecture, "a_package_that_is_missing.models:Strange")
    folder = own_config(tmp_path, architectures=[architecture])
    assert make_config(model=folder).model_config.architectures == [architecture]


def test_a_model_type_that_nobody_knows(make_config, monkeypatch, tmp_path):
    monkeypatch.setattr("vllm.transformers_utils.repo_utils.time.sleep", lambda seconds: None)
    folder = own_config(tmp_path, model_type="strange", architectures=["StrangeForCausalLM"])
    with pytest.raises(UserError, match="cannot be served") as error:
        make_config(model=folder)
    [reason] = error.value.reasons
    assert reason.startswith(
        "architecture StrangeForCausalLM: mlx-lm has no model of the type strange (it has: afm7"
    )


def test_what_else_is_wrong_in_a_configuration_is_vllms_to_say(make_config, monkeypatch, tmp_path):
    monkeypatch.setattr("vllm.transformers_utils.repo_utils.time.sleep", lambda seconds: None)
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    with pytest.raises(ValueError, match="Should have a `model_type` key"):
        make_config(model=str(tmp_path))


@pytest.mark.parametrize(
    ("name", "use"),
    [
        (
            "vllm.model_executor.models.registry._ModelRegistry._raise_for_unsupported",
            register_models.take_unknown_architectures,
        ),
        (
            "vllm.transformers_utils.config.HFConfigParser.parse",
            register_models.refuse_unknown_model_types,
        ),
    ],
)
def test_a_vllm_without_what_is_replaced_is_named(monkeypatch, name, use):
    monkeypatch.setattr(name, None)
    with pytest.raises(ChangedLibraryError, match=f"vllm .*{name}"):
        use()


def test_vllms_reading_is_replaced_once():
    parse = HFConfigParser.parse
    register_models.register_models()
    assert HFConfigParser.parse is parse


def test_architectures_that_only_transformers_knows_reach_our_own_refusal():
    architectures = set(ModelRegistry.get_supported_archs())
    assert {"XGLMForCausalLM", "Qwen3VLForConditionalGeneration"} <= architectures
