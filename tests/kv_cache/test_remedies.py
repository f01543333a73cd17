"""Every way to have too little memory: the largest term is named, and what is offered helps."""

import re
from dataclasses import replace
from types import SimpleNamespace

import pytest

from vllm_metal.errors import UserError
from vllm_metal.kv_cache.capacity import Capacity
from vllm_metal.kv_cache.planner import GIB, MemoryPlan
from vllm_metal.kv_cache.remedies import MemorySettings, PlanOf, require
from vllm_metal.machine.device import Device

MIB = 1 << 20
SETTINGS = MemorySettings(
    max_model_len=8192,
    max_num_batched_tokens=2048,
    max_num_seqs=128,
    gpu_memory_utilization=0.75,
)


def machine(
    memory: float = 16 * GIB,
    weights: float = 3 * GIB,
    in_use: float = 0,
    row: int = MIB // 4,
    score: int = 0,
) -> PlanOf:
    """A machine and a model: blocks of 16 tokens take 1 MiB, tokens of a chunk `row` bytes each,
    and a token of the context `score` bytes for each token of the chunk."""
    device = Device("metal", "Apple M4", int(memory), int(in_use))

    def plan_of(settings: MemorySettings) -> tuple[MemoryPlan, Capacity]:
        chunk = min(settings.max_num_batched_tokens, settings.max_model_len)
        workspace = chunk * (row + score * settings.max_model_len)
        utilization, requested = settings.gpu_memory_utilization, settings.kv_cache_memory_bytes
        plan = MemoryPlan(device, utilization, int(weights), workspace, requested)
        return plan, Capacity(plan.page_bytes, bytes_per_block=MIB, block_size=16)

    return plan_of


def refusal(plan_of: PlanOf, **changes) -> str:
    with pytest.raises(UserError) as error:
        require(replace(SETTINGS, **changes), plan_of)
    return str(error.value)


def offers(text: str) -> list[dict[str, float]]:
    """The options of each remedy that the message offers, by name."""
    [remedies] = re.findall(r"remedy: (.*)", text)
    found = [re.findall(r"--([\w-]+) ([\d.]+)", remedy) for remedy in remedies.split(", or ")]
    return [
        {name.replace("-", "_"): float(value) if "." in value else int(value) for name, value in f}
        for f in found
        if f
    ]


def accepted(settings: MemorySettings, offer: dict[str, float]) -> MemorySettings:
    """The settings of a user who takes an offer."""
    fits_length = settings.fits_length and "max_model_len" not in offer
    return replace(settings, **offer, fits_length=fits_length)


