"""The origin of each key of a config, so that an error can say it. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass, field

from sfpo_megatron.errors import InputError

COMMAND_LINE = "command line"


class ConfigError(InputError):
    """One value of a config is wrong: file, key and line, what was found and expected, the fix."""

    def __init__(
        self, file: str, key: str, *, found: str, expected: str, fix: str, line: int | None = None
    ) -> None:
        super().__init__(f"{file}: {key}", found, expected, fix)
        self.file, self.key, self.line = file, key, line

    def __str__(self) -> str:
        return f"{super().__str__()} (line {self.line})" if self.line else super().__str__()


@dataclass(kw_only=True, slots=True)
class Source:
    """File and lines of the plain tree's keys, and which of them an override has set."""

    file: str
    lines: dict[str, int] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    """Each value that stands without quotes, as it was written: YAML makes True of `yes`."""
    comments: set[str] = field(default_factory=set)
    """Keys with nothing after the colon but a comment."""
    overridden: set[str] = field(default_factory=set)

    def forget(self, key: str) -> None:
        """Drop what is known of a value that an override replaces, and of all below it."""
        for known in (self.texts, self.lines):
            for name in [n for n in known if n == key or n.startswith(f"{key}.")]:
                del known[name]
        self.comments -= {n for n in self.comments if n == key or n.startswith(f"{key}.")}

    def error(self, key: str, *, found: str, expected: str, fix: str) -> ConfigError:
        """The error at `key`; its line is that of the nearest section above a key that is not
        there."""
        parts = key.split(".")
        above = [".".join(parts[: n + 1]) for n in range(len(parts))]
        from_cli = any(name in self.overridden for name in above)
        lines = [self.lines[name] for name in ("", *above) if name in self.lines]
        return ConfigError(
            COMMAND_LINE if from_cli else self.file,
            key or "(top level)",
            found=found,
            expected=expected,
            fix=fix,
            line=lines[-1] if lines and not from_cli else None,
        )


def join(key: str, name: str) -> str:
    """`name` under the dotted `key`."""
    return f"{key}.{name}" if key else name
