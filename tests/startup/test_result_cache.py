"""What is kept on disk comes back bit for bit, or is measured anew."""

import json
import math
import multiprocessing
import os
import stat
from pathlib import Path

import numpy as np
import pytest

from vllm_metal.kv_cache.workspace import ForwardPeaks
from vllm_metal.metal_kernel_backend.turboquant.calibration import KeyConstants
from vllm_metal.startup import result_cache
from vllm_metal.startup.decode_probe import Answer, DecodeAnswers
from vllm_metal.startup.loss_check import CompressionLoss
from vllm_metal.startup.result_cache import (
    COMPRESSION_LOSS,
    DECODE_ANSWERS,
    FORWARD_PEAKS,
    KEY_CONSTANTS,
    MOST_FILES,
    ResultCache,
)

SERVER = {"model": {"files": {"a": [1, 2]}}, "dtype": "float16"}
RESULT = {"max_model_len": 128}


def key_constants(seed: int = 0) -> list[KeyConstants]:
    """Three layers of two shapes, with values that only a copy of every bit gives back."""
    rng = np.random.default_rng(seed)
    shapes = [(2, 64), (2, 64), (1, 32)]
    layers = [rng.standard_normal((2, *shape)).astype(np.float32) for shape in shapes]
    layers[0][0, 0, :2] = [np.nextafter(np.float32(0), np.float32(1)), -0.0]
    return [KeyConstants(centre, multiplier) for centre, multiplier in layers]


PEAKS = (
    ForwardPeaks({32: 1 << 40, 128: 7}, {(4, 1024): 1, (4, 2048): 2, (16, 1024): 3, (16, 2048): 4}),
    ForwardPeaks({1: 0}, {(1, 1): 12345678901}),
)


def unwanted():
    raise AssertionError("measured although it was kept")


def get(folder, measure=unwanted, server=SERVER, result=RESULT) -> list[KeyConstants]:
    return ResultCache(folder, server).get(KEY_CONSTANTS, result, measure)


def as_bytes(constants) -> list[tuple[bytes, bytes]]:
    return [(layer.centre.tobytes(), layer.multiplier.tobytes()) for layer in constants]


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "vllm_metal" / "startup"


@pytest.fixture
def said(monkeypatch) -> list[str]:
    """Warnings as they come."""
    messages: list[str] = []
    monkeypatch.setattr(
        result_cache.logger, "warning", lambda text, *args: messages.append(text % args)
    )
    return messages


def test_answers_come_back(folder):
    answers = DecodeAnswers(Answer(True), Answer(False, "a reason"))
    ResultCache(folder, SERVER).get(DECODE_ANSWERS, {}, lambda: answers)
    assert ResultCache(folder, SERVER).get(DECODE_ANSWERS, {}, unwanted) == answers


def test_constants_come_back_bit_for_bit(folder, said):
    measured = key_constants()
    assert get(folder, lambda: measured) is measured
    cache = ResultCache(folder, SERVER)
    found = cache.get(KEY_CONSTANTS, RESULT, unwanted)
    assert as_bytes(found) == as_bytes(measured)
    assert [(c.centre.dtype, c.centre.shape) for c in found] == [
        (np.float32, c.centre.shape) for c in measured
    ]
    assert cache.read == ["key_constants"] and said == []


def test_peaks_come_back(folder):
    ResultCache(folder, SERVER).get(FORWARD_PEAKS, {}, lambda: PEAKS)
    found = ResultCache(folder, SERVER).get(FORWARD_PEAKS, {}, unwanted)
    assert found == PEAKS
    assert found[0].of(200, 3000) == PEAKS[0].of(200, 3000)


@pytest.mark.parametrize(
    ("server", "result"),
    [
        ({**SERVER, "dtype": "float32"}, RESULT),
        ({**SERVER, "model": {"files": {"a": [1, 3]}}}, RESULT),
        (SERVER, {"max_model_len": 129}),
        (SERVER, {}),
    ],
)
def test_another_dependency_is_another_result(folder, server, result):
    get(folder, key_constants)
    other = key_constants(1)
    assert get(folder, lambda: other, server, result) is other
    assert as_bytes(get(folder)) == as_bytes(key_constants())


def test_kinds_do_not_meet(folder):
    cache = ResultCache(folder, SERVER)
    cache.get(KEY_CONSTANTS, RESULT, key_constants)
    assert cache.get(FORWARD_PEAKS, RESULT, lambda: PEAKS) is PEAKS


def flip_last_byte(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


def of_another(data: bytes) -> bytes:
    """The file of a result that depends on something else, under this one's name."""
    header, _, payload = data.partition(b"\n")
    changed = json.loads(header)
    changed["depends_on"]["dtype"] = "float32"
    return json.dumps(changed).encode() + b"\n" + payload


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (flip_last_byte, "its checksum is wrong"),
        (lambda data: data[:-100], "its checksum is wrong"),
        (lambda data: data.partition(b"\n")[0], "its checksum is wrong"),
        (lambda data: b"", "its header is damaged"),
        (lambda data: b"\xff" + data, "its header is damaged"),
        (lambda data: b"[1]\n" + data, "it was written for something else"),
        (of_another, "it was written for something else"),
    ],
    ids=["flipped", "cut", "header alone", "empty", "no text", "foreign", "of another"],
)
def test_a_damaged_file_is_measured_anew_and_replaced(folder, said, damage, reason):
    get(folder, key_constants)
    [path] = folder.iterdir()
    path.write_bytes(damage(path.read_bytes()))
    other = key_constants(1)
    assert get(folder, lambda: other) is other
    assert said == [f"key_constants is measured anew: {path}: {reason}"]
    assert as_bytes(get(folder)) == as_bytes(other)
    assert len(said) == 1


