"""Slurm's way of writing a time limit, in seconds and back."""

from __future__ import annotations

import re

_TIME = re.compile(
    r"(?:(?P<days>\d+)-(?P<day_hours>\d+)(?::(?P<day_minutes>\d+)(?::(?P<day_seconds>\d+))?)?)"
    r"|(?:(?P<hours>\d+):)?(?P<minutes>\d+):(?P<seconds>\d+)|(?P<only_minutes>\d+)",
    re.ASCII,
)


def parse_time(text: str) -> int:
    """Seconds of `minutes`, `minutes:seconds`, `hours:minutes:seconds`, `days-hours`,
    `days-hours:minutes` or `days-hours:minutes:seconds`; ValueError for anything else, or 0."""
    match = _TIME.fullmatch(text)
    if match is None:
        raise ValueError(
            f"found {text!r}, expected a time limit like 4:00:00, 1-12 or 90 (minutes)"
        )
    part = {name: int(value or 0) for name, value in match.groupdict().items()}
    hours = part["days"] * 24 + part["day_hours"] + part["hours"]
    minutes = part["day_minutes"] + part["minutes"] + part["only_minutes"]
    total = (hours * 60 + minutes) * 60 + part["day_seconds"] + part["seconds"]
    if total == 0:
        raise ValueError(f"found {text!r}, expected more than no time")
    return total


def format_time(seconds: int) -> str:
    """`hours:minutes:seconds`."""
    minutes, rest = divmod(seconds, 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
