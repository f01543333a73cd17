"""Speed of the engine in two checkouts of this repository, side by side in one run.

    python benchmarks/checkouts.py OTHER [--rounds 6] [--model FOLDER] [--output FILE]

OTHER is the folder of another checkout (`git worktree add OTHER COMMIT`). Each checkout has an
engine in a process of its own. They take turns, and the order of the two changes from round to
round, so that a busy machine slows both; a figure is the median of the rounds' ratios, this
checkout over the other, and more than 1 means that this checkout is faster.

    decode, batch 1    tokens/s once the prompt has its first token
    decode, batch 8    the same with 8 requests
    prefill            tokens/s of a prompt of 512 tokens, time to its first token

Dense KV cache, weights in float32, as in serving.py. Nothing is asked of a checkout but vLLM's own
interface, so that its layout does not matter.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parent.parent
CASES = "decode, batch 1", "decode, batch 8", "prefill"


def serve(model: str) -> None:
    """Reads names of cases from stdin, and answers each with its speed, in tokens per second."""
    from stepped_engine import NEW_TOKENS, PREFILL_LEN, PROMPT_LEN, Engine, decode_rate

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what vLLM prints is no answer
    engine = Engine(model)

    def prompt(length: int, row: int = 0) -> list[int]:
        return [(37 * i + 11 * row) % 20000 + 100 for i in range(length)]

    def decode(requests: int) -> float:
        prompts = [prompt(PROMPT_LEN, row) for row in range(requests)]
        return decode_rate(engine.run(prompts, NEW_TOKENS), requests)

    def prefill() -> float:
        return PREFILL_LEN / engine.run([prompt(PREFILL_LEN)], 1)[0][0]

    speeds = dict(zip(CASES, (partial(decode, 1), partial(decode, 8), prefill), strict=True))
    for speed in speeds.values():
        speed()
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        print(speeds[line.strip()](), file=answers, flush=True)


class Checkout:
    """The engine of one checkout."""

    def __init__(self, root: Path, model: str):
        environment = os.environ | {
            "PYTHONPATH": str(root),
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_LOGGING_LEVEL": "WARNING",
        }
        command = [sys.executable, __file__, str(root), "--serve", "--model", model]
        self.process = subprocess.Popen(
            command,
            cwd=root,
            env=environment,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self.commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"],
            cwd=root,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        self._answer()

    def _answer(self) -> str:
        assert self.process.stdout
        if not (line := self.process.stdout.readline()):
            raise RuntimeError(f"The engine of {self.commit} ended")
        return line.strip()

    def speed(self, case: str) -> float:
        assert self.process.stdin
        print(case, file=self.process.stdin, flush=True)
        return float(self._answer())

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait(60)


def compared(this: Checkout, other: Checkout, rounds: int) -> dict:
    """For each case the speeds of both, and the ratios of all rounds."""
    speeds: dict[str, list[tuple[float, float]]] = {case: [] for case in CASES}
    for number in range(rounds):
        for case, pairs in speeds.items():
            if number % 2:
                second = other.speed(case)
                first = this.speed(case)
            else:
                first = this.speed(case)
                second = other.speed(case)
            pairs.append((first, second))
            print(f"{case}: {first:.2f} {second:.2f} {first / second:.3f}", file=sys.stderr)
    return {
        case: {
            "this_tokens_per_s": round(statistics.median(a for a, _ in pairs), 2),
            "other_tokens_per_s": round(statistics.median(b for _, b in pairs), 2),
            "ratio": round(statistics.median(a / b for a, b in pairs), 3),
            "ratios_by_round": [round(a / b, 3) for a, b in pairs],
        }
        for case, pairs in speeds.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("other", type=Path, metavar="OTHER")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--model", metavar="FOLDER", help="default: the demo model")
    parser.add_argument("--output", type=Path, metavar="FILE")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve(args.model)

    from vllm_metal.commands.demo_model import fetch_demo_model
    from vllm_metal.machine.provenance import provenance

    model = args.model or str(fetch_demo_model())
    this, other = Checkout(ROOT, model), Checkout(args.other.resolve(), model)
    result = provenance("mlx", "mlx-lm", "vllm") | {
        "commit": this.commit,
        "other_commit": other.commit,
        "ratios": compared(this, other, args.rounds),
    }
    this.close()
    other.close()
    text = json.dumps(result, indent=2) + "\n"
    print(text)
    if args.output:
        args.output.write_text(text)


if __name__ == "__main__":
    main()
