"""How vLLM starts its engine process: as a new interpreter, or as a fork of this one.

`VLLM_WORKER_MULTIPROC_METHOD` decides. A new interpreter (`spawn`, which `register` sets) is safe
everywhere, and imports vLLM, torch and transformers a second time. A fork has them already, but
MLX hangs in a fork of a process in which it has evaluated anything. So whoever asks for `fork` gets
it on Linux, in a process that has not imported MLX; what this package asks MLX before the engine
starts is then asked in a fork, too, which ends with the answer.
"""

import logging
import multiprocessing
import os
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import TypeVar

METHOD_VARIABLE = "VLLM_WORKER_MULTIPROC_METHOD"

logger = logging.getLogger("vllm.metal.engine_process")

_Result = TypeVar("_Result")


def keeps_mlx_out() -> bool:
    """Whether the engine will be a fork of this process, which must not import MLX before.

    Sets `spawn` and logs a warning where `fork` is asked for and would hang.
    """
    if os.environ.get(METHOD_VARIABLE) != "fork" or multiprocessing.parent_process() is not None:
        return False
    if sys.platform != "linux":
        reason = "macOS does not support forks of a process that has used Metal"
    elif "mlx.core" in sys.modules:
        reason = "this process has imported MLX, which may hang in a fork"
    else:
        return True
    os.environ[METHOD_VARIABLE] = "spawn"
    logger.warning("%s=fork is not used, but spawn: %s", METHOD_VARIABLE, reason)
    return False


def ask(question: Callable[[], _Result]) -> _Result:
    """What `question` returns, asked in a fork where MLX is to be kept out of this process.

    Its result, or the exception that it raises, must be picklable.

    Raises:
        RuntimeError: the fork ended without an answer.
    """
    if not keeps_mlx_out():
        return question()
    fork = multiprocessing.get_context("fork")
    receiver, sender = fork.Pipe(duplex=False)
    process = fork.Process(target=_answer, args=(question, sender))
    process.start()
    sender.close()
    try:
        result, error = receiver.recv()
    except EOFError:
        process.join()
        raise RuntimeError(
            f"the process that asked MLX about the model ended with {process.exitcode}"
        ) from None
    process.join()
    if error is not None:
        raise error
    return result


def _answer(question: Callable[[], _Result], sender: Connection) -> None:
    try:
        answer = question()
    except Exception as error:
        sender.send((None, error))
    else:
        sender.send((answer, None))
