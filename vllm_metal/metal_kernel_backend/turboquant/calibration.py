"""Constants of a layer's keys, measured once at load: a centre and a multiplier per channel.

`centre` is the mean key of a KV head, after RoPE. Subtracting it moves all logits of a query alike,
so it costs nothing and may be anything; near the mean it leaves less to quantise.

`multiplier` weighs channels. With keys stored as m (k - centre) and queries as q / m, an error of
equal size in each stored channel disturbs the logits by sum_d E[q_d^2] / m_d^2 for each
sum_d m_d^2 Var[k_d] stored, which is least for m_d = (E[q_d^2] / Var[k_d])^(1/4).

No data set is needed: the model reads pieces of TEXT, which mixes prose, code, lists and languages.
They are spread over the positions that the server allows, each doubling of the position counting
alike, because RoPE turns the mean key along the sequence: constants from the first thousand tokens
are worse than none at six thousand, and constants for long sequences cost the short ones a little.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

Sample = tuple[np.ndarray | None, np.ndarray]
"""Queries [T, Hq, D] and keys [T, H, D] of one layer, after RoPE; None for queries not seen."""

Collect = Callable[[Sequence[int], int], Sequence[Sample]]
"""Runs the model on token ids at positions offset, offset + 1, ...; a sample for each layer."""

MAX_MULTIPLIER = 16.0
"""No channel is weighed more than this many times more, or less, than the geometric mean."""


ROW_TOKENS = 240
"""Tokens the model reads at once."""

TEXT = """\
The ferry left at seven, before the fog had lifted. Anna counted eleven passengers: two
nurses, a man with a violin case, and a school class of eight. "Is it always this slow?" asked
the teacher. "Only in March," said the captain, and laughed.

To make the soup, heat 2 tablespoons of oil in a pot, add one chopped onion and cook it for 5
minutes. Stir in 400 g of tomatoes, half a litre of water and a little salt. Simmer for twenty
minutes, then serve with bread.

