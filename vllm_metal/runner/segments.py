"""What one step computes of each request: the segments that the rest of the runner goes by.

    position   0 ...........  first  first + 1 ............. end
    decode     in the pages   newest token, then its drafts   sampled at each of these positions
    chunk      in the pages   tokens that are known           sampled at the last one, if complete

A draft is a token that a proposer guesses (`proposers`). It is computed as if it were right, and
counts where the token sampled before it is the same (`acceptance`).
"""

from collections.abc import Iterable
from enum import Enum
from typing import NamedTuple


class Kind(Enum):
    """How the tokens of a segment are computed."""

    DECODE = "decode"
    """As rows of a forward pass that other requests share."""
    CHUNK = "chunk"
    """As a prompt chunk, a forward pass of its own."""


class Segment(NamedTuple):
    """The tokens of one request that one step computes."""

    req_id: str
    row: int
    """Of the batch."""
    first: int
    """Position of its first token in the request."""
    length: int
    """Tokens, drafts included."""
    kind: Kind
    samples: bool = True
    """Whether all known tokens of the request are computed then, so that it samples."""
    drafts: tuple[int, ...] = ()
    """Tokens at its end that a proposer has guessed; a chunk has none."""

    @property
    def end(self) -> int:
        """Position behind its last token."""
        return self.first + self.length

    @property
    def num_samples(self) -> int:
        """Positions at which a token is sampled, its last ones."""
        return 1 + len(self.drafts) if self.samples else 0

    @property
    def num_rows(self) -> int:
        """Rows of logits that its forward pass leaves where it decodes or samples."""
        return 1 + len(self.drafts)


def in_row_order(segments: Iterable[Segment]) -> list[Segment]:
    """Segments in the order of a forward pass.

    Those of equal length are neighbours, so that they attend in one operation; among them the order
    is that of the batch.
    """
    return sorted(segments, key=lambda segment: (segment.length, segment.row))
