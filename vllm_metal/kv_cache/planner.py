"""How many bytes are for pages: pure arithmetic on measured numbers.

memory limit x utilization          what vllm_metal may use
  - held by other processes         only where memory is shared with them (CPU)
  - weights
  - workspace                       what the largest step takes in addition (`workspace`)
  = bytes for pages
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from vllm_metal.kv_cache.capacity import CacheSummary, Capacity
from vllm_metal.machine.device import Device

GIB = 1 << 30


def format_bytes(size: float) -> str:
    """Bytes as people read them: `1.50 GiB`, `24.00 MiB`, `92 B`."""
    for unit, factor in (("GiB", GIB), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if abs(size) >= factor:
            return f"{size / factor:.2f} {unit}"
    return f"{size:.0f} B"


@dataclass(frozen=True)
class MemoryPlan:
    """The terms of the sum above, in bytes."""

    device: Device
    utilization: float
    weights: int
    workspace: int
    requested_bytes: int | None = None
    """`--kv-cache-memory-bytes`: replaces the sum where the user gave it."""

    @property
    def budget(self) -> int:
        """Bytes that vllm_metal may use in all."""
        allowed = int(self.device.memory_limit * self.utilization)
        return min(allowed, self.device.memory_limit - self.device.memory_in_use)

    @property
    def page_bytes(self) -> int:
        """Bytes for pages; may be negative."""
        if self.requested_bytes is not None:
            return self.requested_bytes
        return self.budget - self.weights - self.workspace

    @property
    def is_limited_by_others(self) -> bool:
        """Whether what other processes hold decides the budget, and not the utilization."""
        others = self.device.memory_limit - self.device.memory_in_use
        return others < int(self.device.memory_limit * self.utilization)

    def lines(self) -> list[str]:
        """The sum, one term a line."""
        if self.requested_bytes is not None:
            return [f"KV cache {format_bytes(self.requested_bytes)} (--kv-cache-memory-bytes)"]
        lines = [
            f"memory limit {format_bytes(self.device.memory_limit)} x {self.utilization:.2f} "
            "(--gpu-memory-utilization)"
        ]
        if self.device.memory_in_use:
            lines.append(f"held by other processes {format_bytes(self.device.memory_in_use)}")
        return [
            *lines,
            f"usable {format_bytes(self.budget)}",
            f"weights {format_bytes(self.weights)}",
            f"workspace {format_bytes(self.workspace)}",
            f"left for the KV cache {format_bytes(self.page_bytes)}",
        ]


def report(
    plan: MemoryPlan,
    backend_names: Sequence[str],
    summary: CacheSummary,
    capacity: Capacity,
    dense: Capacity,
    max_model_len: int,
) -> str:
    """The block of text printed at start.

    Args:
        plan: where the bytes come from.
        backend_names: of the attention layers.
        summary: of the attention layers.
        capacity: what the bytes hold.
        dense: what the same bytes hold in 16-bit pages.
        max_model_len: the longest request.
    """
    names = " + ".join(f"{n} layers {name}" for name, n in Counter(backend_names).items())
    rows = [
        ("device", f"{plan.device.name} ({plan.device.kind})"),
        ("memory limit", format_bytes(plan.device.memory_limit)),
        ("weights", format_bytes(plan.weights)),
        ("workspace", format_bytes(plan.workspace)),
        ("KV cache", format_bytes(capacity.num_blocks * capacity.bytes_per_block)),
        ("pages", names),
        *_block_rows(summary, capacity, max_model_len),
        ("tokens", f"{capacity.tokens:,}"),
        (
            "requests",
            f"{capacity.requests(max_model_len):.1f} of {max_model_len:,} tokens (max_model_len)",
        ),
    ]
    if summary.num_compressed:
        ratio = capacity.ratio(dense, max_model_len)
        rows += [
            ("compressed", f"{summary.num_compressed} of {summary.num_layers} layers"),
            ("bits", f"{summary.bits_per_element:.2f} per key or value element, all included"),
            ("ratio", f"{ratio:.2f}x over the whole cache, against 16-bit pages"),
            ("dense tokens", f"{dense.tokens:,} in the same bytes"),
        ]
    return "\n".join(["KV cache plan", *(f"    {name:<13}{value}" for name, value in rows)])


def _block_rows(
    summary: CacheSummary, capacity: Capacity, max_model_len: int
) -> list[tuple[str, str]]:
    if not capacity.groups:
        return [
            ("per token", format_bytes(summary.bytes_per_token)),
            ("blocks", f"{capacity.num_blocks:,} of {capacity.block_size} tokens"),
        ]
    kinds = Counter(group.describe() for group in capacity.groups)
    return [
        ("per request", f"{format_bytes(capacity.bytes_for(max_model_len))} at max_model_len"),
        ("blocks", f"{capacity.num_blocks:,} of {format_bytes(capacity.bytes_per_block)}"),
        ("groups", " + ".join(f"{count} of {kind}" for kind, count in kinds.items())),
        *_kept_state_rows(capacity, max_model_len),
    ]


def _kept_state_rows(capacity: Capacity, max_model_len: int) -> list[tuple[str, str]]:
    """What the prefix cache keeps of a model with recurrent state."""
    if capacity.match_tokens is None:
        return []
    found = f"found at multiples of {capacity.match_tokens:,} tokens"
    if capacity.match_tokens >= max_model_len:
        found = (
            f"never found: they end at multiples of {capacity.match_tokens:,} tokens, and "
            f"max_model_len is {max_model_len:,}"
        )
    kept = capacity.kept_states(max_model_len)
    return [
        ("prefixes", found),
        (
            "kept states",
            f"{format_bytes(capacity.kept_state_bytes)} for each prefix, beside its tokens; "
            f"room for {kept:,} beside one request of max_model_len",
        ),
    ]
