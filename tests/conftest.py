"""Fixtures shared by all tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from vllm_metal.demo_model import fetch_demo_model


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """Folder of SmolLM2-135M-Instruct in float32, converted on the first use (about 10 s)."""
    return fetch_demo_model()
