"""Constants of the keys and the loss of the formats: measured once, kept, and judged each time."""

import pytest

from tests.tiny_models import tiny_model
from vllm_metal.config import parse
from vllm_metal.errors import UserError
from vllm_metal.metal_kernel_backend.turboquant.calibration import TEXT, KeyConstants
from vllm_metal.model.model_binding import ModelBinding
from vllm_metal.startup import compression, loss_check
from vllm_metal.startup.compression import check_loss, key_constants
from vllm_metal.startup.loss_check import CompressionLoss
from vllm_metal.startup.result_cache import ResultCache

BEGINNING = [91, 92]


def encode(text: str, *, add_special_tokens: bool = True) -> list[int]:
    tokens = [ord(character) % 90 for character in text]
    return [*BEGINNING, *tokens] if add_special_tokens else tokens


@pytest.fixture(scope="module")
def binding() -> ModelBinding:
    return ModelBinding(tiny_model("llama", head_dim=64))


def test_constants_are_measured_once(binding, tmp_path, monkeypatch):
    first = key_constants(binding, encode, 128, ResultCache(tmp_path, {}))
    monkeypatch.setattr(compression, "calibrate", lambda *_: pytest.fail("measured again"))
    results = ResultCache(tmp_path, {})
    again = key_constants(binding, encode, 128, results)
    assert results.read == ["key_constants"]
    for a, b in zip(first, again, strict=True):
        assert a.centre.tobytes() == b.centre.tobytes()
        assert a.multiplier.tobytes() == b.multiplier.tobytes()


def test_the_calibration_reads_the_text_behind_the_beginning(binding, monkeypatch):
    asked = []
    monkeypatch.setattr(compression, "calibrate", lambda _, *texts: asked.append(texts) or [])
    key_constants(binding, encode, 128, ResultCache(None, {}))
    assert asked == [(BEGINNING, encode(TEXT, add_special_tokens=False), 128)]


def test_a_loss_is_measured_once_and_judged_each_time(binding, tmp_path, monkeypatch, make_config):
    """On pages that read all that they are asked for compressed."""
    asked = []

    def measure(_, dense, compressed, token_ids):
        asked.append((dense, compressed, token_ids))
        return CompressionLoss(0.75, 0.5, len(token_ids))

    monkeypatch.setattr(loss_check, "measure_loss", measure)
    shapes = [(layer.num_kv_heads, layer.head_size) for layer in binding.layers]
    constants = [KeyConstants.neutral(*shape) for shape in shapes]

    def start(**more) -> None:
        turboquant = parse({"preset": "k4v3", "skip_layers": [0], **more}, "auto")
        results = ResultCache(tmp_path, {})
        check_loss(make_config(), binding, encode, constants, turboquant, results)

    for _ in range(2):
        with pytest.raises(UserError, match="TurboQuant q4_0/q3_0 changes what this model says"):
            start()
    start(allow_lossy=True)
    [(dense, compressed, token_ids)] = asked
    assert [backend.compressed for backend in dense] == [False] * len(shapes)
    assert [backend.compressed for backend in compressed] == [False] + [True] * (len(shapes) - 1)
    assert compressed[-1].reproducible
    assert token_ids == encode(TEXT)[:128]  # as many as the server allows
