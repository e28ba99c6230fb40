"""What an engine's processes said before they ended: vLLM's own error says "see above"."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterable
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from sfpo_megatron.host.shortage import ENGINE_ADVICE, MemoryShortage, killed_by

_RAISED = re.compile(
    # vLLM prefixes each line of a traceback: `(EngineCore pid=7) ERROR 11-29 01:02:03 [core.py:9] `
    r"^(?:\([^)]*\) )?(?:[A-Z]+ [\d-]+ [\d:]+ \[[^\]]*\] )?"
    r"(?P<kind>[A-Za-z_][\w.]*(?:Error|Exception|Interrupt)): (?P<text>\S.*)$",
    re.MULTILINE,
)
_FOLLOWS = re.compile(r"root cause|initialization failed|EngineDeadError|background process")
_LONGEST = 600
_READ_BYTES = 4 << 20
_EXIT_S = 1.0
"""vLLM knows of a process's end by its pipes, which close before it has an exit code."""


def how_ended(children: Iterable[BaseProcess]) -> str:
    """What became of the first of an engine's processes that is gone and said nothing. Waits a
    second for one at most, however many there are."""
    children = list(children)
    wait({child.sentinel for child in children}, timeout=_EXIT_S)
    for child in children:
        if code := child.exitcode:
            how = killed_by(-code, "generation") if code < 0 else f"exit code {code}"
            return how if code == -signal.SIGKILL else f"{how}, without a word"
    return "without a word"


class EngineLog:
    """The part of an engine's log that its processes have written since this was made."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._start = file.stat().st_size if file.exists() else 0

    def root_cause(self) -> str | None:
        """The first error in one line: memory that ran out by its sizes and keys, else the error
        itself. None if they ended without a word."""
        text = self.text()
        for match in _RAISED.finditer(text):
            if _FOLLOWS.search(match["text"]):
                continue
            kind = match["kind"].rpartition(".")[2]
            shortage = MemoryShortage.in_text(match["text"])
            if shortage is None and kind == "MemoryError":
                shortage = MemoryShortage.of_host()
            if shortage is not None:
                return shortage.line(None, ENGINE_ADVICE)
            return f"{kind}: {match['text'].strip()}"[:_LONGEST]
        return None

    def text(self) -> str:
        """What they have written."""
        try:
            with self._file.open("rb") as stream:
                stream.seek(self._start)
                return stream.read(_READ_BYTES).decode(errors="replace")
        except OSError:
            return ""
