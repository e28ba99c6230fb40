"""Megatron's torch_dist checkpoints, read and written tensor by tensor with torch alone.

A directory of torch.distributed.checkpoint: `.metadata` (a pickle: which chunk of which tensor lies
where in which file), `*.distcp` files (chunks by torch.save, one after another), and Megatron's
`metadata.json` and `common.pt` (megatron/core/dist_checkpointing/strategies/torch.py). torch's own
writer keeps references to what it has written, and its reader unpickles whatever `.metadata` names;
neither is used here.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import pickle
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import torch
from torch import Tensor
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo

from sfpo_megatron.checkpoints.store import CheckpointError
from sfpo_megatron.checkpoints.torch_records import read_metadata

METADATA, COMMON, CONFIG = ".metadata", "common.pt", "metadata.json"
_BACKENDS = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
_ChunksByPlace: TypeAlias = dict[tuple[int, ...] | None, list[dcp.ChunkStorageMetadata]]
_FILE_BYTES = 4 * 2**30
"""A new file starts once one is larger."""


def _size(*dimensions: int) -> torch.Size:
    return torch.Size(dimensions)


@dataclass(kw_only=True, frozen=True, slots=True)
class TensorEntry:
    """A whole tensor of a checkpoint."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


# --- reading ----------------------------------------------------------------------------------


def is_torch_dist(directory: Path) -> bool:
    return (directory / METADATA).is_file() and (directory / CONFIG).is_file()


