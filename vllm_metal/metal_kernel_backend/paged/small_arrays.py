"""Small arrays of a launch: long enough that a kernel has one variant.

MLX passes arrays of fewer than 8 elements to a Metal kernel in the constant address space and
others in the device address space, which gives kernels of two names. One more request, or one more
block, would make another kernel of a launch, and compile it while requests wait.
"""

import mlx.core as mx

CONSTANT_BELOW = 8
"""Elements from which on MLX passes an array in the device address space."""


def lengthened(array: mx.array, filler: int) -> mx.array:
    """The array with rows of `filler` behind it, where it has fewer than `CONSTANT_BELOW` elements.

    The launchers lengthen what they are given. A caller with an array for many layers does it once
    for all of them.
    """
    row = array.size // array.shape[0]
    missing = -(-CONSTANT_BELOW // row) - array.shape[0]
    if missing <= 0:
        return array
    return mx.concatenate([array, mx.full((missing, *array.shape[1:]), filler, array.dtype)])
