"""Rows of a data set of Hugging Face: a directory that `save_to_disk` wrote, or a name on the hub.

The library `datasets` reads it (the extra `datasets` of this package); its tables are converted as
those of parquet are, so that an image or a date among the columns is never decoded.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from sfpo_megatron.config.tree import DataSource
from sfpo_megatron.data.arrow import columns_of, rows_of
from sfpo_megatron.data.errors import DataError, SourceError, shorten
from sfpo_megatron.data.rows import Row

_BATCH_ROWS = 1024
_SAVED = ("state.json", "dataset_dict.json")
"""What `save_to_disk` leaves in a directory, of one split and of several."""


def rows(source: DataSource, seed: int) -> Iterator[Row | DataError]:
    """The problems of the data set's split, numbered from 1."""
    data = _split(_load(source), source)
    names, left_out = columns_of(data.features.arrow_schema, source)
    tables = data.select_columns(names).with_format("arrow").iter(batch_size=_BATCH_ROWS)
    at = f"{source.path}[{data.split}]" if data.split is not None else str(source.path)
    yield from rows_of(_with_names(tables, data.features, names), source, left_out, at)


def _with_names(tables: Iterable[Any], features: Any, columns: list[str]) -> Iterator[Any]:
    """The tables with the names of classes in place of their numbers; null for no class."""
    import datasets
    import pyarrow

    classes = {name: features[name] for name in columns}
    classes = {n: kind for n, kind in classes.items() if isinstance(kind, datasets.ClassLabel)}
    for table in tables:
        for name, kind in classes.items():
            numbers = table.column(name).to_pylist()
            texts = [None if n is None or n < 0 else kind.int2str(n) for n in numbers]
            at = table.schema.get_field_index(name)
            table = table.set_column(at, name, pyarrow.array(texts, pyarrow.string()))
        yield table


def _load(source: DataSource) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise SourceError(
            "source",
            found=f"hf, and no library datasets in this Python ({error})",
            expected="datasets to read it",
            fix="pip install 'sfpo-megatron[datasets]' (or datasets alone)",
        ) from error
    path = source.path or ""
    is_saved = any((Path(path) / name).is_file() for name in _SAVED)
    if is_saved and "[" in (source.split or ""):
        raise SourceError(
            "split",
            found=repr(source.split),
            expected="the name of a split: a directory that save_to_disk wrote is read whole",
            fix="set size, or save the slice",
        )
    try:
        if is_saved:
            return datasets.load_from_disk(path)
        return datasets.load_dataset(path, source.config, split=source.split)
    except Exception as error:  # whatever the library and the hub raise
        raise _refused(source, error) from error


def _refused(source: DataSource, error: Exception) -> SourceError:
    """The field that is at fault. The library's errors do not say, so the data set is asked, unless
    it could not be reached at all."""
    if not isinstance(error, OSError):
        with suppress(Exception):  # the same error again: it is none of these
            if (found := _not_had(source)) is not None:
                return found
    return SourceError(
        "path",
        found=f"{shorten(source.path)}: {type(error).__name__}: {shorten(str(error), 200)}",
        expected="a directory that save_to_disk wrote, or a data set on the hub",
        fix="correct path, config and split; without a network, save it to a directory first",
    )


def _not_had(source: DataSource) -> SourceError | None:
    """The config or the split, if the data set has none of this name."""
    import datasets

    configs = datasets.get_dataset_config_names(source.path)
    try:
        splits = datasets.get_dataset_split_names(source.path, source.config)
    except ValueError:  # null is one where it has one alone, or a default
        return None if source.config in configs else _one_of("config", source.config, configs)
    name = (source.split or "").partition("[")[0]
    is_one = name == "" or "+" in name or name in (*splits, "all")
    return None if is_one else _one_of("split", source.split, splits)


def _one_of(field: str, found: str | None, names: Iterable[str]) -> SourceError:
    expected = f"one of {', '.join(names)}"
    return SourceError(field, found=repr(found), expected=expected, fix=f"set {field}")


def _split(data: Any, source: DataSource) -> Any:
    """The split of several that `source.split` names, or the only one."""
    if not isinstance(data, dict):  # a DatasetDict is one
        own = str(data.split).partition("[")[0]
        if source.split and data.split is not None and source.split.partition("[")[0] != own:
            found, fix = repr(source.split), "correct split, or leave it out"
            raise SourceError("split", found=found, expected=f"{own!r}, the only one", fix=fix)
        return data
    name = source.split or (next(iter(data)) if len(data) == 1 else None)
    if name not in data:
        raise _one_of("split", source.split, data)
    return data[name]
