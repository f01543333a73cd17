"""Writes the table of what fits into a Mac's memory into README.md and docs/index.md.

    python scripts/what_fits.py            writes it
    python scripts/what_fits.py --check    writes nothing; exit 1 unless both pages are current

The figures are those of `vllm-metal plan`, for the models of `what_fits.json`: what their config
files say that decides sizes, with weights quantised to 4 bits in groups of 64, as mlx-lm quantises
them by default. Weights are counted, not loaded.
"""

import json
import sys
import tempfile
from pathlib import Path

from vllm_metal.commands.plan import WORKSPACE
from vllm_metal.commands.plan_table import table as plan_table
from vllm_metal.kv_cache.planner import GIB, MemoryPlan
from vllm_metal.machine.device import Device, mac_working_set
from vllm_metal.model import model_loader
from vllm_metal.model.model_binding import ModelBinding
from vllm_metal.model.weight_size import weight_size

ROOT = Path(__file__).parent.parent
MODELS = Path(__file__).with_suffix(".json")
PAGES = ROOT / "README.md", ROOT / "docs" / "index.md"
BEGIN = "<!-- what fits: begin, written by scripts/what_fits.py -->\n"
END = "<!-- what fits: end -->"

RAM_GIB = 16, 32, 64
PAIRS = ("dense", "float16"), ("q8_0", "q3_0"), ("q6_0", "q4_0"), ("q4_0", "q4_0")
GPU_MEMORY_UTILIZATION = 0.92
BLOCK_SIZE = 16
MAX_MODEL_LEN = 8192
"""Of a request; without windows and recurrent states the tokens do not depend on it."""


def tokens_that_fit(config: dict) -> tuple[int, dict[tuple[str, str], list[int | None]]]:
    """Bytes of the weights, and for each pair the tokens that fit for each size of RAM.

    None stands for weights that leave no room.
    """
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        source = model_loader.ModelSource(folder)
        model = model_loader.load_structure(source)
        weights = weight_size(Path(folder), model, source.config().for_mlx_lm).bytes
    binding = ModelBinding(model)
    fitting: dict[tuple[str, str], list[int | None]] = {pair: [] for pair in PAIRS}
    for ram in RAM_GIB:
        device = Device("metal", "a Mac", mac_working_set(ram * GIB), 0)
        plan = MemoryPlan(device, GPU_MEMORY_UTILIZATION, weights, WORKSPACE)
        tokens: dict[tuple[str, str], int] = {}
        if plan.page_bytes > 0:
            longest = config["max_position_embeddings"]
            rows, refusal = plan_table(binding, plan.page_bytes, BLOCK_SIZE, MAX_MODEL_LEN, longest)
            assert refusal is None
            tokens = {(row.k_quant, row.v_quant): row.tokens for row in rows}
        for pair, counts in fitting.items():
            counts.append(tokens.get(pair))
    return weights, fitting


def table(models: dict[str, dict]) -> str:
    """The Markdown table."""
    rows = [
        "| model, weights of 4 bits | keys / values | "
        + " | ".join(f"{ram} GiB" for ram in RAM_GIB)
        + " |",
        "| --- | --- |" + " ---: |" * len(RAM_GIB),
    ]
    for name, config in models.items():
        weights, fitting = tokens_that_fit(config)
        title = f"{name}, {weights / GIB:.1f} GiB"
        for pair, counts in fitting.items():
            formats = "dense, 16 bits" if pair[0] == "dense" else f"`{pair[0]}/{pair[1]}`"
            cells = ["-" if count is None else f"{count:,}" for count in counts]
            rows.append(f"| {title} | {formats} | {' | '.join(cells)} |")
            title = ""
    return "\n".join(["", *rows, "", ""])


def with_table(text: str, written: str) -> str:
    """The page with the table between its marks."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    assert begin and end, f"the page lacks {BEGIN!r} or {END!r}"
    return before + BEGIN + written + END + after


def main() -> int:
    written = table(json.loads(MODELS.read_text()))
    pages = {page: with_table(page.read_text(), written) for page in PAGES}
    if "--check" in sys.argv[1:]:
        return int(any(page.read_text() != text for page, text in pages.items()))
    for page, text in pages.items():
        page.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
