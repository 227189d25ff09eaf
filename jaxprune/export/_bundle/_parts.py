"""The parts of a bundle: a zip whose members are stored as they are, each with a checksum in the one that describes them."""

import hashlib
import io
import json
import os
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, cast

from jaxprune._printing import printable
from jaxprune.storage._container import LONGEST_HEADER, StorageError
from jaxprune.structured._plan import Plan

FORMAT, VERSION = "jaxprune.bundle", 1
ABOUT, PROGRAM, PARAMS = "bundle.json", "program.jax", "params.safetensors"

_LOCAL = struct.Struct(
    "<4s22xHH"
)  # the header in front of a member: its magic, and the lengths of its name and of more
_PIECE = 2**20

Write = Callable[[BinaryIO], Any]


class _Hashing(io.RawIOBase):
    """A stream that passes on what is written to it, and takes its checksum."""

    def __init__(self, stream: Any) -> None:
        self.stream, self.hash = stream, hashlib.sha256()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.hash.update(data)
        return cast(int, self.stream.write(data))


class _Window(io.RawIOBase):
    """A part of an open file as a file of its own."""

    def __init__(self, file: io.BufferedReader, start: int, size: int) -> None:
        self.file, self.start, self.size, self.at = file, start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self.file.fileno()

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.at, os.SEEK_END: self.size}[whence]
        return self.at

    def tell(self) -> int:
        return self.at

    def readinto(self, buffer: Any) -> int:
        self.file.seek(self.start + self.at)
        found = self.file.readinto(memoryview(buffer)[: max(0, self.size - self.at)])
        self.at += found
        return found


def write_parts(file: BinaryIO, about: Mapping[str, Any], parts: Mapping[str, Write]) -> None:
    """Write a bundle: each part by its function, then what it is about."""
    sums = {}
    with zipfile.ZipFile(file, "w") as archive:
        for name, write in parts.items():
            with archive.open(zipfile.ZipInfo(name), "w", force_zip64=True) as member:
                stream = _Hashing(member)
                write(cast(BinaryIO, stream))
                sums[name] = stream.hash.hexdigest()
        text = json.dumps({"format": FORMAT, "version": VERSION, **about, "sha256": sums}, indent=2, allow_nan=False)
        archive.writestr(zipfile.ZipInfo(ABOUT), text.encode() + b"\n")


class Parts:
    """A bundle that is open for reading; what it is about is read, and known to be of a version that can be.

    Attributes:
        path: the file.
        about: what is written in it of the others.
    """

    def __init__(self, path: Path, file: io.BufferedReader) -> None:
        self.path, self._file = path, file
        magic = file.read(4)
        if magic != b"PK\x03\x04":
            self.fail("is no bundle of export.save; a file of parameters alone is opened by load_sparse")
        try:
            with zipfile.ZipFile(file) as archive:
                self._members = {info.filename: info for info in archive.infolist()}
                about = self._members.get(ABOUT)
                text = archive.read(about) if about is not None and about.file_size <= LONGEST_HEADER else None
        # What zipfile raises of a directory whose numbers are wrong.
        except (zipfile.BadZipFile, EOFError, OSError, RuntimeError, ValueError, struct.error) as error:
            self.fail(f"is damaged, or a part of a file ({error}); copy it, or write it, once more")
        if text is None:
            self.fail(f"is a zip without {ABOUT}, and so no bundle of export.save")
        try:
            self.about = json.loads(text)
        except (ValueError, RecursionError) as error:
            self.fail(f"has a {ABOUT} that cannot be read ({error})")
        self._check_version()

    def _check_version(self) -> None:
        if not isinstance(self.about, dict) or self.about.get("format") != FORMAT:
            self.fail(f"is a zip with a {ABOUT} of another kind, and so no bundle of export.save")
        version = self.about.get("version")
        if not isinstance(version, int) or version < 1:
            self.fail(f"has the version {str(version)[:40]!r}, which is none")
        if version > VERSION:
            self.fail(f"is a bundle of version {version}, and this jaxprune reads up to {VERSION}; install a newer one")

    def part(self, name: str) -> BinaryIO:
        """Return a part to read from, whose checksum is right."""
        sums = self.about.get("sha256")
        wanted, member = sums.get(name) if isinstance(sums, dict) else None, self._members.get(name)
        if wanted is None or member is None:
            self.fail(f"lacks its part {name}; copy it, or write it, once more")
        self._file.seek(max(0, member.header_offset))
        header = self._file.read(_LOCAL.size)
        magic, *lengths = _LOCAL.unpack(header) if len(header) == _LOCAL.size else (b"",)
        if magic != b"PK\x03\x04" or member.compress_type != zipfile.ZIP_STORED:
            self.fail(f"is damaged where its part {name} begins; copy it, or write it, once more")
        found = _Window(self._file, member.header_offset + _LOCAL.size + sum(lengths), member.file_size)
        checksum = hashlib.sha256()
        while piece := found.read(_PIECE):
            checksum.update(piece)
        if checksum.hexdigest() != wanted:
            self.fail(f"is damaged: its part {name} has another checksum than when it was written; copy it once more")
        found.seek(0)
        return cast(BinaryIO, found)

    def written(self) -> str:
        """Say when it was written, and by what."""
        versions, date = self.about.get("versions"), str(self.about.get("date"))[:10]
        return f"of jax {versions.get('jax') if isinstance(versions, dict) else 'unknown'}, {date}"

    def told(self) -> dict[str, Any]:
        """Return what it says of itself, in the fields of a `Bundle`."""
        try:
            plan = self.about["plan"]
            return {
                "plan": None if plan is None else Plan.from_json(json.dumps(plan)),
                "metrics": {str(name): float(value) for name, value in self.about["metrics"].items()},
                "versions": {str(name): str(version) for name, version in self.about["versions"].items()},
                "date": str(self.about["date"]),
            }
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            self.fail(f"says of itself in {ABOUT} what cannot be read ({type(error).__name__}: {error})")

    def fail(self, what: str) -> NoReturn:
        """Raise a StorageError about the file."""
        raise StorageError(printable(f"{self.path} {what}."))
