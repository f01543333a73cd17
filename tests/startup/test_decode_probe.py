"""How decode runs is decided by the model alone: not by its precision, nor by lossy pages."""

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import pytest

from tests.startup.wrong_positions import FirstPosition, NoPosition
from tests.tiny_models import FETCHED, ONE_AT_A_TIME, RECURRENT, SERVED, tiny_model
from vllm_metal.attention.metadata import PrefillMetadata
from vllm_metal.errors import UserError
from vllm_metal.kv_cache.cache import KVCache
from vllm_metal.metal_kernel_backend.dense.reference import DensePages
from vllm_metal.metal_kernel_backend.selection import make_backends, neutral_constants
from vllm_metal.metal_kernel_backend.turboquant.config import TurboQuantConfig
from vllm_metal.metal_kernel_backend.turboquant.formats import parse_pair
from vllm_metal.model.decode_graphs import DecodeGraphs
from vllm_metal.model.model_binding import BoundModel, ModelBinding
from vllm_metal.startup import decode_probe
from vllm_metal.startup.crash_marker import CrashMarker
from vllm_metal.startup.decode_probe import (
    TOLERANCE,
    Answer,
    DecodeAnswers,
    can_be_traced,
    decode_step,
    row_differences,
    takes_batched_offsets,
)
from vllm_metal.startup.probe_requests import ProbeRequests, probe_prompts

PROMPTS = probe_prompts(None)
YES = Answer(True)


@pytest.fixture
def marker(tmp_path) -> CrashMarker:
    return CrashMarker(tmp_path / "tracing", {})


def batched(model: nn.Module) -> Answer:
    return takes_batched_offsets(ModelBinding(model), PROMPTS)


@pytest.mark.parametrize(
    "model_type", [*SERVED, *(n for n in FETCHED if n != "gemma2"), "gemma4_shared", "jamba"]
)
def test_models_that_take_an_array_of_positions(model_type):
    assert batched(tiny_model(model_type)) == YES


@pytest.mark.parametrize("model_type", [*ONE_AT_A_TIME, "afm7", "gemma2"])
def test_models_that_refuse_an_array_of_positions(model_type):
    answer = batched(tiny_model(model_type))
    assert not answer.holds and answer.reason


def test_a_model_that_takes_them_and_is_wrong():
    """One layer of three mistakes the position, with small weights: still seen."""
    model = tiny_model("llama")
    attention = model.layers[1].self_attn
    attention.rope = FirstPosition(attention.rope)
    answer = batched(model)
    assert not answer.holds
    assert "decoded together differ from those of each alone by" in answer.reason


def test_a_model_that_is_wrong_for_all_rows_alike():
    """Its rows do not depend on their company, and yet no row is right."""
    model = tiny_model("llama")
    for layer in model.layers:
        layer.self_attn.rope = NoPosition(layer.self_attn.rope)
    assert not batched(model).holds


def test_half_precision_is_not_mistaken_for_it():
    model = tiny_model("llama")
    model.set_dtype(mx.bfloat16)
    assert batched(model) == YES


class RoundsByRows(nn.Module):
    """A layer whose last digits depend on the number of rows, as with other kernels for more."""

    def __init__(self, layer: nn.Module, of_more_rows: Callable[[mx.array], mx.array]):
        super().__init__()
        self.layer, self.of_more_rows = layer, of_more_rows

    def __call__(self, x: mx.array) -> mx.array:
        out = self.layer(x)
        return self.of_more_rows(out) if x.shape[0] > 1 else out


def test_rounding_that_tips_codes_of_compressed_pages_does_not_count():
    """Through pages of few bits, rows that are decoded together differ; through dense ones not."""
    model = tiny_model("llama")
    for layer in model.layers:
        for name in ("k_proj", "v_proj"):
            exact = layer.self_attn[name]
            layer.self_attn[name] = RoundsByRows(exact, lambda out: out * 1.001)
    binding = ModelBinding(model)
    pages = TurboQuantConfig(parse_pair("q2_0/q2_0"))
    backends = make_backends(
        binding.layers, 16, mx.float32, pages, neutral_constants(binding.layers)
    )
    prompts = [3, 1, 4, 1, 5, 9, 2], [3, 1, 4, 1], [3, 1, 4, 1, 5]
    requests = ProbeRequests(binding.bind(KVCache(backends, 4)), prompts, groups_apart=False)
    alone = mx.concatenate([requests.decode_anew([row]) for row in range(3)])
    together = requests.decode_anew(range(3))
    assert max(row_differences(together, alone)) > TOLERANCE
    assert takes_batched_offsets(binding, prompts) == YES


