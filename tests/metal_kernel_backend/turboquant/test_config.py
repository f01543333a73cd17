"""Which layers are left dense."""

import pytest

from vllm_metal.errors import UserError
from vllm_metal.metal_kernel_backend.turboquant.config import TurboQuantConfig
from vllm_metal.metal_kernel_backend.turboquant.formats import parse_pair


def test_layers_kept_dense():
    config = TurboQuantConfig(parse_pair("q8_0/q3_0"), skip_layers=(0, 5))
    assert config.skipped(6) == {0, 5}
    with pytest.raises(UserError, match=r"skip_layers names layer 5 \(allowed: 0 to 4\)"):
        config.skipped(5)


@pytest.mark.parametrize(
    ("boundary", "num_layers", "dense"),
    [
        (0, 4, set()),
        (1, 4, {0, 3}),
        (2, 6, {0, 1, 4, 5}),
        (3, 4, {0, 1, 2, 3}),
        (9, 4, {0, 1, 2, 3}),
    ],
)
def test_layers_at_both_ends_kept_dense(boundary, num_layers, dense):
    config = TurboQuantConfig(parse_pair("q8_0/q3_0"), boundary=boundary)
    assert config.skipped(num_layers) == dense