class TorchDistReader:
    """The tensors of a checkpoint by key; only what is asked for is read."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._chunks: dict[str, list[dcp.ChunkStorageMetadata]] = {}
        self._by_index: dict[tuple[str, int], _ChunksByPlace] = {}
        self.tensors: dict[str, TensorEntry] = {}
        self.objects: list[str] = []
        found = read_metadata(directory / METADATA)
        try:
            self._take(found)
        except (AttributeError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{directory / METADATA}: found {error}, expected the records of a torch_dist "
                "checkpoint; the file is broken: use another checkpoint"
            ) from error

    def _take(self, found: dcp.Metadata) -> None:
        self._storage: dict[dcp.MetadataIndex, _StorageInfo] = dict(found.storage_data)
        for key, entry in found.state_dict_metadata.items():
            if isinstance(entry, dcp.TensorStorageMetadata):
                shape, dtype = tuple(entry.size), entry.properties.dtype
                self.tensors[key] = TensorEntry(shape=shape, dtype=dtype)
                self._chunks[key] = list(entry.chunks)
            else:
                self.objects.append(key)

    def read(self, key: str, index: Sequence[int] = ()) -> Tensor:
        """Tensor `key` at `index` of its leading dimensions: `read(key, (3,))` is `whole[3]`.

        CheckpointError names the key whose chunks are not all there, or the file that is broken.
        """
        entry, first = self.tensors[key], len(index)
        out = torch.empty(entry.shape[first:], dtype=entry.dtype)
        filled = 0
        for chunk in self._candidates(key, tuple(index)):
            offsets, sizes = tuple(chunk.offsets), tuple(chunk.sizes)
            inside = [i - start for i, start in zip(index, offsets, strict=False)]
            if any(not 0 <= i < n for i, n in zip(inside, sizes, strict=False)):
                continue
            data = self._chunk(key, chunk.offsets)[tuple(inside)]
            place = zip(offsets[first:], sizes[first:], strict=True)
            out[tuple(slice(start, start + n) for start, n in place)] = data
            filled += data.numel()
        if filled != out.numel():
            raise CheckpointError(
                f"{self.directory}: {key}{list(index) or ''}: found chunks of {filled} elements, "
                f"expected {out.numel()}; the checkpoint is not whole"
            )
        return out

    def _candidates(self, key: str, index: tuple[int, ...]) -> list[dcp.ChunkStorageMetadata]:
        """Chunks that may hold `whole[index]`. Of stacked layers and experts there are thousands,
        each of one: looked up, not searched."""
        depth = len(index)
        if (key, depth) not in self._by_index:
            found: _ChunksByPlace = {}
            for chunk in self._chunks[key]:
                of_one = all(size == 1 for size in chunk.sizes[:depth])
                place = tuple(chunk.offsets[:depth]) if of_one else None
                found.setdefault(place, []).append(chunk)
            self._by_index[key, depth] = found
        by_index = self._by_index[key, depth]
        return by_index.get(index, []) + by_index.get(None, [])

    def _chunk(self, key: str, offset: torch.Size) -> Tensor:
        info = self._storage.get(dcp.MetadataIndex(key, offset))
        if info is None:
            raise CheckpointError(f"{self.directory}: {key}: found no file for chunk {offset}")
        path = self.directory / info.relative_path
        try:
            with path.open("rb") as file:
                file.seek(info.offset)
                part = _Slice(file, info.offset, info.length)
                _check_sums(part)
                return torch.load(part, map_location="cpu", weights_only=True)
        except Exception as error:  # zip, zlib and pickle each have their own
            raise CheckpointError(
                f"{path}: {key}: {' '.join(str(error).split())[:200]}, expected {info.length} "
                f"bytes of a tensor at {info.offset}; the file is broken: use another checkpoint"
            ) from error

    def common(self) -> dict[str, Any]:
        """`common.pt`: what Megatron saves once (args, iteration, schedules...). CheckpointError
        where it holds objects beyond tensors, numbers, text, containers and an argparse.Namespace.
        """
        path = self.directory / COMMON
        try:
            with torch.serialization.safe_globals([argparse.Namespace]):
                found = torch.load(path, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            return {}
        except Exception as error:
            first = " ".join(str(error).split())[:200] or "it is empty"
            raise CheckpointError(f"{path}: {first}; not read: it may run any code") from error
        return found if isinstance(found, dict) else {}


def _check_sums(part: _Slice) -> None:
    """BadZipFile if a record is not what was written: torch's reader is built without zip's own
    check (MINIZ_DISABLE_ZIP_READER_CRC32_CHECKS), and a flipped bit is another weight."""
    with zipfile.ZipFile(part) as archive:  # type: ignore[type-var]
        broken = archive.testzip()
    if broken is not None:
        raise zipfile.BadZipFile(f"{broken} is not what its checksum says")
    part.seek(0)


class _Slice(io.RawIOBase):
    """`length` bytes of a file as a file: what torch.load sees as a zip archive of its own."""

    def __init__(self, file: BinaryIO, start: int, length: int) -> None:
        self._file, self._start, self._length, self._at = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        self._at = base + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)[: max(0, self._length - self._at)]
        self._file.seek(self._start + self._at)
        count = self._file.readinto(view)  # type: ignore[attr-defined]
        self._at += count
        return count


# --- writing ----------------------------------------------------------------------------------


class TorchDistWriter:
    """Chunks into an empty directory as they come; `close` makes it a checkpoint."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._entries: dict[str, dcp.TensorStorageMetadata | dcp.BytesStorageMetadata] = {}
        self._storage: dict[dcp.MetadataIndex, _StorageInfo] = {}
        self._number = -1
        self._file: BinaryIO = self._next_file()

    def _next_file(self) -> BinaryIO:
        self._number += 1
        return (self._directory / self._name()).open("wb")

    def _name(self) -> str:
        return f"__0_{self._number}.distcp"

    def tensor(
        self, key: str, chunk: Tensor, *, offsets: Sequence[int], shape: Sequence[int]
    ) -> None:
        """`chunk`, which lies at `offsets` of tensor `key`, whose whole shape is `shape`."""
        sizes = dcp.ChunkStorageMetadata(_size(*offsets), _size(*chunk.shape))
        entry = self._entries.setdefault(
            key,
            dcp.TensorStorageMetadata(
                dcp.TensorProperties(dtype=chunk.dtype), _size(*shape), chunks=[]
            ),
        )
        index = dcp.MetadataIndex(key, sizes.offsets, len(entry.chunks))
        entry.chunks.append(sizes)
        # torch.save writes the whole storage of a view.
        whole = chunk.untyped_storage().nbytes() == chunk.nbytes and chunk.is_contiguous()
        data = chunk if whole else chunk.clone(memory_format=torch.contiguous_format)
        self._write(index, lambda file: torch.save(data, file))

    def object(self, key: str, value: Any) -> None:
        """A ShardedObject of Megatron: `key` is its unique key, the data a list of one."""
        self._entries[key] = dcp.BytesStorageMetadata()
        self._write(dcp.MetadataIndex(key), lambda file: torch.save([value], file))

    def _write(self, index: dcp.MetadataIndex, save: Callable[[BinaryIO], None]) -> None:
        if self._file.tell() > _FILE_BYTES:
            self._close_file()
            self._file = self._next_file()
        start = self._file.tell()
        save(self._file)
        length = self._file.tell() - start
        self._storage[index] = _StorageInfo(self._name(), start, length)

    def _close_file(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def close(self, common: dict[str, Any]) -> None:
        """Write what stands beside the chunks; `common`: for common.pt."""
        self._close_file()
        torch.save(common, self._directory / COMMON)
        (self._directory / CONFIG).write_text(json.dumps(_BACKENDS), encoding="utf-8")
        metadata = dcp.Metadata(
            state_dict_metadata=self._entries,
            storage_data=self._storage,
            storage_meta=dcp.StorageMeta(),
        )
        with (self._directory / METADATA).open("wb") as file:
            pickle.dump(metadata, file)
            file.flush()
            os.fsync(file.fileno())
