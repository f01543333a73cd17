"""Garbage collections that cost what a test makes, not what the session has imported."""

import gc

MANY = 50_000
"""Objects that are too many to be looked through in every collection."""

_freeze, _unfreeze = gc.freeze, gc.unfreeze


def leave_out_imports() -> None:
    """Leaves the objects that exist out of later collections, if they are many.

    A worker collects garbage twice as it starts, to measure memory. With vLLM, transformers and
    thousands of collected tests in the process, each of these would take longer than a small
    model takes to answer.

    vLLM freezes the heap when an engine has started, and takes everything in again when it ends.
    Here neither has an effect, so that the imports stay out and an engine never is.
    """
    gc.freeze = gc.unfreeze = lambda: None
    if len(gc.get_objects()) > MANY:
        gc.collect()
        _freeze()


def take_imports_in() -> None:
    """Undoes `leave_out_imports`: at exit libraries complain about objects that remain."""
    gc.freeze, gc.unfreeze = _freeze, _unfreeze
    gc.unfreeze()
