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
