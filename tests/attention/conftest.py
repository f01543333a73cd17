"""Each backend under the contract, on its own device."""

from collections.abc import Iterator

import mlx.core as mx
import pytest

from tests.attention.candidates import CANDIDATES, Candidate


@pytest.fixture(params=CANDIDATES, ids=str)
def candidate(request) -> Iterator[Candidate]:
    default = mx.default_device()
    mx.set_default_device(request.param.device)
    yield request.param
    mx.set_default_device(default)
