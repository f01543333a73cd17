"""What `vllm-metal doctor` prints: a report that says all that a reader elsewhere must know."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from vllm_metal.attention.backend import LayerShape
from vllm_metal.commands.decode_timing import LAYERS, MEMORY_SHARE, SHAPES, StepTime
from vllm_metal.commands.kernel_checks import DENSE, DENSE_ON_OPERATIONS, Check
from vllm_metal.commands.kernel_trial import QUERY_HEADS_PER_KV_HEAD
from vllm_metal.kv_cache.planner import format_bytes

PACKAGES = ("vllm", "mlx", "mlx-lm")
"""Packages whose versions are named."""

CHECK_HEADER = f"{'pages':<12}{'compiled in':>12}{'wrong bytes':>13}{'error':>10}{'allowed':>10}"
STEP_HEADER = (
    f"{'requests x tokens':<19}{'pages':<12}{'ms':>8}{'of dense':>10}{'GB read':>9}{'GB/s':>7}"
    f"{'of copy':>9}"
)


@dataclass
class Report:
    """Everything that was found."""

    facts: dict[str, str | int]
    """Of the machine: `doctor.machine_facts`."""
    shape: LayerShape
    """Of the layer that was checked."""
    block_size: int
    checks: Sequence[Check]
    steps: list[StepTime] = field(default_factory=list)
    """Times of decode steps; none on a machine without a GPU, and none where a check failed."""
    copy_rate: float | None = None
    """GB/s that a copy reads and writes together."""
    timing_failure: str = ""
    """Why the timing stopped, where it did."""

    @property
    def ok(self) -> bool:
        """Whether all results are right and all kernels run."""
        return not self._failed

    @property
    def _failed(self) -> list[str]:
        failed = [check.pages for check in self.checks if check.failure]
        return failed + ["timing"] * bool(self.timing_failure)

    @property
    def _heads(self) -> int:
        return QUERY_HEADS_PER_KV_HEAD * self.shape.num_kv_heads

    def as_dict(self) -> dict:
        """For `--json`."""
        return self.facts | {
            "head_size": self.shape.head_size,
            "kv_heads": self.shape.num_kv_heads,
            "query_heads": self._heads,
            "block_size": self.block_size,
            "checks": [asdict(check) for check in self.checks],
            "layers": LAYERS,
            "copy_gigabytes_per_second": self.copy_rate,
            "steps": [
                asdict(step) | {"gigabytes_per_second": step.gigabytes_per_second}
                for step in self.steps
            ],
            "timing_failure": self.timing_failure,
            "ok": self.ok,
        }

    def render(self) -> str:
        """As text."""
        heads, size = self.shape.num_kv_heads, self.shape.head_size
        sections = [
            [f"{label:<16}{value}" for label, value in self._machine() if value],
            [
                f"Results with {self._heads} query heads and {heads} KV heads of {size} elements, "
                f"blocks of {self.block_size} tokens:",
                CHECK_HEADER,
                *map(_check_row, self.checks),
                *(f"{check.pages}: {check.failure}" for check in self.checks if check.failure),
            ],
            self._timing(),
            [
                f"FAILED: {', '.join(self._failed)}"
                if self._failed
                else "OK: all results are right."
            ],
        ]
        return "\n\n".join("\n".join(section) for section in sections if section)

    def _machine(self) -> list[tuple[str, str]]:
        facts = self.facts
        architecture = f" ({facts['architecture']})" if facts["architecture"] else ""
        return [
            ("device", f"{facts['device']}{architecture}"),
            ("GPU cores", str(facts["gpu_cores"] or "")),
            ("memory limit", format_bytes(float(facts["memory_limit"]))),
            ("macOS", str(facts["macos"])),
            ("system", str(facts["system"])),
            ("Python", str(facts["python"])),
            ("vllm-metal", str(facts["vllm_metal"])),
            *((name, str(facts[name])) for name in PACKAGES),
            ("kernels run by", str(facts["kernels"])),
        ]

    def _timing(self) -> list[str]:
        if self.facts["kernels"] == "host":
            return [
                "MLX has no GPU here: the kernels ran on the CPU. Their speed there says nothing "
                "about a GPU, so it was not measured."
            ]
        if not self.steps or self.copy_rate is None:
            return [f"The timing stopped: {self.timing_failure}"] * bool(self.timing_failure)
        dense = {(s.requests, s.context): s for s in self.steps if s.pages == DENSE}
        lines = [
            f"One decode step of {LAYERS} attention layers with {self._heads} query heads, as the "
            "server runs it (median):",
            STEP_HEADER,
            *(_step_row(s, dense[s.requests, s.context], self.copy_rate) for s in self.steps),
            f"A copy on this device reads and writes {self.copy_rate:.0f} GB/s together.",
        ]
        if self.timing_failure:
            return [*lines, f"The timing stopped: {self.timing_failure}"]
        if left_out := [f"{n} x {tokens:,}" for n, tokens in SHAPES if (n, tokens) not in dense]:
            lines.append(
                f"Left out, because dense pages would take more than 1/{MEMORY_SHARE} of the "
                f"memory: {', '.join(left_out)}."
            )
        return lines


def _check_row(check: Check) -> str:
    compiled, wrong = f"{check.seconds:.1f} s", str(check.wrong_bytes)
    if check.pages == DENSE_ON_OPERATIONS:
        compiled = wrong = "-"
    return (
        f"{check.pages:<12}{compiled:>12}{wrong:>13}{check.error:>10.1e}{check.allowed:>10.1e}"
        f"  {'FAILED' if check.failure else 'OK'}"
    )


def _step_row(step: StepTime, dense: StepTime, copy_rate: float) -> str:
    rate = step.gigabytes_per_second
    return (
        f"{f'{step.requests} x {step.context:,}':<19}{step.pages:<12}{step.milliseconds:>8.2f}"
        f"{step.milliseconds / dense.milliseconds:>9.2f}x{step.bytes_read / 1e9:>9.2f}{rate:>7.0f}"
        f"{100 * rate / copy_rate:>7.0f} %"
    )
