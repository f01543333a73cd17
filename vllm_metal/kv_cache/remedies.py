"""Too little memory: which term is the largest, and which options help.

Each is offered with a value that fits: it is tried in the arithmetic of the memory plan before it
is named.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from vllm_metal.errors import UserError
from vllm_metal.kv_cache.capacity import Capacity
from vllm_metal.kv_cache.planner import MemoryPlan, format_bytes
from vllm_metal.kv_cache.workspace import StepMemory
from vllm_metal.machine.device import Device

if TYPE_CHECKING:
    from vllm.config import VllmConfig

SLACK = 1 / 4
"""Part of a workspace that is kept free where a value changes it. A server that is started with the
value measures its workspace anew, with other small forward passes."""

USEFUL_LENGTH = 1024
"""Tokens that a request should have at least where vLLM fits its length."""

SHORTEST = 16
"""No value below is named for a length or a number of tokens."""


@dataclass(frozen=True)
class MemorySettings:
    """The options that the memory plan depends on, by vLLM's names."""

    max_model_len: int
    max_num_batched_tokens: int
    max_num_seqs: int
    gpu_memory_utilization: float
    kv_cache_memory_bytes: int | None = None
    fits_length: bool = False
    """`--max-model-len -1`: vLLM shortens `max_model_len`, the model's own, to what fits."""
    num_gpu_blocks_override: int | None = None

    @classmethod
    def of(cls, vllm_config: "VllmConfig") -> "MemorySettings":
        """The settings of a server."""
        cache, scheduler = vllm_config.cache_config, vllm_config.scheduler_config
        return cls(
            vllm_config.model_config.max_model_len,
            scheduler.max_num_batched_tokens,
            scheduler.max_num_seqs,
            cache.gpu_memory_utilization,
            cache.kv_cache_memory_bytes,
            vllm_config.model_config.original_max_model_len == -1,
            cache.num_gpu_blocks_override,
        )


PlanOf = Callable[[MemorySettings], tuple[MemoryPlan, Capacity]]
"""The memory plan under these settings, and what its pages hold."""


def plan_of(
    device: Device,
    weights: int,
    steps: Callable[[MemorySettings], StepMemory],
    capacity: Callable[[int, int], Capacity],
) -> PlanOf:
    """The plans of a model on a device.

    Args:
        device: that serves.
        weights: in bytes.
        steps: what steps take beside weights and pages, under these settings.
        capacity: what a number of bytes holds, for requests of a number of tokens.
    """

    def plan_under(settings: MemorySettings) -> tuple[MemoryPlan, Capacity]:
        length = settings.max_model_len
        plan = MemoryPlan(
            device,
            settings.gpu_memory_utilization,
            weights,
            workspace=0,
            requested_bytes=settings.kv_cache_memory_bytes,
        )
        most = capacity(plan.page_bytes, length)
        workspace = steps(settings).workspace(plan.page_bytes, most.pooled_tokens)
        plan = replace(plan, workspace=workspace)
        return plan, capacity(plan.page_bytes, length)

    return plan_under


def require(settings: MemorySettings, plan_of: PlanOf) -> MemoryPlan:
    """The plan, once it is checked that a request fits beside vLLM's null block.

    Raises:
        UserError: none does. The message gives the sum, the largest term and the options that help.
            Or `--num-gpu-blocks-override` leaves too few blocks; the message says how many do.
    """
    plan, capacity = plan_of(settings)
    if _fits(settings, capacity):
        _require_blocks(settings, capacity)
        return plan
    length = settings.max_model_len
    request = capacity.bytes_for(length)
    needed = capacity.blocks_needed(length) * capacity.bytes_per_block
    term, size = max(_terms(plan, needed).items(), key=lambda item: item[1])
    remedies = list(_remedies(settings, plan_of, plan, capacity, term))
    raise UserError(
        "Too little memory for a request of any length"
        if settings.fits_length
        else f"Too little memory for one request of {length} tokens",
        [
            *plan.lines(),
            f"one request of {length} tokens needs {format_bytes(needed)} "
            f"({format_bytes(request / length)} per token)",
            f"the largest term is {term} ({format_bytes(size)})",
            f"remedy: {', or '.join(remedies)}",
        ],
    )


def _require_blocks(settings: MemorySettings, capacity: Capacity) -> None:
    blocks, length = settings.num_gpu_blocks_override, settings.max_model_len
    length = 1 if settings.fits_length else length
    needed = capacity.blocks_needed(length)
    if blocks is not None and blocks < needed:
        raise UserError(
            f"--num-gpu-blocks-override {blocks} is too small",
            [
                f"one request of {length} tokens needs {needed - 1} blocks"
                f"{_copies(capacity)}, and vLLM keeps one",
                f"remedy: --num-gpu-blocks-override {needed} or more, or leave the option out",
            ],
        )


def _copies(capacity: Capacity) -> str:
    spare = capacity.spare_blocks
    return f" ({spare} of them for copies of blocks in which a cached prefix ends)" * bool(spare)