def test_rounding_that_tips_the_choice_of_an_expert_does_not_count():
    """For the first row the second and the third best expert of a layer are nearly equal."""
    model, seen = tiny_model("mixtral"), []
    experts = model.layers[1].block_sparse_moe
    gate = experts.gate

    class Seen(nn.Module):
        def __call__(self, x):
            seen.append(gate(x))
            return seen[-1]

    experts.gate = Seen()
    binding = ModelBinding(model)
    requests = decode_probe.on_dense_pages(binding, PROMPTS)
    requests.decode_anew([0])
    _, second, third, *_ = mx.argsort(-seen[-1].reshape(-1)).tolist()
    lead = (seen[-1].reshape(-1)[second] - seen[-1].reshape(-1)[third]).item()
    third = mx.arange(seen[-1].shape[-1]) == third

    class Level(nn.Module):
        def __call__(self, x):
            return gate(x) + third * (lead - 1e-4)

    experts.gate = RoundsByRows(Level(), lambda out: out + third * 2e-4)
    alone = requests.decode_anew([0])
    differences = row_differences(requests.decode_anew(range(3))[:1], alone)
    assert differences[0] > TOLERANCE
    assert takes_batched_offsets(binding, PROMPTS) == YES


def test_logits_that_are_not_numbers_are_refused():
    model = tiny_model("llama")
    model.layers[2].mlp.up_proj.weight[0, 0] = mx.nan
    with pytest.raises(UserError, match="'llama' produces NaN logits"):
        batched(model)


def test_a_probed_model_serves_as_a_new_one():
    binding = ModelBinding(tiny_model("llama"))
    kv_cache = KVCache([DensePages(shape, 16, mx.float32) for shape in binding.layers], 8)
    metadata = PrefillMetadata(mx.array([[1]]), mx.arange(9) + 16, 0, 9)
    bound = binding.bind(kv_cache)
    fresh = bound.evaluate(mx.arange(9)[None], [metadata])
    takes_batched_offsets(binding, PROMPTS)
    can_be_traced(binding, PROMPTS)
    assert mx.array_equal(fresh, bound.evaluate(mx.arange(9)[None], [metadata]))


@pytest.mark.parametrize("model_type", ["llama", "mixtral", "deepseek_v3", "gpt_oss"])
def test_models_that_can_be_traced(model_type):
    assert can_be_traced(ModelBinding(tiny_model(model_type)), PROMPTS) == YES


class Wrapped(nn.Module):
    """A feed-forward layer with something done to its output."""

    def __init__(self, layer: nn.Module, then: Callable[[mx.array], mx.array]):
        super().__init__()
        self.layer, self.then = layer, then

    def __call__(self, x: mx.array) -> mx.array:
        return self.then(self.layer(x))


def wrapped(then: Callable[[mx.array], mx.array]) -> ModelBinding:
    model = tiny_model("llama")
    model.layers[1].mlp = Wrapped(model.layers[1].mlp, then)
    return ModelBinding(model)


def test_a_model_that_looks_at_its_numbers_cannot_be_traced():
    answer = can_be_traced(wrapped(lambda x: x if x.sum().item() > 0 else x + 0), PROMPTS)
    assert not answer.holds and "its forward pass cannot be traced (" in answer.reason


def test_a_model_that_remembers_its_first_numbers_is_not_replayed():
    """Its trace holds what the model computed for the request that was traced."""

    class Remembering(nn.Module):
        """What cannot be evaluated while it is traced comes from the call before."""

        def __init__(self, layer):
            super().__init__()
            self.layer = layer
            self.numbers = {}

        def __call__(self, x):
            out = self.layer(x)
            try:
                mx.eval(out)
                self.numbers[x.shape] = out
            except (RuntimeError, ValueError):
                return out * 0 + self.numbers.get(x.shape, 0)
            return out

    model = tiny_model("llama")
    model.layers[1].mlp = Remembering(model.layers[1].mlp)
    answer = can_be_traced(ModelBinding(model), PROMPTS)
    assert not answer.holds and "its replayed trace differ by" in answer.reason


