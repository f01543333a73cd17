"""How many bytes are for pages: pure arithmetic on measured numbers.

memory limit x utilization          what vllm_metal may use
  - held by other processes         only where memory is shared with them (CPU)
  - weights
  - workspace                       activations of the largest step
  = bytes for pages
"""

from dataclasses import dataclass

from vllm_metal.device import Device
from vllm_metal.errors import UserError

GIB = 1 << 30


def format_bytes(size: float) -> str:
    """Bytes as people read them: `1.50 GiB`, `24.0 MiB`, `92 B`."""
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
        """What vllm_metal may use in all."""
        allowed = int(self.device.memory_limit * self.utilization)
        return min(allowed, self.device.memory_limit - self.device.memory_in_use)

    @property
    def page_bytes(self) -> int:
        """Bytes for pages; may be negative."""
        if self.requested_bytes is not None:
            return self.requested_bytes
        return self.budget - self.weights - self.workspace

    def require(self, max_model_len: int, block_size: int, bytes_per_block: int) -> None:
        """Checks that one request of `max_model_len` tokens fits beside vLLM's null block.

        Raises:
            UserError: it does not; names the sum and the largest `max_model_len` that fits.
        """
        blocks = self.page_bytes // bytes_per_block
        needed = -(-max_model_len // block_size) + 1
        if blocks >= needed:
            return
        fits = max(0, blocks - 1) * block_size
        remedy = (
            f"set --max-model-len {fits} or less (or -1 to fit it), or " if fits > 0 else ""
        ) + "give more memory with --gpu-memory-utilization or --kv-cache-memory-bytes"
        raise UserError(
            f"Too little memory for one request of {max_model_len} tokens",
            [
                *self.lines(),
                f"one request of {max_model_len} tokens needs "
                f"{format_bytes(needed * bytes_per_block)} "
                f"({format_bytes(bytes_per_block / block_size)} per token)",
                f"remedy: {remedy}",
            ],
        )

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


def extrapolate_workspace(peaks: dict[int, int], query_len: int) -> int:
    """Workspace of a prefill of `query_len` tokens from measured peaks.

    Args:
        peaks: bytes at two small query lengths; activations grow linearly with the length.
        query_len: the largest number of tokens one step may hold.
    """
    (short, low), (long, high) = sorted(peaks.items())
    slope = max(0.0, (high - low) / (long - short))
    return max(high, int(low + slope * (query_len - short)))


def report(
    plan: MemoryPlan,
    backend_name: str,
    num_blocks: int,
    block_size: int,
    bytes_per_block: int,
    max_model_len: int,
) -> str:
    """The block of text printed at start."""
    tokens = (num_blocks - 1) * block_size
    rows = [
        ("device", f"{plan.device.name} ({plan.device.kind})"),
        ("memory limit", format_bytes(plan.device.memory_limit)),
        ("weights", format_bytes(plan.weights)),
        ("workspace", format_bytes(plan.workspace)),
        ("KV cache", f"{format_bytes(num_blocks * bytes_per_block)}, {backend_name}"),
        ("per token", format_bytes(bytes_per_block / block_size)),
        ("blocks", f"{num_blocks:,} of {block_size} tokens"),
        ("tokens", f"{tokens:,}"),
        ("requests", f"{tokens / max_model_len:.1f} of {max_model_len:,} tokens (max_model_len)"),
    ]
    return "\n".join(["KV cache plan", *(f"    {name:<13}{value}" for name, value in rows)])
