"""manifest.json: size and sha256 of every file of a checkpoint. No torch.

    {"format": 1, "step": 50, "files": {"common.pt": {"bytes": 1234, "sha256": "..."}, ...}}

It is the last file of a checkpoint to be written; a directory without it is not a checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sfpo_megatron.host.listing import files_below
from sfpo_megatron.host.replacing import write_durably

NAME = "manifest.json"
FORMAT = 1
_CHUNK_BYTES = 1 << 22
_ABSENT = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
_THREADS = 8  # hashing releases the interpreter's lock


@dataclass(kw_only=True, frozen=True, slots=True)
class FileDigest:
    """Size and sha256 that a file must have."""

    num_bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> FileDigest:
        """Read `path` to its end."""
        digest, size = hashlib.sha256(), 0
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
                size += len(chunk)
        return cls(num_bytes=size, sha256=digest.hexdigest())


def write_manifest(directory: Path, step: int, known: Mapping[str, FileDigest]) -> None:
    """Write the manifest of all files in `directory`; those not in `known` are read for it."""
    files = {
        name: known.get(name) or FileDigest.of(directory / name) for name in files_in(directory)
    }
    content = {
        "format": FORMAT,
        "step": step,
        "files": {n: {"bytes": d.num_bytes, "sha256": d.sha256} for n, d in files.items()},
    }
    write_durably(directory / NAME, json.dumps(content, indent=1) + "\n")


def read_manifest(directory: Path) -> dict[str, FileDigest]:
    """Digest of each file, by name. ValueError says what is wrong with the manifest itself, OSError
    that it could not be read."""
    path = directory / NAME
    try:
        with _named(path):
            text = path.read_text(encoding="utf-8")
        content = json.loads(text)
        if content["format"] != FORMAT:
            raise ValueError(f"found format {content['format']!r}, expected {FORMAT}")
        return {
            str(name): FileDigest(num_bytes=int(entry["bytes"]), sha256=str(entry["sha256"]))
            for name, entry in content["files"].items()
        }
    except _ABSENT:
        raise ValueError(f"{path}: found no such file, expected a whole checkpoint") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: found no readable manifest ({error})") from error


def faults(directory: Path, *, drop_cache: bool = False) -> list[str]:
    """Files that differ from the manifest, one line each; empty for a whole checkpoint.

    Reads every byte. `drop_cache`: from the disk, not from the kernel's cache of what was written.
    OSError names a file that is there and could not be read: it may be as it should.
    """
    try:
        expected = read_manifest(directory)
    except ValueError as error:
        return [str(error)]
    with ThreadPoolExecutor(_THREADS) as pool:
        found = pool.map(
            lambda name: _fault(directory / name, expected[name], drop_cache), sorted(expected)
        )
        return [fault for fault in found if fault]


def _fault(path: Path, expected: FileDigest, drop_cache: bool) -> str | None:
    try:
        with _named(path):
            size = path.stat().st_size
            if size != expected.num_bytes:
                return f"{path}: found {size} bytes, expected {expected.num_bytes}"
            if drop_cache:
                _drop_cache(path)
            found = FileDigest.of(path)
    except _ABSENT as error:
        return f"{path}: found {error.strerror}, expected {expected.num_bytes} bytes"
    if found != expected:
        return f"{path}: found sha256 {found.sha256[:12]}, expected {expected.sha256[:12]}"
    return None


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Have an error say which file: that of a read alone does not."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def _drop_cache(path: Path) -> None:
    if hasattr(os, "posix_fadvise"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def files_in(directory: Path) -> Iterator[str]:
    """Name of every file below `directory` but the manifest. OSError where not all can be listed:
    a manifest without them would call the rest whole."""
    for path in sorted(files_below(directory)):
        if path.name != NAME:
            yield path.relative_to(directory).as_posix()
