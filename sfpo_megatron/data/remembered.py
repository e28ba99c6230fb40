"""What a checkpoint remembers of the training prompts: enough to tell later what has changed.

The id of each prompt and 16 bytes of digests: question, answer, token ids. The first part of an id,
the name of the source, comes from the name of a file, which is not data: its number stands there.
"""

from __future__ import annotations

import base64
import hashlib
import json
import zlib
from array import array
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from sfpo_megatron.data.errors import shorten
from sfpo_megatron.types import Prompt

_PARTS = (8, 4, 4)  # bytes of question, answer, token ids
_ROW_BYTES = sum(_PARTS)
_LINE = 300


@dataclass(frozen=True)
class Remembered:
    """The prompts of a run, in their order."""

    ids: tuple[str, ...]
    """`<number of the source>/<id of the row>`."""
    digests: bytes

    @staticmethod
    def of(prompts: Sequence[Prompt], names: Sequence[str]) -> Remembered:
        """Remember prompts whose sources are called `names`, in the order of data.train."""
        number = {name: str(place) for place, name in enumerate(names)}
        ids, digests = [], bytearray()
        for prompt in prompts:
            name, _, row = prompt.id.partition("/")
            ids.append(f"{number[name]}/{row}")
            digests += _digest(prompt.question.encode(errors="surrogatepass"), _PARTS[0])
            digests += _digest(prompt.answer.encode(errors="surrogatepass"), _PARTS[1])
            digests += _digest(array("q", prompt.token_ids).tobytes(), _PARTS[2])
        return Remembered(ids=tuple(ids), digests=bytes(digests))

    @cached_property
    def state(self) -> dict[str, str]:
        """The same as JSON has it; always the same object."""
        return {
            "ids": _text(json.dumps(self.ids).encode()),
            "digests": base64.b64encode(self.digests).decode(),
            "fingerprint": self.fingerprint,
        }

    @staticmethod
    def from_state(state: dict[str, Any]) -> Remembered:
        """What `state` was made of."""
        ids = json.loads(zlib.decompress(base64.b64decode(state["ids"])))
        return Remembered(ids=tuple(ids), digests=base64.b64decode(state["digests"]))

    @cached_property
    def fingerprint(self) -> str:
        """One value for all of it."""
        digest = hashlib.sha256(json.dumps(self.ids).encode())
        digest.update(self.digests)
        return digest.hexdigest()

    def parts(self, row: int) -> tuple[bytes, bytes, bytes]:
        """Digests of a prompt's question, answer and token ids."""
        start = row * _ROW_BYTES
        question, answer = start + _PARTS[0], start + _PARTS[0] + _PARTS[1]
        return (
            self.digests[start:question],
            self.digests[question:answer],
            self.digests[answer : start + _ROW_BYTES],
        )


@dataclass(kw_only=True, frozen=True, slots=True)
class DataChange:
    """How the prompts of now differ from those that are remembered."""

    place: dict[int, int]
    """Row then -> row now, of those that are still there."""
    gone: list[int]
    """Rows then."""
    added: list[int]
    """Rows now; of the lists below too."""
    questions: list[int] = field(default_factory=list)
    """Another question under the same id."""
    answers: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    """The same question as other tokens: tokenizer, template, suffix, system message."""
    ids: list[int] = field(default_factory=list)
    """Other ids; not looked at where rows are gone or added, which moves line numbers."""
    moved: list[int] = field(default_factory=list)
    """Rows before which a later one stood."""

    def describe(self, then: Remembered, prompts: Sequence[Prompt]) -> str:
        """Counts, with the first examples as far as a line has room. `prompts`: those of now."""
        found = [self._said(then, prompts, examples) for examples in (2, 1, 0)]
        return next((text for text in found if len(text) <= _LINE), found[-1])

    def _said(self, then: Remembered, prompts: Sequence[Prompt], examples: int) -> str:
        def before(row: int) -> str:
            source, _, name = then.ids[row].partition("/")
            return f"data.train[{source}] row {name}"

        def now(row: int) -> str:
            return f"{prompts[row].id} {shorten(prompts[row].question, 40)}"

        def answer(row: int) -> str:
            return f"{now(row)} is now {shorten(prompts[row].answer, 30)}"

        kinds = (
            (self.gone, "row is gone", "rows are gone", before),
            (self.added, "row is new", "rows are new", now),
            (self.questions, "question has changed", "questions have changed", now),
            (self.answers, "answer has changed", "answers have changed", answer),
            (self.tokens, "prompt has other tokens", "prompts have other tokens", now),
            (self.ids, "row has another id", "rows have other ids", now),
            (self.moved, "row stands elsewhere", "rows stand elsewhere", now),
        )
        said = (_count(*kind, examples) for kind in kinds if kind[0])
        return ", ".join(said)


def compare(then: Remembered, now: Remembered) -> DataChange:
    """Pair the rows by question and answer, by question, then by id."""
    pairs: dict[int, int] = {}
    left_then, left_now = list(range(len(then.ids))), list(range(len(now.ids)))

    def pair(key: Callable[[Remembered, int], Hashable]) -> list[int]:
        nonlocal left_then, left_now
        waiting: dict[Hashable, list[int]] = defaultdict(list)
        for row in reversed(left_now):
            waiting[key(now, row)].append(row)
        found = []
        for row in left_then:
            if same := waiting.get(key(then, row)):
                pairs[row] = same.pop()
                found.append(pairs[row])
        taken = set(found)
        left_then = [row for row in left_then if row not in pairs]
        left_now = [row for row in left_now if row not in taken]
        return sorted(found)

    pair(lambda of, row: (of.ids[row], *of.parts(row)[:2]))
    pair(lambda of, row: of.parts(row)[:2])
    answers = pair(lambda of, row: of.parts(row)[0])
    questions = pair(lambda of, row: of.ids[row])
    asked = set(questions)
    kept = sorted(pairs.items())
    return DataChange(
        place=pairs,
        gone=left_then,
        added=left_now,
        questions=questions,
        answers=answers,
        tokens=sorted(b for a, b in kept if b not in asked and then.parts(a)[2] != now.parts(b)[2]),
        ids=[]
        if left_then or left_now
        else sorted(b for a, b in kept if then.ids[a] != now.ids[b]),
        moved=_out_of_order([b for _, b in kept]),
    )


def _out_of_order(rows: Iterable[int]) -> list[int]:
    """Those that come after a later one."""
    highest, found = -1, []
    for row in rows:
        if row < highest:
            found.append(row)
        highest = max(highest, row)
    return sorted(found)


def _count(
    rows: Sequence[int], one: str, many: str, name: Callable[[int], str], examples: int
) -> str:
    text = f"{len(rows)} {one if len(rows) == 1 else many}"
    if not examples:
        return text
    more = "; ..." if len(rows) > examples else ""
    return f"{text} ({'; '.join(map(name, rows[:examples]))}{more})"


def _digest(content: bytes, size: int) -> bytes:
    return hashlib.blake2b(content, digest_size=size).digest()


def _text(content: bytes) -> str:
    return base64.b64encode(zlib.compress(content)).decode()
