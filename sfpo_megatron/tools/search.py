"""The tool `search`: the passages of a local file that best match some words (BM25).

The file is text whose passages are parted by empty lines, or jsonl with a `text` and perhaps a
`title` in each line.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from functools import lru_cache
from pathlib import Path

from sfpo_megatron.tools import ToolError, require_number

_WORD = re.compile(r"\w+")
_K1, _B = 1.5, 0.75  # the usual saturation of counts, and the weight of a passage's length


def search(query: str, *, path: str, max_results: int = 3) -> str:
    """Search a collection of texts.

    Args:
        query: Words to look for.
        path: File that is searched.
        max_results: Passages that are shown.
    """
    found = index_of(path).best(str(query), max_results)
    return "\n\n".join(found) if found else "nothing found"


def warm_up(*, path: str, max_results: int = 3) -> None:
    """Index the file before the first call; ValueError for settings that cannot be."""
    require_number("max_results", max_results, whole=True)
    index_of(path)


class Index:
    """Passages, and which words each has how often."""

    def __init__(self, passages: list[str]) -> None:
        self._passages = passages
        self._counts = [Counter(_words(passage)) for passage in passages]
        self._lengths = [counts.total() for counts in self._counts]
        self._mean = sum(self._lengths) / max(1, len(passages))
        self._having = Counter(word for counts in self._counts for word in counts)

    def best(self, query: str, num: int) -> list[str]:
        """At most `num` passages that have a word of the query, best first."""
        words = set(_words(query))
        if not words:
            raise ToolError("the query has no word")
        scores = [self._score(words, place) for place in range(len(self._passages))]
        order = sorted(range(len(scores)), key=lambda place: (-scores[place], place))
        return [self._passages[place] for place in order[:num] if scores[place] > 0]

    def _score(self, words: set[str], place: int) -> float:
        counts, total = self._counts[place], len(self._passages)
        norm = _K1 * (1 - _B + _B * self._lengths[place] / self._mean) if self._mean else _K1
        score = 0.0
        for word in sorted(words & counts.keys()):  # one order of summands in every process
            having = self._having[word]
            rarity = math.log(1 + (total - having + 0.5) / (having + 0.5))
            score += rarity * counts[word] * (_K1 + 1) / (counts[word] + norm)
        return score


@lru_cache(maxsize=4)
def index_of(path: str) -> Index:
    """The index of a file, made once a process."""
    return Index(passages_of(Path(path)))


def passages_of(file: Path) -> list[str]:
    """The passages of a file; ValueError for what is no text, or a line of jsonl that is none."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: found {error}, expected text in UTF-8; convert it") from None
    if file.suffix != ".jsonl":
        return [part.strip() for part in re.split(r"\n\s*\n", text) if part.strip()]
    passages = []
    for number, line in enumerate(text.split("\n"), start=1):  # U+2028 may stand in a text
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            raise ValueError(
                f'{file} line {number}: found {line[:60]!r}, expected {{"text": "...", ...}}; '
                "write the passage as text"
            )
        title = row.get("title")
        passages.append(f"{title}\n{row['text']}" if title else row["text"])
    return passages


def _words(text: str) -> list[str]:
    return [word.lower() for word in _WORD.findall(text)]
