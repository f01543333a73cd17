"""The kernels of pages as MLX launches them: names of buffers and bodies.

A body names the types of its kernel, declares threadgroup memory, and calls one function of the
kernel's header: with the buffers in the order in which they are declared here, those of constants
in one struct, the threadgroup memory and the place in the grid.
"""

from dataclasses import dataclass

from vllm_metal.metal_kernel_backend.kernel_library import Kernel

AFTER = "after"
"""The input of every kernel that touches pages which the kernel does not read: the token of an
earlier store, bound so that the GPU runs this kernel after it."""

PAGES = "pages"

BODY = """
{types}{struct}
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
        struct: tuple[str, tuple[str, ...]] | None = None,
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
            struct: type of the constants, and inputs that are its members: they are passed as one
                argument, where `parameters` would follow the other inputs.
        """
        type_of_struct, members = struct or ("", ())
        passed = [name for name in inputs if name != AFTER and name not in members]
        if struct:
            passed.insert(passed.index("parameters"), "constants")
        aliases = ("Layout", self.layout), *types
        memory = [f"  threadgroup {kind} {array}[{size}];" for kind, array, size in arrays]
        passed_struct = f"\n  const {type_of_struct} constants = {{{', '.join(members)}}};"
        body = BODY.format(
            types="\n".join(f"  using {alias} = {meant};" for alias, meant in aliases),
            struct=passed_struct if struct else "",
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

    def decode(self, reader: str, constants: tuple[str, ...]) -> Kernel:
        """Attention of query rows over the splits of their requests (`paged/decode.h`).

        Args:
            reader: its type.
            constants: inputs that are the members of `Reader::Constants`.
        """
        attention = "Attention"
        return self.kernel(
            "decode",
            "reader.h",
            f"{attention}::run",
            (PAGES, "queries", "block_table", "seq_lens", *constants, "parameters", AFTER),
            ("partials", "states"),
            (
                ("uint4", "query_rows", f"{attention}::QUERY_MEMORY"),
                ("float", "scratch", f"{attention}::SCRATCH"),
            ),
            (
                ("Reader", reader),
                (attention, "Decode<Reader, G, Q, R, TOKENS, SIMDGROUPS, SOFTCAP>"),
            ),
            ("typename Reader::Constants", constants),
        )

    def matrix_decode(self, reader: str, constants: tuple[str, ...]) -> Kernel:
        """The same by products of matrices (`paged/matrix.h`); `reader` is one of fragments."""
        attention = "Attention"
        return self.kernel(
            "matrix_decode",
            "matrix_reader.h",
            f"{attention}::run",
            (PAGES, "queries", "block_table", "seq_lens", *constants, "parameters", AFTER),
            ("partials", "states"),
            (("uint4", "memory", f"{attention}::MEMORY"),),
            (
                ("Reader", reader),
                (attention, "MatrixDecode<Reader, G, Q, R, SIMDGROUPS, SOFTCAP>"),
            ),
            ("typename Reader::Constants", constants),
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
            ("typename Output::Constants", constants),
        )