WAYS = {
    "a long request": (
        machine(),
        {"max_model_len": 1 << 18},
        ("the request", ["max_model_len"]),
    ),
    "pages that the user made small": (
        machine(),
        {"kv_cache_memory_bytes": 100 * MIB},
        ("the request", ["max_model_len", "kv_cache_memory_bytes"]),
    ),
    "pages of the user's that hold no block": (
        machine(),
        {"kv_cache_memory_bytes": MIB // 2},
        ("the request", ["kv_cache_memory_bytes"]),
    ),
    "a small part of the memory": (
        machine(),
        {"gpu_memory_utilization": 0.2},
        ("the weights", ["gpu_memory_utilization"]),
    ),
    "weights that fill the memory": (
        machine(weights=15.8 * GIB, row=1024),
        {"gpu_memory_utilization": 0.99, "max_model_len": 8192},
        ("the weights", ["max_model_len"]),
    ),
    "weights that exceed the memory": (machine(weights=17 * GIB), {}, ("the weights", [])),
    "large prefill chunks": (
        machine(row=7 * MIB),
        {"gpu_memory_utilization": 1.0},
        ("the workspace", ["max_num_batched_tokens", "max_model_len"]),
    ),
    "scores of a long context": (
        machine(score=256),
        {"max_model_len": 1 << 17, "max_num_batched_tokens": 8192},
        ("the workspace", ["max_num_batched_tokens", "max_model_len"]),
    ),
    "what others hold": (
        machine(in_use=12.4 * GIB),
        {},
        ("what other processes hold", ["max_num_batched_tokens", "max_model_len"]),
    ),
    "a length to fit that has no room": (
        machine(score=256, memory=8 * GIB),
        {"max_model_len": 1 << 17, "fits_length": True},
        ("the workspace", ["max_num_batched_tokens", "max_model_len"]),
    ),
    "only shorter chunks and a shorter length": (
        machine(memory=5 * GIB, row=8 * MIB),
        {"max_model_len": 1 << 15},
        ("the workspace", ["max_num_batched_tokens"]),
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_what_is_offered_helps(way):
    plan_of, changes, (term, first) = WAYS[way]
    text = refusal(plan_of, **changes)
    assert f"the largest term is {term}" in text
    found = offers(text)
    assert [next(iter(offer)) for offer in found][: len(first)] == first
    settings = replace(SETTINGS, **changes)
    for offer in found:
        require(accepted(settings, offer), plan_of)


@pytest.mark.parametrize("way", WAYS)
def test_no_more_is_asked_for_than_is_needed(way):
    """The next step of a setting no longer fits, nor does a length that uses up the slack."""
    plan_of, changes, _ = WAYS[way]
    settings = replace(SETTINGS, **changes)
    for offer in offers(refusal(plan_of, **changes)):
        more = {
            "max_model_len": lambda length: round(1.35 * length) + 16,
            "max_num_batched_tokens": lambda tokens: 2 * tokens,
            "max_num_seqs": lambda requests: requests,
            "gpu_memory_utilization": lambda part: part - 0.01,
            "kv_cache_memory_bytes": lambda size: size - 1,
        }
        for name, value in offer.items():
            if name != "max_num_seqs":
                with pytest.raises(UserError):
                    require(accepted(settings, offer | {name: more[name](value)}), plan_of)


def test_an_option_that_does_not_help_is_not_named():
    text = refusal(machine(), kv_cache_memory_bytes=100 * MIB)
    assert "--gpu-memory-utilization" not in text and "--max-num-batched-tokens" not in text
    text = refusal(machine(weights=17 * GIB))
    assert "--" not in text.split("remedy: ")[1]
    assert "weights that mlx_lm.convert has quantised to fewer bits" in text
    assert "--gpu-memory-utilization 0" not in refusal(machine(in_use=12.4 * GIB))
    assert "remedy: end other programs" in refusal(machine(in_use=12.4 * GIB))


def test_the_numbers_of_the_message():
    text = refusal(machine(), max_model_len=1 << 18)
    for part in (
        "Too little memory for one request of 262144 tokens",
        "weights 3.00 GiB",
        "one request of 262144 tokens needs 16.00 GiB (64.00 KiB per token)",
        "the largest term is the request (16.00 GiB)",
    ):
        assert part in text
    assert "Too little memory for a request of any length" in refusal(
        machine(weights=17 * GIB), fits_length=True
    )


def test_a_length_that_vllm_fits_needs_one_token():
    memory = machine(memory=5 * GIB)
    with pytest.raises(UserError):
        require(replace(SETTINGS, max_model_len=1 << 18), memory)
    require(replace(SETTINGS, max_model_len=1 << 18, fits_length=True), memory)


@pytest.mark.parametrize("max_model_len", [1, 49, 64])
def test_one_request_fits_beside_the_null_block(max_model_len):
    settings = replace(SETTINGS, max_model_len=max_model_len, kv_cache_memory_bytes=5 * MIB)
    assert require(settings, machine()).page_bytes == 5 * MIB


@pytest.mark.parametrize(("size", "max_model_len"), [(5 * MIB, 65), (5 * MIB - 1, 64)])
def test_one_token_or_one_byte_short(size, max_model_len):
    text = refusal(machine(), max_model_len=max_model_len, kv_cache_memory_bytes=size)
    needed = -(-max_model_len // 16) + 1
    assert f"--kv-cache-memory-bytes {needed * MIB} or more" in text


@pytest.mark.parametrize("original", [-1, 8192])
def test_the_settings_of_a_server(original):
    model = SimpleNamespace(max_model_len=8192, original_max_model_len=original)
    config = SimpleNamespace(
        model_config=model,
        scheduler_config=SimpleNamespace(max_num_batched_tokens=2048, max_num_seqs=128),
        cache_config=SimpleNamespace(
            gpu_memory_utilization=0.75, kv_cache_memory_bytes=None, num_gpu_blocks_override=None
        ),
    )
    assert MemorySettings.of(config) == replace(SETTINGS, fits_length=original == -1)


@pytest.mark.parametrize("blocks", [-3, 0, 1, 512])
def test_too_few_blocks_name_how_many_do(blocks):
    """A request of 8,192 tokens has 512 blocks, and vLLM keeps one."""
    text = refusal(machine(), num_gpu_blocks_override=blocks)
    assert f"--num-gpu-blocks-override {blocks} is too small" in text
    assert "one request of 8192 tokens needs 512 blocks" in text
    assert offers(text) == [{"num_gpu_blocks_override": 513}]
    require(replace(SETTINGS, num_gpu_blocks_override=513), machine())


def test_a_request_of_any_length_needs_two_blocks():
    few = replace(SETTINGS, fits_length=True, num_gpu_blocks_override=1)
    with pytest.raises(UserError, match="--num-gpu-blocks-override 2 or more"):
        require(few, machine())
    require(replace(few, num_gpu_blocks_override=2), machine())
