"""Errors that a user can correct, shown without a stack trace.

A wrong setting, a model that cannot be served and too little memory are corrected outside the
program, so the message is the whole output. Every other exception keeps its stack trace.
"""

import contextlib
import logging
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from types import TracebackType

ENGINE_FAILED = "Engine core initialization failed"
"""How vLLM's report begins that an engine process failed; it has no class of its own."""


class UserError(RuntimeError):
    """An error that the user can correct.

    It is not a `ValueError`, which pydantic would wrap into a report of vLLM's whole configuration.

    Args:
        summary: one sentence without a full stop.
        reasons: what is wrong and what is allowed, one line each.
    """

    def __init__(self, summary: str, reasons: Sequence[str] = ()):
        self.summary = summary
        self.reasons = list(reasons)
        lines = "".join(f"\n  - {reason}" for reason in self.reasons)
        super().__init__(f"vllm_metal: {summary}" + (f":{lines}" if self.reasons else "."))

    def __reduce__(self):
        return type(self), self._arguments()

    def _arguments(self) -> tuple:
        return self.summary, self.reasons


class ChangedLibraryError(UserError):
    """A library has changed what this package replaces in it at run time.

    Args:
        library: the name under which pip knows it.
        name: dotted name of what is replaced.
        change: how it differs from what this package knows.
    """

    def __init__(self, library: str, name: str, change: str):
        self._given = library, name, change
        super().__init__(
            f"{library} {version(library)} has changed {name}, which this package replaces",
            [change, f"install a version of {library} that this version of vllm-metal supports"],
        )

    def _arguments(self) -> tuple:
        return self._given


@contextlib.contextmanager
def user_errors_end_child_process() -> Iterator[None]:
    """In an engine process, a `UserError` within the block is logged and ends the process.

    Python prints the stack trace of every other exception that ends a child process. In the user's
    own process the error is raised as usual.
    """
    try:
        yield
    except UserError as error:
        if multiprocessing.parent_process() is None:
            raise
        logging.getLogger("vllm.metal").error(str(error))
        raise SystemExit(1) from None


class _Excepthook:
    """Prints a `UserError` as its message alone, and hands everything else to the hook before it.

    In the `vllm` command, vLLM's report that an engine process failed is also printed as its
    message, since that process has said why.
    """

    def __init__(self, previous: Callable[..., object]):
        self._previous = previous
        self._is_vllm_command = os.path.basename(sys.argv[0] if sys.argv else "") == "vllm"

    def __call__(
        self, kind: type[BaseException], error: BaseException, stack: TracebackType | None
    ) -> None:
        failed_in_child = ENGINE_FAILED in str(error)
        if isinstance(error, UserError) or (self._is_vllm_command and failed_in_child):
            print(error, file=sys.stderr)
        else:
            self._previous(kind, error, stack)


def show_user_errors_without_stack() -> None:
    """Installs an exception hook that prints a `UserError` as its message alone.

    A second call does nothing.
    """
    # patch: Python's hook for exceptions that nobody catches
    if not isinstance(sys.excepthook, _Excepthook):
        sys.excepthook = _Excepthook(sys.excepthook)
