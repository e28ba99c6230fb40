"""The files that a source's `path` stands for: one, those of a directory, or a glob's; their text.

Standard library only: `check` counts rows with it, `score` reads lines.
"""

from __future__ import annotations

import glob
import gzip
import json
from collections.abc import Iterable
from io import BufferedReader
from pathlib import Path

ENDINGS = {"jsonl": (".jsonl", ".jsonl.gz", ".ndjson", ".ndjson.gz"), "parquet": (".parquet",)}
"""Source -> what the names of its files in a directory end with."""
_GZIP = b"\x1f\x8b"
_NO_LINES = {
    b"\x28\xb5\x2f\xfd": "packed with zstd",
    b"BZh": "packed with bzip2",
    b"\xfd7zXZ": "packed with xz",
    b"PK\x03\x04": "a zip archive",
    b"PAR1": "a parquet file",
    b"version https://git-lfs": "a git-lfs pointer, not the file",
    b"\xff\xfe": "text in UTF-16",
    b"\xfe\xff": "text in UTF-16",
    b"[": "a JSON array",
    b"<": "a web page or XML",
}
"""First bytes of files that have no lines of JSON in UTF-8 -> what they are."""
BOM = b"\xef\xbb\xbf"
LINES = "lines of JSON in UTF-8, plain or packed with gzip"
NO_LINES_FIX = "convert or unpack it, or name the source that reads it"


class NoLines(ValueError):
    """A file has no lines of JSON: what it is instead."""


def files_of(source: str, path: str) -> list[Path]:
    """The files, in the order of their names; none where `path` leads to none. A file that is named
    in full is taken whatever it is called, and a name with `*` in it that is there is no glob. The
    hidden files of a directory are left out; a link that leads nowhere is in, and cannot be read.
    """
    given = Path(path)
    if given.is_file():
        return [given]
    if given.is_dir():
        found = (
            file
            for file in given.iterdir()
            if file.name.endswith(ENDINGS[source]) and not file.name.startswith(".")
        )
    else:
        found = (Path(name) for name in glob.iglob(path, recursive=True))
    return sorted(file for file in found if file.is_file() or not file.exists())


def lines_in(file: BufferedReader) -> Iterable[bytes]:
    """The lines of a file, unpacked if it is packed with gzip, which may be a pipe. NoLines for
    what has none; OSError, EOFError or zlib.error where it cannot be read to its end."""
    head = file.peek()
    start = head.removeprefix(BOM).lstrip()
    for first, what in _NO_LINES.items():
        if head.startswith(first) or start.startswith(first):
            raise NoLines(what)
    line, broken, _ = start.partition(b"\n")
    if broken and line.strip() == b"{":
        raise NoLines("one value of JSON over several lines")
    if not broken and b"}\r{" in line:
        raise NoLines("lines that end in a carriage return alone")
    return gzip.open(file) if head.startswith(_GZIP) else file


def is_blank(line: bytes) -> bool:
    """Whether a line holds nothing but white space, and a byte-order mark perhaps."""
    return not line.removeprefix(BOM).strip()


def text_of(line: bytes) -> str:
    """A line of JSON as text; ValueError for another encoding than UTF-8: lines of UTF-16 begin in
    the middle of a character, and may be JSON all the same."""
    encoding = json.detect_encoding(line)
    if not encoding.startswith("utf-8"):
        raise ValueError(f"text in {encoding}, expected UTF-8; convert the file")
    return line.decode(encoding, "surrogatepass")


def name_of(path: str) -> str:
    """What the rows of `path` are called after: its stem; of a glob, the directory's."""
    given = Path(path.removesuffix(".gz"))
    if glob.has_magic(path) and not given.exists():
        plain = [part for part in given.parts if not glob.has_magic(part)]
        return Path(*plain).name if plain and Path(*plain).name else "files"
    return given.stem
