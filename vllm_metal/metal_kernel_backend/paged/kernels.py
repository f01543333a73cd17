"""The kernels of pages as MLX launches them: names of buffers and bodies.

A body names the types of its kernel, declares threadgroup memory, and calls one function of the
kernel's header: with the buffers in the order in which they are declared here, those of constants
in one struct, the threadgroup memory and the place in the grid.
"""

from dataclasses import dataclass

import mlx.core as mx

from vllm_metal.metal_kernel_backend.kernel_library import Kernel

AFTER = "after"
"""The input of every kernel that touches pages which the kernel does not read: the token of an
earlier store, bound so that the GPU runs this kernel after it."""

PAGES = "pages"

BODY = """
{types}{structs}
{arrays}
  {function}(
      {arguments},
      threadgroup_position_in_grid, simdgroup_index_in_threadgroup, thread_index_in_simdgroup);
"""


@dataclass(frozen=True)
class PageKernels:
    """The kernels of one kind of pages."""

    store: Kernel
    decode: Kernel
    merge: Kernel
    read: Kernel
    """A run of tokens of one request to plain keys and values."""
    matrix_decode: Kernel | None = None
    """Decode by products of matrices, where the pages have that form."""

    def __iter__(self):
        kernels = self.store, self.decode, self.merge, self.read, self.matrix_decode
        return (kernel for kernel in kernels if kernel)


@dataclass(frozen=True)
class PageReader:
    """How decode reads pages, and what it makes of the sums of one split."""

    type: str
    constants: tuple[str, ...]
    """Inputs that are the members of the type's `Constants`."""
    output_type: str
    output_constants: tuple[str, ...]


@dataclass(frozen=True)
class LayerConstants:
    """What the kernels are told of one layer, beside its layout: nothing, unless a subclass has
    fields. Those are arrays, by the names that they have as inputs."""

    def inputs(self) -> dict[str, mx.array]:
        return vars(self)


@dataclass(frozen=True)
class KernelFamily:
    """What the kernels of one kind of pages have in common."""

    name: str
    """Of the folder in `kernels/`, and what the names of kernels begin with."""
    constants: tuple[tuple[str, str], ...]
    """As in `Kernel`."""
    layout: str
    """The type of the page layout, with its template arguments."""

    def kernel(
        self,
        name: str,
        header: str,
        function: str,
        inputs: tuple[str, ...],
        outputs: tuple[str, ...],
        arrays: tuple[tuple[str, str, str], ...] = (),
        types: tuple[tuple[str, str], ...] = (),
        structs: tuple[tuple[str, str, tuple[str, ...]], ...] = (),
    ) -> Kernel:
        """A kernel that calls `function`.

        Args:
            name: of the kernel.
            header: in the family's folder.
            function: with its template arguments, of which `Layout` may be one.
            inputs: in the order of the function's parameters; `AFTER`, where there, is not passed.
            outputs: likewise, behind the inputs.
            arrays: threadgroup memory, passed behind the outputs: (type, name, length) of each.
            types: (name, type) of further types that `function` and `arrays` name.
            structs: (name, type, members) of arguments that are structs of inputs, which are
                passed where `parameters` would follow the other inputs.
        """
        members = {member for _, _, names in structs for member in names}
        passed = [x for x in inputs if x != AFTER and x not in members]
        for argument, _, _ in structs:
            passed.insert(passed.index("parameters"), argument)
        aliases = ("Layout", self.layout), *types
        memory = [f"  threadgroup {kind} {array}[{size}];" for kind, array, size in arrays]
        body = BODY.format(
            types="\n".join(f"  using {alias} = {meant};" for alias, meant in aliases),
            structs="".join(
                f"\n  const {kind} {argument} = {{{', '.join(names)}}};"
                for argument, kind, names in structs
            ),
            arrays="\n".join(memory),
            function=function,
            arguments=", ".join([*passed, *outputs, *(array for _, array, _ in arrays)]),
        )
        return Kernel(
            f"{self.name}_{name}",
            f"{self.name}/{header}",
            self.constants,
            inputs,
            outputs,
            body,
            large_inputs=tuple(name for name in inputs if name == PAGES),
        )

    def decode(self, reader: "PageReader") -> Kernel:
        """Attention of query rows over the splits of their requests (`paged/decode.h`)."""
        memory = ("uint4", "query_rows", "QUERY_MEMORY"), ("float", "scratch", "SCRATCH")
        form = "Decode<Reader, Output, G, Q, R, TOKENS, SIMDGROUPS, SOFTCAP, SINKS>"
        return self._decode("decode", "reader.h", form, reader, memory)

    def matrix_decode(self, reader: "PageReader") -> Kernel:
        """The same by products of matrices (`paged/matrix.h`); `reader` is one of fragments."""
        form = "MatrixDecode<Reader, Output, G, Q, R, SIMDGROUPS, SOFTCAP, SINKS>"
        memory = (("uint4", "memory", "MEMORY"),)
        return self._decode("matrix_decode", "matrix_reader.h", form, reader, memory)

    def _decode(
        self,
        name: str,
        header: str,
        form: str,
        reader: "PageReader",
        memory: tuple[tuple[str, str, str], ...],
    ) -> Kernel:
        constants = dict.fromkeys((*reader.constants, *reader.output_constants))
        inputs = PAGES, "queries", "block_table", "seq_lens", "sinks", *constants
        return self.kernel(
            name,
            header,
            "Attention::run",
            (*inputs, "parameters", AFTER),
            ("partials", "states", "output"),
            tuple((kind, array, f"Attention::{size}") for kind, array, size in memory),
            (("Reader", reader.type), ("Output", reader.output_type), ("Attention", form)),
            (
                ("constants", "typename Reader::Constants", reader.constants),
                ("output_constants", "typename Output::Constants", reader.output_constants),
            ),
        )

    def merge(self, output: str, constants: tuple[str, ...]) -> Kernel:
        """The splits of a query row to its output (`paged/merge.h`).

        Args:
            output: its type.
            constants: inputs that are the members of `Output::Constants`.
        """
        return self.kernel(
            "merge",
            "output.h",
            "merge_splits<Output, G, Q, SIMDGROUPS, SINKS>",
            ("partials", "states", "queries", "seq_lens", "sinks", *constants, "parameters"),
            ("output",),
            (("float", "scratch", "Merge<Output, G, Q, SIMDGROUPS>::SCRATCH"),),
            (("Output", output),),
            (("constants", "typename Output::Constants", constants),),
        )
