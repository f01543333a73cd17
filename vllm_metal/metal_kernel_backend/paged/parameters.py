"""The numbers of a launch, as a struct that Python and Metal have by the same names.

A launch passes them in a small array of 32-bit words. Both the array and the struct's declaration
in `kernels/paged/constants.h` are made from the fields written here.
"""

from dataclasses import dataclass
from functools import lru_cache

import mlx.core as mx
import numpy as np

from vllm_metal.metal_kernel_backend.paged.small_arrays import CONSTANT_BELOW

NUMPY_TYPES = {"int": np.int32, "float": np.float32}
"""By the type's name in Metal."""


MAX_MEMBERS = CONSTANT_BELOW - 1
"""So many words lie in the constant address space, where all threads read a parameter at the cost
of one."""


@dataclass(frozen=True)
class Parameters:
    """A struct of 32-bit numbers. Raises ValueError for more than `MAX_MEMBERS`."""

    name: str
    fields: tuple[tuple[str, str], ...]
    """(type, name) of each member; the types are those of `NUMPY_TYPES`."""

    def __post_init__(self) -> None:
        if len(self.fields) > MAX_MEMBERS:
            raise ValueError(f"{self.name} has {len(self.fields)} members, over {MAX_MEMBERS}")

    def declaration(self) -> str:
        """The struct in Metal's language."""
        members = "".join(f"  {kind} {name};\n" for kind, name in self.fields)
        return f"struct {self.name} {{\n{members}}};\n"

    def array(self, **values: int | float) -> mx.array:
        """The struct's words, int32 [members]. The last few hundred are kept.

        Raises ValueError, with the names, where a member is missing or superfluous.
        """
        names = [name for _, name in self.fields]
        if values.keys() != set(names):
            raise ValueError(f"{self.name} has {names}; given: {list(values)}")
        return _words(self, tuple(values[name] for name in names))


@lru_cache(maxsize=256)
def _words(parameters: Parameters, values: tuple[int | float, ...]) -> mx.array:
    words = [
        np.array(value, NUMPY_TYPES[kind]).view(np.int32)
        for (kind, _), value in zip(parameters.fields, values, strict=True)
    ]
    return mx.array(np.array(words))


STORE = Parameters("StoreParameters", (("int", "num_tokens"),))

DECODE = Parameters(
    "DecodeParameters",
    (
        ("int", "split_tokens"),  # tokens of a split
        ("int", "num_splits"),  # splits of a request for which there is room
        ("int", "window"),  # tokens that a query sees, itself included; 0: all
        ("int", "max_blocks"),  # row length of the block table
        ("float", "scale"),  # of the scores
        ("float", "softcap"),  # 0: none
    ),
)
"""Of decode and of merge."""

READ = Parameters(
    "ReadParameters",
    (("int", "first_token"), ("int", "num_tokens"), ("int", "first_head")),
)
"""Of the kernel that reads a run of a request's tokens."""