def test_a_payload_of_another_form_is_measured_anew(folder, said):
    """Its header is right: the file was written by a program that had forgotten the schema."""
    get(folder, key_constants)
    [path] = folder.iterdir()
    header = json.loads(path.read_bytes().partition(b"\n")[0])
    result_cache._write(path, header["kind"], header["depends_on"], b"not an archive")
    assert as_bytes(get(folder, key_constants)) == as_bytes(key_constants())
    assert len(said) == 1 and "key_constants is measured anew" in said[0]


def test_pickles_are_not_loaded(folder, said):
    get(folder, key_constants)
    [path] = folder.iterdir()
    header = json.loads(path.read_bytes().partition(b"\n")[0])
    objects = [KeyConstants(np.array([Path("a")]), np.array([1.0]))]
    result_cache._write(
        path, "key_constants", header["depends_on"], KEY_CONSTANTS.to_bytes(objects)
    )
    assert as_bytes(get(folder, key_constants)) == as_bytes(key_constants())
    assert "allow_pickle=False" in said[0]


def test_files_are_for_this_user_alone(folder):
    before = os.umask(0)
    try:
        get(folder, key_constants)
    finally:
        os.umask(before)
    [path] = folder.iterdir()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_off(folder):
    for seed in (0, 1):
        measured = key_constants(seed)
        assert get(None, lambda result=measured: result) is measured
    assert not folder.exists()


def refuse(*_, **__):
    raise PermissionError(13, "Permission denied")


def test_a_folder_that_cannot_be_written_costs_a_measurement(folder, said, monkeypatch):
    monkeypatch.setattr(result_cache.tempfile, "mkstemp", refuse)
    for seed in (0, 1):
        measured = key_constants(seed)
        assert get(folder, lambda result=measured: result) is measured
    message = "key_constants is not kept for the next start: [Errno 13] Permission denied"
    assert said == [message, message]


def test_a_file_in_the_folders_place(folder, said):
    folder.parent.mkdir()
    folder.write_text("")
    assert as_bytes(get(folder, key_constants)) == as_bytes(key_constants())
    assert any("is not kept" in message for message in said)


def test_a_file_that_cannot_be_read_is_measured_anew(folder, said, monkeypatch):
    get(folder, key_constants)
    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert as_bytes(get(folder, key_constants)) == as_bytes(key_constants())
    assert len(said) == 1 and "Permission denied" in said[0]


def test_nothing_unfinished_is_left_where_writing_fails(folder, monkeypatch):
    monkeypatch.setattr(result_cache.os, "replace", refuse)
    get(folder, key_constants)
    assert list(folder.iterdir()) == []


def write_and_read(folder: Path, seed: int, start, rounds: int) -> None:
    """Exit code 1 where a result is not one that was written, 2 where a file is found damaged."""
    result_cache.logger.warning = lambda *_: os._exit(2)
    start.wait()
    allowed = [as_bytes(key_constants(other)) for other in range(3)]
    for _ in range(rounds):
        for path in folder.glob("key_constants-*"):
            if seed == 0:
                path.unlink(missing_ok=True)
        if as_bytes(get(folder, lambda: key_constants(seed))) not in allowed:
            raise SystemExit(1)


def test_several_servers_at_once(folder, said):
    """One of them deletes the file again and again, so that all write while others read."""
    context = multiprocessing.get_context("fork")
    start = context.Event()
    arguments = [(folder, seed, start, 100) for seed in range(3)]
    servers = [context.Process(target=write_and_read, args=each) for each in arguments]
    for server in servers:
        server.start()
    start.set()
    for server in servers:
        server.join(60)
    assert [server.exitcode for server in servers] == [0, 0, 0]
    assert [path.name.split("-")[0] for path in folder.iterdir()] == ["key_constants"]
    assert as_bytes(get(folder)) in [as_bytes(key_constants(seed)) for seed in range(3)]
    assert said == []


def test_old_files_are_deleted(folder):
    folder.mkdir(parents=True)
    for age in range(MOST_FILES + 3):
        path = folder / f"forward_peaks-{age}"
        path.write_text("")
        os.utime(path, (1000 - age, 1000 - age))
    (folder / f"forward_peaks-{MOST_FILES}").rename(folder / ".unfinished-x")
    get(folder, key_constants)
    left = {path.name for path in folder.iterdir()}
    assert len(left) == MOST_FILES
    assert left >= {f"forward_peaks-{age}" for age in range(MOST_FILES - 1)}
    get(folder)


def test_the_loss_comes_back(folder):
    """Also one that is infinite."""
    for kld in (0.125, math.inf):
        loss, depends_on = CompressionLoss(kld, 0.75, 256), {"kld": str(kld)}
        ResultCache(folder, SERVER).get(COMPRESSION_LOSS, depends_on, lambda loss=loss: loss)
        assert ResultCache(folder, SERVER).get(COMPRESSION_LOSS, depends_on, unwanted) == loss
