"""Cases of `crashing_operations.py`: operations, modules and steps, each a function of its own.

Their shapes are those of the tiny deepseek_v3 of `scripts/tiny_architectures.json`: hidden size
64, 4 heads, latents of 32 elements, 4 experts in 2 groups of which 2 are taken.
"""

from collections.abc import Callable

import mlx.core as mx
import numpy as np

Case = Callable[[], object]
CASES: dict[str, Case] = {}


def case(make: Case) -> Case:
    """Adds a case; what it returns is evaluated."""
    CASES[make.__name__] = make
    return make


def fused(function, *arrays: mx.array) -> list[mx.array]:
    """The function, traced and replayed."""
    traced = mx.compile(function)
    return [traced(*arrays), traced(*arrays)]


def empty(*shape: int) -> mx.array:
    return mx.zeros(shape)


def numbers(*shape: int, seed: int = 0) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed))


# Arrays without elements: what `values = keys[..., :0]` and its addresses make of one.


@case
def empty_elementwise():
    return (empty(2, 0) * 2 + 1) * empty(2, 0)


@case
def empty_elementwise_fused():
    return fused(lambda x: (x * 2 + 1) * x, empty(2, 0))


@case
def empty_vector_fused():
    return fused(lambda x: x * 2 + 1, empty(0))


@case
def empty_where_fused():
    return fused(lambda x: mx.where(x - x == 0, x, 0), empty(1, 1, 0))


@case
def empty_broadcast_fused():
    return fused(lambda x, y: (x + y) * 3, empty(1, 0), numbers(4, 1))


@case
def empty_addresses_fused():
    def addresses(slots):
        units = mx.arange(0)[None]
        return slots[:, None] * 7 + (units * 16 + 3) * 2 - units

    return fused(addresses, mx.arange(3))


@case
def empty_part_of_a_concatenation_fused():
    return fused(lambda x: mx.concatenate([x * 2, x[..., :0] * 3], axis=-1), numbers(2, 8))


@case
def empty_gather_and_scatter():
    x = numbers(4, 8)
    x[mx.zeros((0,), mx.int32)] = empty(0, 8)
    return x, x[mx.zeros((2, 0), mx.int32)]


@case
def empty_matmul_fused():
    return fused(lambda x, y: (x @ y) * 2 + 1, empty(2, 0), empty(0, 3))


# What deepseek_v3 does and a Llama does not, in the shapes of the tiny model.


@case
def expert_groups_fused():
    def select(gates, bias):
        scores = mx.sigmoid(gates)
        original, scores = scores, scores + bias
        scores = mx.unflatten(scores, axis=-1, shape=(2, -1))
        group = mx.topk(scores, 2, axis=-1).sum(axis=-1, keepdims=True)
        index = mx.argpartition(group, kth=0, axis=-2)[..., :1, :]
        scores = mx.put_along_axis(scores, mx.stop_gradient(index), mx.array(0.0), axis=-2)
        scores = mx.flatten(scores, -2, -1)
        best = mx.argpartition(-scores, kth=1, axis=-1)[..., :2]
        chosen = mx.take_along_axis(original, best, axis=-1)
        return chosen / chosen.sum(axis=-1, keepdims=True) * 2.5

    return fused(select, numbers(1, 1, 4), numbers(4))


@case
def partition_by_the_last_axis_but_one_fused():
    return fused(lambda x: mx.argpartition(x * 2, kth=0, axis=-2)[..., :1, :], numbers(1, 1, 2, 1))


@case
def put_along_axis_of_a_scalar_fused():
    index = mx.zeros((1, 1, 1, 1), mx.uint32)
    return fused(
        lambda x: mx.put_along_axis(x * 2, index, mx.array(0.0), axis=-2), numbers(1, 1, 2, 2)
    )


@case
def largest_two_summed_fused():
    return fused(lambda x: mx.topk(x * 2, 2, axis=-1).sum(axis=-1), numbers(1, 1, 2, 2))


@case
def mask_of_scores_fused():
    least = mx.array(mx.finfo(mx.float32).min)
    mask = mx.array([True] * 5 + [False] * 11).reshape(1, 1, 1, 16)
    queries, keys = numbers(1, 4, 1, 16), numbers(1, 1, 16, 16)
    return fused(lambda q, k: mx.where(mask, q @ k, least), queries, keys)


