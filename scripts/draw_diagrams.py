"""Draws the pictures of the documentation, `docs/images/*.svg`.

    python scripts/draw_diagrams.py            writes them
    python scripts/draw_diagrams.py --check    writes nothing; exit 1 unless they are current

What a picture says about the code is read from the code where that is possible: the ladder of
folders from the test that enforces it, the bytes of a page from `PageLayout`, the measured losses
from the committed measurement.
"""

import ast
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

from svg import WIDTH, Picture

from vllm_metal.metal_kernel_backend.turboquant.layout import PageLayout

ROOT = Path(__file__).parent.parent
IMAGES = ROOT / "docs" / "images"
LADDER_TEST = ROOT / "tests" / "test_import_ladder.py"
MEASURED = ROOT / "vllm_metal" / "metal_kernel_backend" / "turboquant" / "measured_loss.json"

LEFT, INNER = 8, WIDTH - 16

PURPOSE = {
    "kv_store": "pages on disk",
    "__init__": "what vLLM calls in every process",
    "cli": "vllm-metal",
    "metrics": "/metrics",
    "platform": "refusals",
    "scheduler": "NaN rows",
    "worker": "one device",
    "commands": "other subcommands",
    "benchmark": "speed of a model",
    "evaluation": "loss of a format",
    "runner": "one step of the engine",
    "startup": "before the first request",
    "model_pages": "the cache of one model, and what it holds",
    "config": "the user's settings",
    "model": "mlx-lm's side",
    "kv_cache": "sizes and owns the pages",
    "metal_kernel_backend": "dense, TurboQuant, kernels",
    "attention": "the contract between a model and its pages",
    "machine": "device, BLAS, cache folder",
    "options": "vLLM's options, one by one",
    "errors": "errors that a user can act on",
}
"""What each folder or module of the package is for."""

STEP = (
    ("vLLM", "the scheduler asks for one more token", "SchedulerOutput"),
    ("worker.py", "passes the step on", ""),
    ("runner/model_runner.py", "prefill or decode, then sampling", ""),
    ("runner/request_batch.py", "vLLM's InputBatch follows the scheduler", "rows"),
    ("runner/forward_inputs.py", "rows become arrays", "token ids, block tables"),
    ("kv_cache/group_metadata.py", "metadata for each group of layers", "DecodeMetadata"),
    ("model/decode_graphs.py", "replays a trace of the forward pass", ""),
    ("model/model_binding.py", "calls the mlx-lm model", "token ids, our caches"),
    ("mlx-lm", "projections, norms, RoPE", "queries, keys, values"),
    ("model/layer_cache.py", "stands where the model has its cache", ""),
    ("kv_cache/cache.py", "the only owner of the pages", "pages [num_blocks, ...]"),
    ("metal_kernel_backend/", "writes the new token, attends to all", "logits [B, vocabulary]"),
    ("runner/sampler.py", "logits become tokens [B]", ""),
)
"""The stations of one decode step: who, what it does, what it hands on."""


def package_folders() -> Picture:
    """The folders of the package as the rungs of the import ladder."""
    rungs = list(reversed(ladder()))
    words = "; ".join(", ".join(f"{name} ({PURPOSE[name]})" for name in rung) for rung in rungs)
    picture = Picture(
        len(rungs) * 64 + 18,
        "The folders of vllm_metal, from the doors down to the ground",
        f"Each rung imports only from rungs below it. From the top: {words}.",
    )
    picture.arrow((10, 12), (10, picture.height - 12))
    for i, rung in enumerate(rungs):
        gap = 8
        width = (WIDTH - 28 - gap * (len(rung) - 1) - 4) / len(rung)
        for k, name in enumerate(rung):
            is_folder = (ROOT / "vllm_metal" / name).is_dir()
            lines = [(name + "/" * is_folder, "mono bold"), (PURPOSE[name], "soft")]
            x = 28 + k * (width + gap)
            picture.labelled_box(x, 12 + 64 * i, width, lines, "ours" if is_folder else "box", 50)
    return picture


def decode_step() -> Picture:
    """The stations of one decode step."""
    pitch = 76
    picture = Picture(
        pitch * len(STEP),
        "One decode step",
        "From the top: " + "; ".join(f"{who}: {what}" for who, what, _ in STEP) + ".",
    )
    for i, (who, what, hands_on) in enumerate(STEP):
        lines = [(who, "mono bold" if "." in who or "/" in who else "bold"), (what, "")]
        kind = "ours" if "." in who or "/" in who else "box"
        below = picture.labelled_box(50, 4 + pitch * i, 360, lines, kind, 48)
        if i + 1 < len(STEP):
            picture.arrow((230, below), (230, 4 + pitch * (i + 1)))
            picture.text(242, below + 19, hands_on, "soft")
    return picture


