"""What the arguments of `vllm-metal eval` ask for, checked before any model is loaded."""

import argparse
import pydoc_data.topics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from vllm_metal.errors import UserError
from vllm_metal.evaluation.block_affine import parse_bits
from vllm_metal.evaluation.fidelity import MIN_WINDOW_TOKENS
from vllm_metal.evaluation.needle import HAYSTACKS
from vllm_metal.evaluation.study import Study
from vllm_metal.metal_kernel_backend.turboquant.formats import parse_pair

T = TypeVar("T")


def study_of(args: argparse.Namespace) -> Study:
    """The study. Raises UserError for a value that is not allowed."""
    _at_least("--windows", args.windows, 1)
    _at_least("--window-tokens", args.window_tokens, MIN_WINDOW_TOKENS)
    if args.long_window_tokens:
        _at_least("--long-window-tokens", args.long_window_tokens, MIN_WINDOW_TOKENS, "0 or ")
    if args.max_model_len is not None:
        _at_least("--max-model-len", args.max_model_len, 1)
    return Study(
        _parsed("--pairs", args.pairs, parse_pair),
        _parsed("--block-affine", args.block_affine, parse_bits),
        args.windows,
        args.window_tokens,
        args.long_window_tokens,
        args.max_model_len,
        () if args.no_needles else HAYSTACKS,
    )


def read_text(path: Path | None) -> str:
    """The text of a file, or Python's documentation. Raises UserError for an unreadable file."""
    if path is None:
        return "".join(pydoc_data.topics.topics.values())
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--text {str(path)!r} cannot be read ({error})") from error


def _at_least(option: str, value: int, least: int, other: str = "") -> None:
    if value < least:
        raise UserError(f"{option} {value} is not allowed (allowed: {other}{least} or more)")


def _parsed(option: str, texts: Sequence[str], parse: Callable[[str], T]) -> list[T]:
    try:
        return [parse(text) for text in texts]
    except ValueError as error:
        raise UserError(f"{option} {' '.join(texts)}: {error}") from error