def median(values):
    \"\"\"Return the middle value of a list of numbers.\"\"\"
    ordered = sorted(values)
    n = len(ordered)
    if n % 2 == 1:
        return ordered[n // 2]
    return (ordered[n // 2 - 1] + ordered[n // 2]) / 2

In 1856 the Bessemer process cut the price of steel from about 40 pounds to 7 pounds per ton.
Within thirty years, rails, bridges and ships were made of it; by 1900 world output had passed
28 million tons.

Q: What is the difference between weather and climate?
A: Weather is what happens today or this week. Climate is the average over many years, for
example thirty.

{"name": "sensor-7", "values": [3.5, -1, 0, 12], "ok": true, "next": null}

Der Zug nach Hamburg fährt um 9 Uhr ab. El museo cierra los lunes. La réunion est reportée à
jeudi. 今日は雨が降っています。

- Check that the valve is closed.
- Open the cover and remove the old filter.
- Wait ten seconds; if the light stays red, call the service number.

If x + 3 = 10, then x = 7. The area of a circle with radius r is pi * r^2, so for r = 2 it is
about 12.57.
"""


def calibrate(
    collect: Collect, beginning: Sequence[int], text: Sequence[int], max_model_len: int
) -> list["KeyConstants"]:
    """Constants of every layer, for sequences of up to `max_model_len` tokens.

    Calls `collect` once for each entry of `row_offsets`, with at most ROW_TOKENS token ids.

    Args:
        collect: runs the model.
        beginning: token ids that a prompt begins with, such as BOS. The model reads them before
            every piece of the text, and they do not count: a request has them at its first
            positions only.
        text: token ids of TEXT, without those.
        max_model_len: tokens.
    """
    before = list(beginning)[: max_model_len - 1]
    pieces = text_pieces(text, min(ROW_TOKENS, max_model_len) - len(before))
    length = len(before) + len(pieces[0])
    moments: list[Moments] = []
    for row, offset in enumerate(row_offsets(max_model_len, length)):
        samples = collect([*before, *pieces[row % len(pieces)]], offset)
        moments = moments or [Moments() for _ in samples]
        for layer, (queries, keys) in zip(moments, samples, strict=True):
            layer.add((None if queries is None else queries[len(before) :], keys[len(before) :]))
    return [layer.constants() for layer in moments]


def text_pieces(text: Sequence[int], length: int) -> list[list[int]]:
    """Pieces of at most `length` tokens that cover all of `text`, as few as can be, equally long.

    >>> text_pieces([1, 2, 3, 4, 5], 3)
    [[1, 2, 3], [3, 4, 5]]
    """
    length = min(length, len(text))
    count = -(-len(text) // length)
    starts = [i * (len(text) - length) // max(1, count - 1) for i in range(count)]
    return [list(text[start : start + length]) for start in starts]


def row_offsets(max_model_len: int, length: int) -> list[int]:
    """First positions of the rows: 0, then doubling, the last row ending at max_model_len.

    >>> row_offsets(8192, 240)
    [0, 124, 248, 497, 994, 1988, 3976, 7952]
    """
    offsets: list[int] = []
    offset = max_model_len - length
    while offset >= length / 2:
        offsets.append(offset)
        offset //= 2
    return [0, *reversed(offsets)]


@dataclass(frozen=True)
class KeyConstants:
    """What `KeyCodec` needs to know of one layer."""

    centre: np.ndarray
    """float32 [H, D]."""
    multiplier: np.ndarray
    """float32 [H, D], positive."""

    @classmethod
    def neutral(cls, num_kv_heads: int, head_size: int) -> "KeyConstants":
        """Constants that change nothing: what an uncalibrated layer gets."""
        shape = (num_kv_heads, head_size)
        return cls(np.zeros(shape, np.float32), np.ones(shape, np.float32))


@dataclass
class Moments:
    """Running sums over the samples of one layer, float64."""

    tokens: int = 0
    keys: np.ndarray = field(default_factory=lambda: np.zeros(1))
    squared_keys: np.ndarray = field(default_factory=lambda: np.zeros(1))
    squared_queries: np.ndarray | None = None

    def add(self, sample: Sample) -> None:
        """Adds queries [T, Hq, D], or None, and keys [T, H, D]."""
        queries, keys = sample
        keys = np.asarray(keys, np.float64)
        tokens, num_kv_heads, head_size = keys.shape
        self.tokens += tokens
        self.keys = self.keys + keys.sum(axis=0)
        self.squared_keys = self.squared_keys + (keys**2).sum(axis=0)
        if queries is not None:
            grouped = np.asarray(queries, np.float64).reshape(tokens, num_kv_heads, -1, head_size)
            squared = (grouped**2).mean(axis=2).sum(axis=0)
            before = self.squared_queries
            self.squared_queries = squared if before is None else before + squared

    def constants(self) -> KeyConstants:
        """Centre and multiplier; 1 without queries. Raises ValueError if nothing was added."""
        if not self.tokens:
            raise ValueError("no calibration samples")
        centre = self.keys / self.tokens
        variance = np.maximum(self.squared_keys / self.tokens - centre**2, 0)
        if self.squared_queries is None:
            multiplier = np.ones_like(centre)
        else:
            multiplier = _weights(self.squared_queries / self.tokens, variance)
        return KeyConstants(centre.astype(np.float32), multiplier.astype(np.float32))


def _weights(squared_queries: np.ndarray, variance: np.ndarray) -> np.ndarray:
    """(E[q^2] / Var[k])^(1/4) over the last axis, its geometric mean 1, within MAX_MULTIPLIER.

    Channels that hardly vary count as varying by a millionth of the mean; likewise queries.
    """

    def floored(x: np.ndarray) -> np.ndarray:
        return np.maximum(x, 1e-6 * x.mean(axis=-1, keepdims=True) + 1e-30)

    logarithm = 0.25 * np.log(floored(squared_queries) / floored(variance))
    logarithm -= logarithm.mean(axis=-1, keepdims=True)
    return np.exp(np.clip(logarithm, -np.log(MAX_MULTIPLIER), np.log(MAX_MULTIPLIER)))