def turboquant_vectors() -> Picture:
    """What happens to keys, values and queries."""
    picture = Picture(
        596,
        "What TurboQuant does with keys, values and queries",
        "Storing: a key loses its centre, is multiplied with signs and a multiplier, rotated and "
        "quantised to codes, a scale and, for long keys, levels. A value is multiplied with signs, "
        "rotated and quantised to codes and a scale. Attending: a query is multiplied with signs, "
        "divided by the multiplier and rotated; its products with the key codes, times the key's "
        "scale and levels, go through the softmax; the weights times the value's scale are "
        "multiplied with the value codes; the sum is rotated back and multiplied with the signs.",
    )
    width, columns = 140, (8, 160, 312)
    value, key, query = columns

    def chain(x: float, y: float, steps: list[list[str]], last_arrow: float) -> None:
        for i, step in enumerate(steps):
            kind = "box" if i else "ours"
            style = "bold" if not i else ""
            below = picture.labelled_box(x, y, width, [(line, style) for line in step], kind)
            following = below + 20 if i + 1 < len(steps) else last_arrow
            if following > below:
                picture.arrow((x + width / 2, below), (x + width / 2, following))
            y = below + 20

    chain(value, 8, [["value v"], ["× signs"], ["rotate"], ["quantise"]], 398)
    chain(key, 8, [["key k"], ["− centre"], ["× signs × m"], ["rotate"], ["quantise"]], 262)
    chain(query, 8, [["query q"], ["× signs ÷ m"], ["rotate"]], 262)
    picture.box(2, 236, 304, 250, "frame")
    picture.text(14, 256, "a page", "bold")
    lines = [("key codes", ""), ("scales", ""), ("levels", "")]
    below = picture.labelled_box(key, 262, width, lines)
    picture.arrow((key + width, 294), (query, 294))
    scores = [("products", "bold"), ("with key codes", ""), ("× scale, level", "")]
    below = picture.labelled_box(query, 262, width, scores)
    picture.arrow((query + 70, below), (query + 70, below + 20))
    below = picture.labelled_box(query, below + 20, width, [("softmax", "bold")])
    picture.arrow((query + 70, below), (query + 70, 398))
    picture.labelled_box(value, 398, 292, [("value codes", ""), ("scales", "")], height=64)
    picture.arrow((300, 430), (query, 430))
    total = [("weighted sum", "bold"), ("× scale", ""), ("of value codes", "")]
    below = picture.labelled_box(query, 398, width, total)
    picture.arrow((query + 70, below), (query + 70, below + 20))
    below = picture.labelled_box(query, below + 20, width, [("rotate back", ""), ("× signs", "")])
    picture.arrow((query + 70, below), (query + 70, below + 20))
    picture.labelled_box(query, below + 20, width, [("output", "bold")], "ours")
    return picture


def head_page() -> Picture:
    """The planes of one head page."""
    layout = PageLayout.of("q8_0", "q3_0", 128, 1, 16)
    planes = [
        ("key codes", layout.key_codes_offset, f"16 × {layout.key_codes_bytes}"),
        ("value codes", layout.value_codes_offset, f"16 × {layout.value_codes_bytes}"),
        ("key levels", layout.key_levels_offset, f"{layout.key_levels_bytes // 2} × (16 × 2)"),
        ("key scales", layout.key_scales_offset, "16 × 2"),
        ("value scales", layout.value_scales_offset, "16 × 2"),
    ]
    end = layout.head_page_bytes
    words = ", ".join(f"{name} from byte {offset}" for name, offset, _ in planes)
    picture = Picture(
        230,
        f"A head page of {end} bytes",
        f"Block size 16, head size 128, q8_0 keys, q3_0 values. {words}; it ends at byte {end}.",
    )
    heights = (56, 44, 32, 32, 32)
    y = 12
    for (name, offset, size), height in zip(planes, heights, strict=True):
        picture.text(56, y + 10, str(offset), "soft", "end")
        picture.box(64, y, 240, height, "ours")
        picture.text(78, y + height / 2 + 5, name)
        picture.text(316, y + height / 2 + 5, f"{size} bytes", "soft")
        y += height
    picture.text(56, y + 10, str(end), "soft", "end")
    return picture


