"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests import garbage, parallel
from vllm_metal.machine.blas import load_fast_blas
from vllm_metal.machine.cache_folder import STARTUP_CACHE_VARIABLE

parallel.prepare_process()
load_fast_blas()  # before any test module imports MLX
os.environ[STARTUP_CACHE_VARIABLE] = "off"  # a test measures; those of the cache switch it on

from vllm_metal.commands.demo_model import fetch_demo_model  # noqa: E402

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    parallel.group_by_module(items)


def pytest_collection_finish() -> None:
    garbage.leave_out_imports()


def pytest_sessionfinish() -> None:
    garbage.take_imports_in()
    parallel.finish_process()


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """Folder of SmolLM2-135M-Instruct in float32, converted on the first use (about 10 s)."""
    return fetch_demo_model()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    """Folder of a tiny random Llama without a tokenizer."""
    from tests.tiny_models import save_checkpoint

    return save_checkpoint(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture
def make_config(checkpoint) -> Callable[..., VllmConfig]:
    """Gives vLLM's own configuration for the tiny Llama; takes `LLM`'s arguments."""

    def make(**settings) -> VllmConfig:
        from vllm.engine.arg_utils import EngineArgs

        defaults = {
            "model": str(checkpoint),
            "skip_tokenizer_init": True,
            "dtype": "float32",
            "max_model_len": 128,
            "max_num_seqs": 8,
            "max_num_batched_tokens": 256,
            "kv_cache_memory_bytes": 4 << 20,
        }
        config = EngineArgs(**(defaults | settings)).create_engine_config()
        garbage.leave_out_imports()
        return config

    return make
