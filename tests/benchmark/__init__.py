"""Tests of `vllm_metal/benchmark`."""