def test_recurrent_states_cannot_be_traced():
    for model_type in RECURRENT[:2]:
        answer = can_be_traced(ModelBinding(tiny_model(model_type)), PROMPTS)
        assert not answer.holds and "recurrent states" in answer.reason


def test_on_a_gpu_a_step_with_arrays_without_elements_is_not_traced(monkeypatch):
    binding = wrapped(lambda x: mx.concatenate([x, x[..., :0] * 2], axis=-1))
    assert can_be_traced(binding, PROMPTS) == YES
    monkeypatch.setattr(decode_probe.mx, "default_device", lambda: mx.Device(mx.gpu))
    answer = can_be_traced(binding, PROMPTS)
    assert not answer.holds and answer.reason == "it computes arrays without elements (Multiply)"


def server(num_blocks: int = 8, turboquant: str = "") -> BoundModel:
    """A model over the pages of a server."""
    binding = ModelBinding(tiny_model("llama"))
    pages = TurboQuantConfig(parse_pair(turboquant)) if turboquant else None
    backends = make_backends(
        binding.layers, 16, mx.float32, pages, neutral_constants(binding.layers)
    )
    return binding.bind(KVCache(backends, num_blocks))


@pytest.mark.parametrize("turboquant", ["", "q2_0/q2_0"], ids=["dense", "few bits"])
def test_the_servers_pages_are_warmed_up_for_one_row_and_two(marker, turboquant):
    model = server(turboquant=turboquant)
    graphs, traced = decode_step(model, PROMPTS, DecodeAnswers(YES, YES), marker)
    assert isinstance(graphs, DecodeGraphs) and traced == YES and len(graphs._graphs) == 2
    arrays = model.kv_cache.arrays
    assert all(array[1].any() and array[2].any() for array in arrays)
    assert not any(array[0].any() or array[3:].any() for array in arrays)


def test_requests_one_by_one_are_warmed_up_as_one_row(marker):
    model = server()
    no = DecodeAnswers(Answer(False, "a reason"), Answer(False, "another"))
    step, traced = decode_step(model, PROMPTS, no, marker)
    assert step == model.forward and traced.reason == "another"


def test_too_few_blocks_are_left_alone(marker):
    model = server(num_blocks=2)
    graphs, _ = decode_step(model, PROMPTS, DecodeAnswers(YES, YES), marker)
    assert isinstance(graphs, DecodeGraphs) and not model.kv_cache.arrays[0].any()


def test_pages_that_cannot_be_traced_are_served_without(marker, monkeypatch):
    def fails(*_):
        raise RuntimeError("no tracers")

    monkeypatch.setattr(DecodeGraphs, "__call__", fails)
    model = server()
    step, traced = decode_step(model, PROMPTS, DecodeAnswers(YES, YES), marker)
    assert step == model.forward and "on these pages (no tracers)" in traced.reason
    assert not marker.left_behind


def test_after_a_start_that_tracing_ended_nothing_is_traced(marker):
    """Neither to find out whether it can be, nor on the server's pages."""
    marker.path.parent.mkdir(parents=True)
    marker.path.write_text("999999999 1.00\n{}\n")
    model = server()
    answers = decode_probe.ask(model.binding, PROMPTS, marker)
    assert answers.batched == YES and str(marker.path) in answers.traced.reason
    step, traced = decode_step(model, PROMPTS, DecodeAnswers(YES, YES), marker)
    assert step == model.forward and str(marker.path) in traced.reason
    assert marker.left_behind


def test_both_answers_of_a_model(marker):
    assert decode_probe.ask(ModelBinding(tiny_model("llama")), PROMPTS, marker) == DecodeAnswers(
        YES, YES
    )
    assert not marker.path.exists()
    one_by_one = decode_probe.ask(ModelBinding(tiny_model("gpt_bigcode")), PROMPTS, marker)
    assert not one_by_one.batched.holds and not one_by_one.traced.holds