@case
def attention_with_a_mask_of_scores_fused():
    def attend(q, k, mask):
        return mx.fast.scaled_dot_product_attention(q * 2, k + 1, k + 1, scale=0.1, mask=mask * 3)

    return fused(attend, numbers(1, 4, 1, 32), numbers(1, 1, 16, 32), numbers(1, 4, 1, 16))


@case
def fetched_keys_fused():
    def fetch(units, table, lengths):
        keys = units[table[:, None, :, None] * 4 + mx.arange(2)].reshape(1, 1, 16, 32)
        written = (mx.arange(16)[None] < lengths[:, None])[:, None, :, None]
        return mx.where(written, keys, mx.zeros(()))

    return fused(fetch, numbers(64, 256), mx.array([[1]]), mx.array([5]))


@case
def a_matrix_for_each_head_fused():
    weight = numbers(4, 32, 32)
    return fused(lambda x: (x * 2) @ weight.swapaxes(-1, -2) + 1, numbers(1, 4, 1, 32))


@case
def rope_with_an_array_of_positions_fused():
    def rope(x, offset):
        return mx.fast.rope(x * 2, 16, traditional=True, base=1e4, scale=1.0, offset=offset)

    return fused(rope, numbers(1, 4, 1, 16), mx.array([4]))


@case
def experts_fused():
    weight = numbers(4, 48, 64)

    def experts(x, index):
        x = mx.expand_dims(x * 2, (-2, -3))
        return mx.gather_mm(x, weight.swapaxes(-1, -2), rhs_indices=index)

    return fused(experts, numbers(1, 1, 64), mx.array([[[0, 2]]], mx.uint32))


# Its modules and its step.


def model():
    from tiny_architectures import tiny_model

    return tiny_model("deepseek_v3")


@case
def gate_traced():
    gate = model().layers[1].mlp.gate
    return fused(lambda x: gate(x * 1.5), numbers(1, 1, 64))


@case
def experts_module_traced():
    experts = model().layers[1].mlp
    return fused(lambda x: experts(x * 1.5), numbers(1, 1, 64))


@case
def feed_forward_traced():
    layer = model().layers[0].mlp
    return fused(lambda x: layer(x * 1.5), numbers(1, 1, 64))


@case
def attention_of_one_token_traced():
    attention = model().layers[0].self_attn
    return fused(lambda x: attention(x * 1.5, None, None), numbers(1, 1, 64))


@case
def attention_of_a_prompt_traced():
    attention = model().layers[0].self_attn
    return fused(lambda x: attention(x * 1.5, None, None), numbers(1, 5, 64))


def decode_step(rows: int, traced: bool, model_type: str = "deepseek_v3"):
    """Three decode steps over dense pages, built or, from the second one on, replayed."""
    from tiny_architectures import tiny_model

    from vllm_metal.kv_cache.cache import KVCache
    from vllm_metal.kv_cache.group_metadata import decode_metadata
    from vllm_metal.metal_kernel_backend.dense.reference import DensePages
    from vllm_metal.model.decode_graphs import DecodeGraphs
    from vllm_metal.model.model_binding import ModelBinding

    binding = ModelBinding(tiny_model(model_type))
    kv_cache = KVCache([DensePages(shape, 16, mx.float32) for shape in binding.layers], 8)
    bound = binding.bind(kv_cache)
    forward = DecodeGraphs(bound) if traced else bound.forward
    table = 1 + np.arange(rows, dtype=np.int32)[:, None]
    for step in range(3):
        positions = np.full(rows, step, np.int32)
        metadata = decode_metadata(kv_cache.groups, [table] * len(kv_cache.groups), positions)
        kv_cache.evaluate(forward(mx.full((rows, 1), 3 + step, mx.int32), metadata))


@case
def step_of_one_row():
    decode_step(1, traced=False)


@case
def step_of_one_row_traced():
    decode_step(1, traced=True)


@case
def step_of_two_rows_traced():
    decode_step(2, traced=True)


@case
def step_of_deepseek_v2_traced():
    decode_step(1, traced=True, model_type="deepseek_v2")


@case
def step_of_deepseek_v32_traced():
    decode_step(1, traced=True, model_type="deepseek_v32")


@case
def step_of_minicpm3_traced():
    decode_step(1, traced=True, model_type="minicpm3")


@case
def step_of_mixtral_traced():
    decode_step(1, traced=True, model_type="mixtral")


@case
def step_of_llama_traced():
    decode_step(1, traced=True, model_type="llama")
