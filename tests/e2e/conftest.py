"""Fixtures shared by the tests of the engine."""

from pathlib import Path

import pytest

from tests.tiny_models import save_checkpoint, save_tokenizer


@pytest.fixture(scope="session")
def reading_model(tmp_path_factory) -> Path:
    """A tiny Llama that reads characters: calibration needs a tokenizer."""
    folder = save_checkpoint(tmp_path_factory.mktemp("models") / "characters")
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def long_heads_model(tmp_path_factory) -> Path:
    """The same with heads of 128, whose compressed keys have levels."""
    folder = save_checkpoint(tmp_path_factory.mktemp("models") / "long_heads", head_dim=128)
    save_tokenizer(folder)
    return folder
