"""The table of `vllm-metal plan`: the figures of a server that is given these bytes."""

import json

import pytest
from vllm.engine.arg_utils import EngineArgs

from tests.tiny_models import config_of, save_checkpoint, save_tokenizer
from vllm_metal.commands import plan_table
from vllm_metal.commands.plan_table import Row, table
from vllm_metal.errors import UserError
from vllm_metal.metal_kernel_backend.selection import neutral_constants
from vllm_metal.metal_kernel_backend.turboquant.measured_loss import SHOWN_PAIRS, Loss
from vllm_metal.model import model_loader
from vllm_metal.model.model_binding import ModelBinding
from vllm_metal.model_pages import ModelPages

BYTES = 1 << 30


def binding_of(folder, name: str, **changes) -> ModelBinding:
    (folder / "config.json").write_text(json.dumps(config_of(name, **changes)))
    return ModelBinding(model_loader.load_structure(model_loader.ModelSource(str(folder))))


def rows_of(binding: ModelBinding, max_model_len: int = 8192) -> dict[tuple[str, str], Row]:
    rows, refusal = table(binding, BYTES, 16, max_model_len, None)
    assert refusal is None
    return {(row.k_quant, row.v_quant): row for row in rows}


@pytest.fixture
def llama(tmp_path) -> ModelBinding:
    return binding_of(tmp_path, "llama", head_dim=64, num_key_value_heads=2, num_hidden_layers=3)


def test_a_line_for_dense_pages_and_every_pair(llama):
    rows = rows_of(llama)
    shown = [(pair.key.name, pair.value.name) for pair in SHOWN_PAIRS]
    assert list(rows) == [("dense", "float16"), *shown]
    dense, default = rows["dense", "float16"], rows["q8_0", "q3_0"]
    assert dense.bytes_per_request == 8192 * 3 * 2 * (64 + 64) * 2
    assert default.bytes_per_request == 8192 * 3 * 2 * 92
    assert (dense.ratio, dense.kld) == (1, None)
    assert default.ratio == pytest.approx(256 / 92, abs=1e-3)
    assert default.tokens / dense.tokens == pytest.approx(256 / 92, rel=0.01)


def test_more_bytes_never_mean_more_tokens(llama):
    rows = sorted(rows_of(llama).values(), key=lambda row: row.bits_per_element)
    tokens = [row.tokens for row in rows]
    assert tokens == sorted(tokens, reverse=True)


@pytest.mark.parametrize("name", ["llama", "deepseek_v3", "qwen3_moe"])
def test_one_group_is_what_vllm_makes_of_one_kind_of_layer(tmp_path, monkeypatch, name):
    """vLLM is not asked for it, and would say the same."""
    binding = binding_of(tmp_path, name)
    alone = table(binding, BYTES, 16, 100, None)[0]
    monkeypatch.setattr(plan_table, "has_one_group", lambda layers, states: False)
    assert table(binding, BYTES, 16, 100, None)[0] == alone


def test_without_torch_layers_of_several_kinds_are_left_to_another_process(tmp_path, monkeypatch):
    binding = binding_of(tmp_path, "gemma3_text")
    monkeypatch.setitem(plan_table.sys.modules, "torch", None)
    with pytest.raises(plan_table.NeedsVLLM):
        table(binding, BYTES, 16, 100, None)


@pytest.mark.parametrize("model_type", ["gemma3_text", "jamba", "falcon_h1"])
def test_layers_that_share_memory_are_planned_as_the_server_does(tmp_path, model_type):
    """The figures of a worker that is given these bytes; not the ratio of attention layers."""
    changes = {"head_dim": 64}
    if model_type == "gemma3_text":
        changes = {"architectures": ["Gemma3ForCausalLM"]}
    folder = save_checkpoint(tmp_path / "model", model_type, **changes)
    save_tokenizer(folder)
    binding = ModelBinding(model_loader.load_structure(model_loader.ModelSource(str(folder))))
    row = rows_of(binding, 128)["q4_0", "q4_0"]
    config = EngineArgs(
        str(folder),
        runner="generate",
        dtype="bfloat16",
        max_model_len=128,
        kv_cache_memory_bytes=BYTES,
        additional_config={"turboquant": True, "k_quant": "q4_0", "v_quant": "q4_0"},
    ).create_engine_config()
    layers = binding.layers
    served = ModelPages.of(config, layers, binding.states, neutral_constants(layers))
    capacity = served.capacity(BYTES, 128)
    assert row.tokens == capacity.tokens
    assert row.requests == pytest.approx(capacity.requests(128), abs=0.01)
    assert row.ratio == pytest.approx(served.ratio(128), abs=1e-3)
    if binding.states:
        assert row.ratio < 16 / row.bits_per_element


@pytest.mark.parametrize(
    ("name", "reason"), [("deepseek_v3", "(MLA)"), ("mamba", "it has no keys and values")]
)
def test_a_model_that_turboquant_refuses_has_its_dense_line_and_the_reason(tmp_path, name, reason):
    rows, refusal = table(binding_of(tmp_path, name), BYTES, 16, 8192, None)
    assert [row.k_quant for row in rows] == ["dense"]
    assert isinstance(refusal, UserError)
    assert "TurboQuant cannot compress this model" in str(refusal) and reason in str(refusal)


def test_each_loss_has_the_model_that_it_was_measured_on(llama, monkeypatch):
    """That of the model itself, or else of one with its head size."""
    asked = []

    def nearest(pair, model, head_size):
        asked.append((model, head_size))
        return Loss("measured", 64, 0.25, 1.1) if str(pair) == "q8_0/q3_0" else None

    monkeypatch.setattr(plan_table, "measured_loss", nearest)
    rows, _ = table(llama, BYTES, 16, 8192, None, "hub/model")
    assert set(asked) == {("hub/model", 64)}
    found = {(row.k_quant, row.v_quant): (row.kld, row.kld_model) for row in rows}
    assert found["q8_0", "q3_0"] == (0.25, "measured")
    assert set(found.values()) == {(0.25, "measured"), (None, None)}


def test_the_text(llama):
    lines = plan_table.render(list(rows_of(llama).values()), 8192).splitlines()
    head = "keys values bits ratio tokens longest x 8,192 KLD measured on"
    assert lines[0].split() == head.split()
    assert lines[1].split()[:4] == ["dense", "float16", "16.00", "1.00x"]
    assert lines[1].split()[-2:] == ["-", "-"]
    assert lines[2].split()[-1] == "SmolLM2-135M-Instruct"
    assert lines[-2].startswith("KLD: mean KL divergence from dense pages")
