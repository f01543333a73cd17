"""Fixtures shared by the tests of the engine."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from vllm import LLM

from tests.e2e import engine as e2e
from tests.tiny_models import save_checkpoint, save_tokenizer


@pytest.fixture(scope="session")
def reading_model(tmp_path_factory) -> Path:
    """A tiny Llama that reads characters: calibration needs a tokenizer."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 3, "intermediate_size": 96}
    folder = save_checkpoint(tmp_path_factory.mktemp("models") / "characters", **sizes)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def long_heads_model(tmp_path_factory) -> Path:
    """The same with heads of 128, whose compressed keys have levels."""
    folder = save_checkpoint(tmp_path_factory.mktemp("models") / "long_heads", head_dim=128)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def demo_engine(demo_model) -> Iterator[LLM]:
    """The demo model as it is served by default. Tests with it are a group of `tests/parallel.py`.

    What is in its prefix cache is what earlier tests have left there.
    """
    with e2e.engine(demo_model) as llm:
        yield llm
