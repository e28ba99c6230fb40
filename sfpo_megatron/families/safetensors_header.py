"""The header of a safetensors file, held to the format's own rules before a weight is read.

No torch and no safetensors: `check` reads 200 shards' headers in a moment. Whatever is accepted
here opens there (tests/unit/test_model_files_property.py).
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from sfpo_megatron.errors import InputError

_MAX_HEADER_BYTES = 100_000_000  # the safetensors format's own limit
_MAX_NUMBERS = 2**60
_BITS = {
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8,
    "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32, "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip
"""Size of one number of each dtype that the format has."""
AGAIN = "download it again"
_IMPOSTORS: tuple[tuple[bytes, str, str], ...] = (
    (rb"version https://git-lfs", "a git-lfs pointer in place of the file", "run git lfs pull"),
    (rb"# xet version", "a git-xet pointer in place of the file", "run git xet pull"),
    (rb"\s*<", "a web page in place of the file", f"{AGAIN}: the server sent an error"),
    (rb"\s*\{\s*\"", "JSON text in place of the file", f"{AGAIN}: the server sent an error"),
    (rb"PK\x03\x04|\x80[\x02-\x05]", "a PyTorch pickle", "save the model with save_pretrained"),
    (rb"GGUF", "a GGUF file", "take the model's safetensors files"),
    (rb"\x1f\x8b|\x28\xb5\x2f\xfd|\xfd7zXZ", "a compressed file", "decompress it"),
    (rb"\0{8}", "zeros in place of a header (a download that never ended?)", AGAIN),
)
"""What else is found under the name of a weight file: its beginning, what it is, what to do."""


class ModelFilesError(InputError):
    """A file of a model directory cannot be used; what was found names it.

    `not_there`: nothing is wrong with what is there, but something is missing, as on a login node
    that has no weights.
    """

    def __init__(self, found: str, expected: str, fix: str, *, not_there: bool = False) -> None:
        super().__init__("", found, expected, fix)
        self.not_there = not_there


class TensorEntry(NamedTuple):
    """What a header says of one tensor."""

    file: str
    dtype: str
    """The format's own name of it: F32, BF16..."""
    shape: tuple[int, ...]
    first_byte: int
    """Its place in the file."""

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * _BITS[self.dtype] // 8


def read_header(file: Path) -> dict[str, TensorEntry]:
    """Every tensor of a safetensors file by name, none read; ModelFilesError names the file."""
    try:
        with opened(file) as stream:
            num_file_bytes = os.fstat(stream.fileno()).st_size
            start = stream.read(256)
            num_bytes = _num_header_bytes(file, start, num_file_bytes)
            stream.seek(8)
            text = stream.read(num_bytes)
    except OSError as error:
        raise _broken(file, what_is_there(file, error), f"make it readable, or {AGAIN}") from error
    found, end = _entries(file, _parsed(file, text), 8 + num_bytes)
    _check_size(file, num_file_bytes, end)
    return found


class NotAFile(OSError):
    """A pipe, which would wait for its writer for ever, or a device."""


def opened(file: Path) -> BinaryIO:
    """The file to read; NotAFile, or another OSError if there is none."""
    if file.exists() and not file.is_file() and not file.is_dir():
        raise NotAFile(errno.EINVAL, "a pipe or a device, not a file,")
    return file.open("rb")


def what_is_there(file: Path, error: OSError) -> str:
    """In place of a file that could not be read."""
    is_dead_link = file.is_symlink() and not file.exists()
    return "a link to nothing" if is_dead_link else str(error.strerror)


def impostor(start: bytes) -> tuple[str, str] | None:
    """What a file is that begins with `start` and is no weights file, and what to do."""
    if not start:
        return "an empty file", AGAIN
    kinds = ((what, fix) for begins, what, fix in _IMPOSTORS if re.match(begins, start))
    return next(kinds, None)


def _broken(file: Path, found: str, fix: str = AGAIN) -> ModelFilesError:
    return ModelFilesError(f"{found} at {file}", "a whole safetensors file", fix)


def _num_header_bytes(file: Path, start: bytes, num_file_bytes: int) -> int:
    num_bytes = int.from_bytes(start[:8], "little")
    if start[8:9] != b"{" or num_bytes > _MAX_HEADER_BYTES:
        found, fix = impostor(start) or (
            f"no safetensors header (it begins with {start[:12]!r})",
            AGAIN,
        )
        raise _broken(file, found, fix)
    if num_bytes + 8 > num_file_bytes:
        raise _truncated(file, num_file_bytes, 8 + num_bytes, "at least ")
    return num_bytes


def _truncated(file: Path, found: int, expected: int, at_least: str = "") -> ModelFilesError:
    return ModelFilesError(
        f"{found:,} bytes at {file}, a truncated file",
        f"{at_least}{expected:,} bytes as its header says",
        f"{AGAIN}: it was cut off",
    )


def _check_size(file: Path, found: int, expected: int) -> None:
    if found < expected:
        raise _truncated(file, found, expected)
    if found > expected:
        raise ModelFilesError(
            f"{found:,} bytes at {file}", f"{expected:,} bytes as its header says", AGAIN
        )


def _parsed(file: Path, text: bytes) -> dict[str, Any]:
    try:
        # Decoded first: json would take UTF-16 too.
        header = json.loads(text.decode("utf-8"), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise _broken(file, f"a header that is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise _broken(file, f"a header that is a {type(header).__name__}")
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _broken(file, "a header with metadata that is not text")
    return header


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _entries(
    file: Path, header: dict[str, Any], first_byte: int
) -> tuple[dict[str, TensorEntry], int]:
    """The entries in the order of the header, and where their data end in the file."""
    found: dict[str, TensorEntry] = {}
    places = []
    for name, entry in header.items():
        try:
            dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
            sizes = (*shape, start, end)
        except (TypeError, KeyError, ValueError):
            raise _broken(file, f"a header without dtype, shape or place of {name}") from None
        if dtype not in _BITS:
            raise _broken(
                file, f"dtype {dtype!r} of {name}", "save the model with a known safetensors"
            )
        if any(type(size) is not int or not 0 <= size <= _MAX_NUMBERS for size in sizes):
            raise _broken(file, f"a header with sizes {sizes} of {name}")
        if math.prod(filter(None, shape)) > _MAX_NUMBERS or math.prod(shape) * _BITS[dtype] != (
            8 * (end - start)
        ):
            raise _broken(
                file, f"{end - start} bytes for {dtype} of shape {list(shape)} ({name}) in a header"
            )
        found[name] = TensorEntry(file.name, dtype, tuple(shape), first_byte + start)
        places.append((start, end, name))
    before = 0
    for start, end, name in sorted(places):
        if start != before:
            what = "overlapping data" if start < before else "a hole in the data"
            raise _broken(file, f"{what} before {name} (byte {start}, not {before})")
        before = end
    return found, first_byte + before
