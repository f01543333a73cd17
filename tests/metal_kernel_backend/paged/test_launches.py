"""What a launch hands to its target: inputs, template, grid and outputs."""

import mlx.core as mx

from vllm_metal.metal_kernel_backend.kernel_library import SIMD_SIZE, Kernel, Target
from vllm_metal.metal_kernel_backend.paged.launches import Launches


def kernel(name: str, *inputs: str) -> Kernel:
    return Kernel(name, "", (), inputs, ("token", "sums"), "")


class Recorder(Target):
    """Builds kernels that return what they are given."""

    name = "recorder"

    def __init__(self):
        self.built = []

    def build(self, kernel, resident=None):
        self.built.append((kernel.name, resident))
        return lambda **arguments: arguments


def launch(launches: Launches, kernel: Kernel, resident: int = 0) -> dict:
    outputs = {"sums": ((2, 3), mx.float32), "token": ((8,), mx.uint32)}
    own, inputs = {"centre": mx.array([1])}, {"keys": mx.array([2])}
    return launches.launch(kernel, own, inputs, {"G": 4}, 2, (5, 6, 7), outputs, resident)


def launches(target: Target, **known: mx.array) -> Launches:
    return Launches(target, [("BLOCK_SIZE", 16)], known)


def test_what_the_target_gets():
    book, unused = mx.array([3]), mx.array([4])
    given = launch(
        launches(Recorder(), book=book, unused=unused), kernel("store", "keys", "book", "centre")
    )
    assert [int(array.item()) for array in given["inputs"]] == [2, 3, 1]
    assert given["template"] == [("BLOCK_SIZE", 16), ("G", 4), ("SIMDGROUPS", 2)]
    assert given["threadgroup"] == (2 * SIMD_SIZE, 1, 1)
    assert given["grid"] == (5 * 2 * SIMD_SIZE, 6, 7)
    assert given["output_shapes"] == [(8,), (2, 3)]
    assert given["output_dtypes"] == [mx.uint32, mx.float32]


def test_a_kernel_is_built_once_for_each_bound_on_registers():
    target = Recorder()
    several = launches(target)
    for resident in (0, 0, 3, 3):
        launch(several, kernel("decode", "keys", "centre"), resident)
    launch(several, kernel("merge", "keys", "centre"))
    threads = 2 * SIMD_SIZE
    assert target.built == [("decode", None), ("decode", (threads, 3)), ("merge", None)]
