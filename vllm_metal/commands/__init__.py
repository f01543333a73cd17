"""Subcommands of `vllm-metal` that start no server."""
