"""DataError: a source or one of its rows is wrong, said with where, what was found and the fix."""

from __future__ import annotations


class DataError(ValueError):
    """`where: found ..., expected ...; fix`."""

    def __init__(self, where: str, *, found: str, expected: str, fix: str) -> None:
        super().__init__(f"{where}: found {found}, expected {expected}; {fix}")
        self.where, self.found, self.expected, self.fix = where, found, expected, fix


class SourceError(DataError):
    """A field of a source is wrong; whoever reads the source knows its key in the config."""

    def at(self, key: str) -> DataError:
        """The same, said with the source's `key`."""
        return DataError(
            f"{key}.{self.where}", found=self.found, expected=self.expected, fix=self.fix
        )


def shorten(value: object, limit: int = 80) -> str:
    """`repr(value)`, cut so that a message stays on a line or two."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
