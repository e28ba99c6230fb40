"""DataError: a source or one of its rows is wrong, said with where, what was found and the fix."""

from __future__ import annotations

from sfpo_megatron.errors import InputError, shortened


class DataError(InputError):
    """`where: found ..., expected ...; fix`; of a row, `kind` says in a few words what is wrong."""

    def __init__(
        self, where: str, *, found: str, expected: str, fix: str, kind: str = "malformed"
    ) -> None:
        super().__init__(where, found, expected, fix)
        self.kind = kind


class BadRowsError(DataError):
    """The report of several bad rows: the first ones, a line each, and the count by kind."""

    def __init__(self, first: list[DataError], counts: dict[str, int]) -> None:
        total, (one, *_) = sum(counts.values()), first
        super().__init__(
            one.where, found=one.found, expected=one.expected, fix=one.fix, kind=one.kind
        )
        more = f", the first {len(first)} above" if total > len(first) else ""
        fix = "correct them, or set data.on_bad_row=skip to leave them out"
        lines = [*map(str, first), f"{total} bad rows ({by_kind(counts)}){more}: {fix}"]
        self.args = ("\n".join(lines),)


class SourceError(DataError):
    """A field of a source is wrong; whoever reads the source knows its key in the config."""

    def at(self, key: str) -> DataError:
        """The same, said with the source's `key`."""
        return DataError(
            f"{key}.{self.where}", found=self.found, expected=self.expected, fix=self.fix
        )


def by_kind(counts: dict[str, int]) -> str:
    """`8 without an answer, 2 too long`: the most frequent kind first."""
    ordered = sorted(counts.items(), key=lambda item: -item[1])
    return ", ".join(f"{number} {kind}" for kind, number in ordered)


def shorten(value: object, limit: int = 80) -> str:
    """`repr(value)` for a message."""
    return shortened(repr(value), limit)