def packed_codes() -> Picture:
    """Sixteen 3-bit codes in three halfwords."""
    picture = Picture(
        124,
        "Sixteen codes of 3 bits in three halfwords",
        "Halfword 0 holds codes 0 to 4, halfword 1 codes 5 to 9, halfword 2 codes 10 to 14, the "
        "lowest code in the lowest bits. The top bits of the three halfwords are code 15.",
    )
    bit = 21
    for halfword in range(3):
        y = 8 + 30 * halfword
        picture.text(8, y + 19, f"halfword {halfword}", "soft")
        picture.box(100, y, bit, 26)
        for i in range(5):
            code = str(5 * halfword + 4 - i)
            picture.labelled_box(100 + bit * (1 + 3 * i), y, 3 * bit, [(code, "")], "ours", 26)
    picture.text(100, 116, "top bits: code 15", "soft")
    picture.text(100 + 16 * bit, 116, "bit 0", "soft", "end")
    return picture


def measured_loss() -> Picture:
    """Loss against stored bits, for our formats and block-affine ones."""
    figures = json.loads(MEASURED.read_text())["runs"][0]["pairs"]
    rows = [(name, row["bits_per_element"], row["kld"]) for name, row in figures.items()]
    words = "; ".join(f"{name}: {bits:.2f} bits, {kld:.4f}" for name, bits, kld in rows)
    picture = Picture(
        420,
        "Mean KL divergence from the dense cache against stored bits per element",
        f"Logarithmic. {words}.",
    )
    left, right, top, bottom = 62, 444, 46, 372
    low, high = -4.2, 0.6

    def place(bits: float, kld: float) -> tuple[float, float]:
        x = left + (bits - 2.6) / 6 * (right - left)
        return x, bottom - (math.log10(kld) - low) / (high - low) * (bottom - top)

    for exponent in range(-4, 1):
        _, y = place(0, 10.0**exponent)
        picture.line(left, y, right, y)
        picture.text(left - 8, y + 5, f"{10.0**exponent:g}", "soft", "end")
    for bits in range(3, 9):
        x, _ = place(bits, 1)
        picture.line(x, top, x, bottom)
        picture.text(x, bottom + 18, str(bits), "soft", "middle")
    picture.text(left, 16, "mean KL divergence, nats", "soft")
    picture.text(right, bottom + 38, "stored bits per element", "soft", "end")
    for x, kind, label in ((left, "dot", "TurboQuant"), (left + 130, "square", "block-affine")):
        picture.mark(x + 6, 33, kind)
        picture.text(x + 18, 38, label, "soft")
    labelled: list[tuple[float, float]] = []
    for name, bits, kld in rows:
        affine = name.startswith("block-affine")
        x, y = place(bits, kld)
        picture.mark(x, y, "square" if affine else "dot")
        label = name.removeprefix("block-affine ").replace("_0", "").replace("q", "")
        on_the_right = affine or any(math.dist((x, y), other) < 12 for other in labelled)
        side, anchor = (8, "start") if on_the_right else (-8, "end")
        picture.text(x + side, y + 5, label, "soft", anchor)
        labelled.append((x, y))
    return picture


def ladder() -> list[list[str]]:
    """The rungs from the ground up, as the test has them."""
    for node in ast.parse(LADDER_TEST.read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "LADDER":
            return ast.literal_eval(node.value)
    raise LookupError(f"{LADDER_TEST} has no LADDER")


PICTURES: tuple[Callable[[], Picture], ...] = (
    package_folders,
    decode_step,
    turboquant_vectors,
    head_page,
    packed_codes,
    measured_loss,
)
"""Each is drawn to a file of its own name."""


def main() -> int:
    """Returns the exit code: 1 where `--check` finds a picture that is not current."""
    drawn = {IMAGES / f"{draw.__name__}.svg": draw().svg() for draw in PICTURES}
    if "--check" not in sys.argv[1:]:
        for file, text in drawn.items():
            file.write_text(text)
        return 0
    stale = [file for file, text in drawn.items() if not file.exists() or file.read_text() != text]
    for file in stale:
        print(f"{file.relative_to(ROOT)} is not what {Path(__file__).name} draws", file=sys.stderr)
    return int(bool(stale))


if __name__ == "__main__":
    sys.exit(main())
