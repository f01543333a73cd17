"""Errors that a user can act on, shown without a stack.

A wrong setting, an unservable model or too little memory is the user's to mend, so the message is
the whole output. Python's hook and vLLM's start-up logger print a stack for every exception; for
a `UserError` they print the message alone. Any other exception keeps its stack.
"""

import logging
import os
import sys
from collections.abc import Sequence
from types import TracebackType


class UserError(RuntimeError):
    """Something the user can mend.

    Args:
        summary: one sentence without a full stop.
        reasons: what is wrong and what is allowed, one line each.

    Not a `ValueError`: pydantic would wrap that into a report of vLLM's whole configuration.
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


class _WithoutStack(logging.Filter):
    """Drops the stack from log records whose exception is a `UserError`."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.exc_info and isinstance(record.exc_info[1], UserError):
            record.msg, record.args = str(record.exc_info[1]), None
            record.exc_info = record.exc_text = None
        return True


def show_user_errors_without_stack() -> None:
    """Installs the display above in this process. Called once, by `register()`."""
    if getattr(sys.excepthook, "shows_user_errors", False):
        return
    logging.getLogger("vllm.v1.engine.core").addFilter(_WithoutStack())
    is_vllm_command = os.path.basename(sys.argv[0] if sys.argv else "") == "vllm"
    previous = sys.excepthook

    def excepthook(
        kind: type[BaseException], error: BaseException, stack: TracebackType | None
    ) -> None:
        failed_in_child = is_vllm_command and "Engine core initialization failed" in str(error)
        if isinstance(error, UserError) or failed_in_child:
            print(error, file=sys.stderr)
        else:
            previous(kind, error, stack)

    excepthook.shows_user_errors = True
    sys.excepthook = excepthook
