"""Greedy answers that may part where two tokens are nearly as likely."""

from collections.abc import Sequence


class GreedyAnswer:
    """Greedy tokens of one request, and by how much each was ahead of the next best.

    Equal to other tokens, whole or the beginning of an answer, up to the first near tie: what
    follows a token that may be another one is not compared.

    Args:
        tokens: of the answer.
        leads: of the log-probability of each token over that of the second best.
        near_tie: the lead below which a token may be another one.
    """

    def __init__(self, tokens: Sequence[int], leads: Sequence[float], near_tie: float):
        assert len(tokens) == len(leads)
        self.tokens, self.leads, self.near_tie = list(tokens), list(leads), near_tie

    def __eq__(self, other: object) -> bool:
        theirs = other.tokens if isinstance(other, GreedyAnswer) else other
        if not isinstance(theirs, list) or len(theirs) > len(self.tokens):
            return NotImplemented
        for mine, token, lead in zip(self.tokens, theirs, self.leads, strict=False):
            if mine != token:
                return lead < self.near_tie
        return True

    def __repr__(self) -> str:
        pairs = zip(self.tokens, self.leads, strict=True)
        return " ".join(f"{token}({lead:.4f})" for token, lead in pairs)
