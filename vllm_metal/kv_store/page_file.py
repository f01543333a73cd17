"""One block of one group of layers in a file: a header, then the bytes of its pages.

| bytes | content |
| --- | --- |
| 8 | `MAGIC`, which names the form of the file |
| 16 | identity: a digest of the key that the file was written under, and of its name |
| 8 | number of bytes that follow the header, little endian |
| 4 | CRC-32 of these bytes, little endian |

A file is written under another name, synced and renamed, so that its name stands for a whole file
or for none, whenever the process is killed. After a loss of power a file may be cut short or be
zeros: its length or its checksum tell. Files have mode 0600 and folders 0700, since prompts can be
read out of keys and values.
"""

import contextlib
import hashlib
import os
import struct
import tempfile
import zlib
from pathlib import Path

MAGIC = b"vmKV0001"
_HEADER = struct.Struct("<8s16sQI")

UNFINISHED = ".unfinished-"
"""How the names of files begin that are being written."""


class UnusableFileError(ValueError):
    """The file is not what its name says: cut short, damaged, or written for something else."""


def identity(key: str, path: str) -> bytes:
    """16 bytes that only the file of this name under this key has.

    Args:
        key: digest of what the bytes depend on beside the tokens.
        path: of the file; its last three parts, the hash of a block and its group, count.
    """
    name = "/".join(Path(path).parts[-3:])
    return hashlib.blake2b(f"{key} {name}".encode(), digest_size=16).digest()


def write(path: str, file_identity: bytes, payload: memoryview) -> None:
    """Writes a whole file, or none.

    Raises:
        OSError: the disk is full, the folder is read-only, and so on.
    """
    header = _HEADER.pack(MAGIC, file_identity, payload.nbytes, zlib.crc32(payload))
    for attempt in range(3):  # whoever evicts files removes folders that are empty
        make_private_folder(Path(path).parent)
        try:
            descriptor, unfinished = tempfile.mkstemp(prefix=UNFINISHED, dir=Path(path).parent)
            break
        except FileNotFoundError:
            if attempt == 2:
                raise
    try:
        with open(descriptor, "wb") as file:
            file.write(header)
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(unfinished)
        raise


def read(path: str, file_identity: bytes, num_bytes: int) -> bytes:
    """The payload of a file.

    Args:
        path: of the file.
        file_identity: what `identity` gives for it.
        num_bytes: of the payload.

    Raises:
        FileNotFoundError: there is no such file.
        UnusableFileError: it is damaged, or was written for something else.
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        header = file.read(_HEADER.size)
        payload = file.read(num_bytes + 1)
    if len(header) < _HEADER.size:
        raise UnusableFileError("it is cut short")
    magic, found, length, checksum = _HEADER.unpack(header)
    if magic != MAGIC or found != file_identity:
        raise UnusableFileError("it was written for something else")
    if length != num_bytes or len(payload) != num_bytes:
        raise UnusableFileError(f"it has {len(payload)} bytes, not {num_bytes}")
    if zlib.crc32(payload) != checksum:
        raise UnusableFileError("its checksum is wrong")
    return payload


def file_bytes(payload_bytes: int) -> int:
    """Size of the file with a payload of this size."""
    return _HEADER.size + payload_bytes


def make_private_folder(folder: Path) -> None:
    """Makes a folder and those above it that are missing, each with mode 0700."""
    try:
        folder.mkdir(mode=0o700)
    except FileNotFoundError:
        make_private_folder(folder.parent)
        folder.mkdir(mode=0o700, exist_ok=True)
    except FileExistsError:
        if not folder.is_dir():
            raise
