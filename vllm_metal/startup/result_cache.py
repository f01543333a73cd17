"""Results that are measured when a server starts, kept on disk for the next start.

A result is read again only if everything that it depends on is the same (`dependencies.py`). Each
lies in a file of its own, named after its kind and a digest of what it depends on: a line of JSON,
the header, and then the result's bytes.

    {"depends_on": {...}, "kind": "key_constants", "sha256": "..."}

The header repeats what the result depends on and holds a checksum. A file that is damaged or that
was written for something else is measured anew, and a log line says so. Files are written under
another name and renamed, so that several servers may start at once.
"""

import hashlib
import io
import json
import logging
import os
import tempfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

from vllm_metal.kv_cache.workspace import ForwardPeaks
from vllm_metal.metal_kernel_backend.turboquant.calibration import KeyConstants
from vllm_metal.startup.decode_probe import Answer, DecodeAnswers
from vllm_metal.startup.loss_check import CompressionLoss

logger = logging.getLogger("vllm.metal.startup")

MOST_FILES = 64
"""More than these, the files written last, are deleted."""

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Kind(Generic[_Result]):
    """One kind of result. `from_bytes` gives what was given to `to_bytes`, bit for bit."""

    name: str
    to_bytes: Callable[[_Result], bytes]
    from_bytes: Callable[[bytes], _Result]
    """Raises ValueError, KeyError or zipfile.BadZipFile where the bytes are not of this kind."""


def _constants_to_bytes(constants: Sequence[KeyConstants]) -> bytes:
    file = io.BytesIO()
    np.savez(file, *(array for layer in constants for array in (layer.centre, layer.multiplier)))
    return file.getvalue()


def _constants_from_bytes(data: bytes) -> list[KeyConstants]:
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        centres = range(0, len(arrays.files), 2)
        return [KeyConstants(arrays[f"arr_{i}"], arrays[f"arr_{i + 1}"]) for i in centres]


def _peaks_to_bytes(peaks: tuple[ForwardPeaks, ForwardPeaks]) -> bytes:
    content = [
        {
            "by_rows": list(peak.by_rows.items()),
            "by_rows_and_tokens": list(peak.by_rows_and_tokens.items()),
        }
        for peak in peaks
    ]
    return json.dumps(content).encode()


def _peaks_from_bytes(data: bytes) -> tuple[ForwardPeaks, ForwardPeaks]:
    prefill, decode = [
        ForwardPeaks(
            dict(peak["by_rows"]),
            {(rows, tokens): size for (rows, tokens), size in peak["by_rows_and_tokens"]},
        )
        for peak in json.loads(data)
    ]
    return prefill, decode


KEY_CONSTANTS: Kind[list[KeyConstants]] = Kind(
    "key_constants", _constants_to_bytes, _constants_from_bytes
)
"""The constants of every layer's keys, as `calibrate` gives them."""

FORWARD_PEAKS: Kind[tuple[ForwardPeaks, ForwardPeaks]] = Kind(
    "forward_peaks", _peaks_to_bytes, _peaks_from_bytes
)
"""The memory of a prefill and of a decode step, as `workspace_probe` gives them."""


def _answers_to_bytes(answers: DecodeAnswers) -> bytes:
    return json.dumps(asdict(answers)).encode()


def _answers_from_bytes(data: bytes) -> DecodeAnswers:
    found = json.loads(data)
    return DecodeAnswers(Answer(**found["batched"]), Answer(**found["traced"]))


DECODE_ANSWERS: Kind[DecodeAnswers] = Kind("decode_answers", _answers_to_bytes, _answers_from_bytes)
"""How decode runs, as `decode_probe.ask` gives it."""


COMPRESSION_LOSS: Kind[CompressionLoss] = Kind(
    "compression_loss",
    lambda loss: json.dumps(asdict(loss)).encode(),
    lambda data: CompressionLoss(**json.loads(data)),
)
"""What the formats cost the model, as `loss_check.measure_loss` gives it."""


class ResultCache:
    """The results of one server's start.

    Args:
        folder: where the files are, made when the first is written; None: nothing is kept.
        depends_on: what every result depends on; JSON has a form for it.
    """

    def __init__(self, folder: Path | None, depends_on: Mapping[str, Any]):
        self.folder = folder
        self.read: list[str] = []
        """Names of the kinds whose result came from a file."""
        self._depends_on = dict(depends_on)

    def get(
        self, kind: Kind[_Result], depends_on: Mapping[str, Any], measure: Callable[[], _Result]
    ) -> _Result:
        """The result from its file; where there is none, what `measure` gives, which is kept.

        Never raises by itself: a folder that cannot be read or written costs a measurement and a
        log line.

        Args:
            kind: what it is.
            depends_on: what this result depends on beside what all do.
            measure: called where no file serves.
        """
        if self.folder is None:
            return measure()
        key = _normal({**self._depends_on, **depends_on})
        digest = hashlib.sha256(json.dumps([kind.name, key]).encode()).hexdigest()[:32]
        path = self.folder / f"{kind.name}-{digest}"
        try:
            result = kind.from_bytes(_read(path, kind.name, key))
            self.read.append(kind.name)
            return result
        except FileNotFoundError:
            pass
        except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
            logger.warning("%s is measured anew: %s: %s", kind.name, path, error)
        result = measure()
        try:
            _write(path, kind.name, key, kind.to_bytes(result))
            _delete_oldest(self.folder)
        except OSError as error:
            logger.warning("%s is not kept for the next start: %s", kind.name, error)
        return result


def _normal(content: Mapping[str, Any]) -> dict[str, Any]:
    """As it is after it was written and read as JSON, keys in order."""
    return json.loads(json.dumps(content, sort_keys=True))


def _read(path: Path, kind: str, depends_on: Mapping[str, Any]) -> bytes:
    """Raises OSError where there is no file, ValueError where it is not the one that is wanted."""
    header, _, data = path.read_bytes().partition(b"\n")
    try:
        found = json.loads(header)
    except ValueError as error:
        raise ValueError("its header is damaged") from error
    expected = _header(kind, depends_on, data)
    if found == expected:
        return data
    if isinstance(found, dict) and found.get("depends_on") == depends_on:
        raise ValueError("its checksum is wrong")
    raise ValueError("it was written for something else")


def _header(kind: str, depends_on: Mapping[str, Any], data: bytes) -> dict[str, Any]:
    return {"depends_on": depends_on, "kind": kind, "sha256": hashlib.sha256(data).hexdigest()}


def _write(path: Path, kind: str, depends_on: Mapping[str, Any], data: bytes) -> None:
    """For this user's eyes alone: the folder has mode 0700 and the file 0600."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor, unfinished = tempfile.mkstemp(prefix=".unfinished-", dir=path.parent)
    try:
        with open(descriptor, "wb") as file:
            file.write(json.dumps(_header(kind, depends_on, data)).encode() + b"\n" + data)
        os.replace(unfinished, path)
    except BaseException:
        os.unlink(unfinished)
        raise


def _delete_oldest(folder: Path) -> None:
    """Files left unfinished by a server that was killed count too."""

    def written(path: Path) -> float:
        try:
            return path.stat().st_mtime
        except FileNotFoundError:  # another server was faster
            return 0.0

    for path in sorted(folder.iterdir(), key=written, reverse=True)[MOST_FILES:]:
        path.unlink(missing_ok=True)