_WEIGHTS = "the weights"
_WORKSPACE = "the workspace, which a step takes beside weights and pages"
_REQUEST = "the request"
_OTHERS = "what other processes hold"


def _terms(plan: MemoryPlan, needed: int) -> dict[str, int]:
    """The bytes that have to fit, by name."""
    if plan.requested_bytes is not None:
        return {_REQUEST: needed}
    terms = {_WEIGHTS: plan.weights, _WORKSPACE: plan.workspace, _REQUEST: needed}
    if plan.is_limited_by_others:
        terms[_OTHERS] = plan.device.memory_in_use
    return terms


def _fits(settings: MemorySettings, capacity: Capacity, fitted: int = 1) -> bool:
    """Whether a request fits: of `max_model_len` tokens, or of `fitted` where vLLM fits it."""
    length = min(fitted, settings.max_model_len) if settings.fits_length else settings.max_model_len
    return capacity.requests(length) >= 1


def _remedies(
    settings: MemorySettings, plan_of: PlanOf, plan: MemoryPlan, capacity: Capacity, term: str
) -> Iterator[str]:
    """What helps; what concerns the largest term comes first."""

    def helps(**changes) -> bool:
        fits_length = settings.fits_length and "max_model_len" not in changes
        changed = replace(settings, fits_length=fits_length, **changes)
        new, holds = plan_of(changed)
        if new.requested_bytes is None and new.workspace != plan.workspace:
            free = new.page_bytes - round(SLACK * new.workspace)
            holds = replace(holds, page_bytes=free)
        return _fits(changed, holds, USEFUL_LENGTH)

    if settings.kv_cache_memory_bytes is not None:
        needed = capacity.blocks_needed(settings.max_model_len) * capacity.bytes_per_block
        yield from _length(settings, helps)
        yield from _no_prefix_caching(settings, capacity)
        yield f"--kv-cache-memory-bytes {needed} or more"
        return
    found = {
        _WORKSPACE: list(_chunk(settings, helps)),
        _REQUEST: list(_length(settings, helps)),
        _WEIGHTS: list(_utilization(settings, helps)),
    }
    if not found[_WORKSPACE] and (term == _WORKSPACE or not any(found.values())):
        found[_WORKSPACE] = list(_chunk_and_length(settings, helps))
    options = [*found.pop(term, []), *(option for others in found.values() for option in others)]
    if term == _OTHERS:
        yield "end other programs"
    yield from options
    yield from _no_prefix_caching(settings, capacity)
    if term == _WEIGHTS or not options:
        yield "a smaller model, or weights that mlx_lm.convert has quantised to fewer bits"


def _length(settings: MemorySettings, helps: Callable[..., bool]) -> Iterator[str]:
    if length := _longest(settings, helps):
        instead = " in place of -1" if settings.fits_length else " or less (-1 finds the longest)"
        yield f"--max-model-len {length}{instead}"


def _longest(settings: MemorySettings, helps: Callable[..., bool], **changes) -> int:
    """The longest `max_model_len` that fits; 0 where it is below SHORTEST."""
    lengths = range(settings.max_model_len + 1)
    too_long = bisect_left(
        lengths, True, 1, key=lambda length: not helps(max_model_len=length, **changes)
    )
    return too_long - 1 if too_long > SHORTEST else 0


def _chunks(settings: MemorySettings) -> Iterator[dict[str, int]]:
    """Shorter prefill chunks, each half as long as the one before, as vLLM accepts them."""
    tokens = min(settings.max_num_batched_tokens, settings.max_model_len)
    tokens = 1 << (tokens - 1).bit_length()
    while (tokens := tokens // 2) >= SHORTEST:
        changes = {"max_num_batched_tokens": tokens}
        if tokens < settings.max_num_seqs:
            changes["max_num_seqs"] = tokens
        yield changes


def _chunk(settings: MemorySettings, helps: Callable[..., bool]) -> Iterator[str]:
    for changes in _chunks(settings):
        if helps(**changes):
            yield _options(changes)
            return


def _chunk_and_length(settings: MemorySettings, helps: Callable[..., bool]) -> Iterator[str]:
    """The longest chunks with which the length is at least half of what the shortest leave."""
    lengths = [(_longest(settings, helps, **changes), changes) for changes in _chunks(settings)]
    most = max((length for length, _ in lengths), default=0)
    for length, changes in lengths:
        if most and length >= most / 2:
            yield _options(changes | {"max_model_len": length})
            return


def _options(changes: dict[str, int]) -> str:
    return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in changes.items())


def _no_prefix_caching(settings: MemorySettings, capacity: Capacity) -> Iterator[str]:
    """Helps a model with recurrent state, of which a request then holds half as many blocks."""
    if _fits(settings, capacity.without_kept_states(), USEFUL_LENGTH):
        yield "--no-enable-prefix-caching"


def _utilization(settings: MemorySettings, helps: Callable[..., bool]) -> Iterator[str]:
    for percent in range(int(100 * settings.gpu_memory_utilization) + 1, 101):
        if helps(gpu_memory_utilization=percent / 100):
            yield f"--gpu-memory-utilization {percent / 100:.2f} or more"
            return
