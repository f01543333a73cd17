"""The language model of a checkpoint with a vision part, in its config and its weights.

A real checkpoint also has the settings of an image processor. None of them is read, so none of the
packages that images need must be there.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForImageTextToText

from tests import transformers_checkpoints
from tests.e2e import engine as e2e
from tests.tiny_models import VOCABULARY, save_tokenizer

pytestmark = pytest.mark.engine

PROMPTS = [[(7 * i + 3 * j) % (VOCABULARY - 1) for i in range(n)] for j, n in enumerate((5, 40))]

KINDS = [
    "qwen3_vl",
    pytest.param("gemma3", marks=pytest.mark.nightly),
    pytest.param("mistral3", marks=pytest.mark.nightly),
]

IMAGE = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9"
    "awAAAABJRU5ErkJggg=="
)
"""One pixel."""


def transformers_tokens(folder: Path, prompt: list[int]) -> list[int]:
    """What transformers' own model generates greedily.

    mlx-lm's does not know the settings of RoPE as transformers 5 writes them (`rope_parameters`).
    """
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    tokens = list(prompt)
    with torch.inference_mode():
        for _ in range(e2e.NEW_TOKENS):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.fixture(params=KINDS)
def checkpoint_with_images(request, tmp_path):
    folder = transformers_checkpoints.save(tmp_path / "model", request.param)
    save_tokenizer(folder)
    processor = {"image_processor_type": "SomeImageProcessor", "processor_class": "SomeProcessor"}
    for name in ("preprocessor_config.json", "processor_config.json"):
        (folder / name).write_text(json.dumps(processor))
    return folder


def test_text_is_answered_as_by_transformers_and_an_image_is_refused(checkpoint_with_images):
    with safe_open(checkpoint_with_images / "model.safetensors", "np") as weights:
        assert any("vis" in name for name in weights.keys())
    expected = [transformers_tokens(checkpoint_with_images, prompt) for prompt in PROMPTS]
    with e2e.engine(checkpoint_with_images, max_model_len=64) as llm:
        assert e2e.generate(llm, PROMPTS) == expected
        image = {"type": "image_url", "image_url": {"url": IMAGE}}
        with pytest.raises(ValueError, match="not a multimodal model"):
            llm.chat([{"role": "user", "content": [image]}], chat_template="{{ messages }}")
        assert e2e.generate(llm, PROMPTS) == expected
