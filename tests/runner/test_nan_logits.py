"""Which rows are finite, and what becomes of those that are not."""

from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
import torch
from vllm.v1.outputs import ModelRunnerOutput

from vllm_metal.runner.nan_logits import are_finite, reporter, rows_in_torch

ROWS = 4


def logits(values: dict[int, float], dtype: mx.Dtype = mx.float32) -> mx.array:
    """Random rows; the one but last has these values at these places."""
    array = np.random.default_rng(0).standard_normal((ROWS, 1000)).astype(np.float32)
    for place, value in values.items():
        array[2, place] = value
    return mx.array(array).astype(dtype)


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("values", "finite"),
    [
        ({}, True),
        ({7: -np.inf, 999: -np.inf}, True),
        ({7: 6e4}, True),
        ({7: np.nan}, False),
        ({999: np.nan, 0: np.inf}, False),
        ({7: np.inf}, False),
        (dict.fromkeys(range(1000), -np.inf), False),
    ],
    ids=["numbers", "ruled out", "large", "NaN", "NaN and inf", "inf", "all ruled out"],
)
def test_a_row_is_finite_if_a_token_can_be_chosen(values, finite, dtype):
    assert are_finite(logits(values, dtype)).tolist() == [True, True, finite, True]


def test_rows_for_torch_are_finite():
    """In the order of the batch; a row that is not finite or has no logits is zeros."""
    decoded, prefilled = logits({5: np.nan}), logits({})[:1]
    evaluated = []
    parts = [([5], prefilled), ([0, 1, 3, 2], decoded)]
    found, finite = rows_in_torch(parts, (6, 1000), lambda *arrays: evaluated.append(len(arrays)))
    assert finite.tolist() == [True, True, True, False, True, True] and evaluated == [2, 2]
    expected = np.array(decoded)
    for row, source in ((0, 0), (1, 1), (2, 3)):
        torch.testing.assert_close(found[row], torch.from_numpy(expected[source]))
    torch.testing.assert_close(found[5], torch.from_numpy(np.array(prefilled)[0]))
    assert not found[3].any() and not found[4].any()


def report_of(scheduler_cls: str):
    return reporter(SimpleNamespace(scheduler_config=SimpleNamespace(scheduler_cls=scheduler_cls)))


def test_the_scheduler_is_told():
    output = ModelRunnerOutput(req_ids=["a"], req_id_to_index={"a": 0})
    report = report_of("vllm_metal.scheduler.MetalScheduler")
    report(output, [])
    assert output.num_nans_in_logits is None
    report(output, ["a"])
    assert output.num_nans_in_logits == {"a": 1}


def test_a_scheduler_that_cannot_end_a_request_stops_the_engine():
    output = ModelRunnerOutput(req_ids=["a"], req_id_to_index={"a": 0})
    report = report_of("mine.Scheduler")
    report(output, [])
    with pytest.raises(RuntimeError, match="logits of a are not finite, and the scheduler mine"):
        report(output, ["a"])
