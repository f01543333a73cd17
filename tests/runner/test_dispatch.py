"""A dispatched evaluation runs while its caller goes on."""

import mlx.core as mx
import pytest

from vllm_metal.runner.dispatch import make_dispatch


@pytest.fixture
def dispatch():
    stream = mx.default_stream(mx.default_device())
    yield make_dispatch()
    mx.set_default_stream(stream)


def test_the_next_graph_is_built_on_a_result_in_flight(dispatch):
    total = mx.zeros((64, 64))
    for step in range(20):
        previous, total = total, total @ mx.eye(64) + step
        wait = dispatch(total, [previous])
        following = total + 1
        wait()
        assert following[0, 0].item() == sum(range(step + 1)) + 1
