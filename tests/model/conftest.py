"""Fixtures of the tests of mlx-lm's side."""

import pytest
from transformers import DeepseekV3Config


@pytest.fixture(autouse=True)
def type_of_deepseek_v3(monkeypatch) -> None:
    """vLLM reads DeepSeek-V3.2 with transformers' class of V3, and leaves the new type in it."""
    monkeypatch.setattr(DeepseekV3Config, "model_type", "deepseek_v3")
