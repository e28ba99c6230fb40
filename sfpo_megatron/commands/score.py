"""`sfpo-megatron score FILE.jsonl --reward NAME`: verdicts of responses that are in a file.

It goes through the scoring pool of a run, so a response gets here what it would get there. No
torch. Lines are read, scored and printed part by part: a file of any length takes as much memory.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import yaml

from sfpo_megatron.commands.responses import BadLine, Line, NoFile, lines_of
from sfpo_megatron.config.load import ConfigError
from sfpo_megatron.config.origin import COMMAND_LINE, Source
from sfpo_megatron.config.reward import RewardConfig
from sfpo_megatron.config.typed import build
from sfpo_megatron.data.references import NEED_NONE
from sfpo_megatron.errors import WrongInput
from sfpo_megatron.rewards import VerifierError
from sfpo_megatron.rewards.components import part_means
from sfpo_megatron.rewards.pool import Score, ScoringPool
from sfpo_megatron.rewards.wire import Explanation

_LINES_AT_A_TIME = 1024
_MOST_NAMED = 20
_PROGRESS_S = 5.0
_SHOWN_CHARS = 60


def add_options(command: argparse.ArgumentParser) -> None:
    """The options of `score`."""
    command.add_argument(
        "file",
        metavar="FILE",
        help="a line of JSON a response: `response`, `answer` (the reference), `question`; further "
        "fields are the prompt's metadata; - reads stdin",
    )
    command.add_argument(
        "--reward",
        metavar="NAME",
        required=True,
        help="as reward.function: a name, package.module:name, or a list for a weighted sum",
    )
    command.add_argument("--json", action="store_true", help="print an object a line, nothing else")
    command.add_argument(
        "--explain", action="store_true", help="say how response and reference were read"
    )
    command.add_argument(
        "--thinking",
        metavar="MODE",
        help="reward.thinking: strip (the default), require_closed or ignore",
    )
    command.add_argument("--timeout-s", type=float, metavar="S", help="reward.timeout_s")
    command.add_argument(
        "--workers", type=int, metavar="N", help="scoring processes (default: one a core, up to 8)"
    )
    command.add_argument("--batched", action="store_true", help="reward.batched")
    command.add_argument("--url", help="reward.http.url, for --reward http")


def score(arguments: argparse.Namespace) -> int:
    """Score a file; the exit code: 0, 1 (a server that is away), 2 (what was given is wrong)."""
    reward = _reward_of(arguments)
    # Without a look at the answer where nothing compares with it.
    needs_answer = any(
        one.name not in NEED_NONE and ":" not in one.name for one in reward.summands(None)
    )
    try:
        lines = lines_of(arguments.file, needs_answer=needs_answer)
    except NoFile as error:
        return _failed(error, 2)
    try:
        pool = ScoringPool(reward, explain=arguments.explain or not arguments.json)
    except VerifierError as error:
        return _failed(error, 2 if isinstance(error, WrongInput) else 1)
    with pool:
        try:
            tally = _score_all(lines, pool, arguments)
            print(tally.summary(), file=sys.stderr if arguments.json else sys.stdout, flush=True)
        except VerifierError as error:  # of no line: the server is away
            return _failed(error, 1)
        except NoFile as error:
            return _failed(error, 2)
        except BrokenPipeError:  # whoever read the verdicts has enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
    if not tally.scores and not tally.num_bad:
        return _failed(f"{arguments.file}: found no line, expected a response a line", 2)
    return 2 if tally.num_bad else 0


def _failed(error: Exception | str, code: int) -> int:
    print(f"error: {error}", file=sys.stderr, flush=True)
    return code


def _reward_of(arguments: argparse.Namespace) -> RewardConfig:
    """The reward that the options make; ConfigError if they make none."""
    name: Any = arguments.reward
    if name.lstrip().startswith("["):
        try:
            name = yaml.safe_load(name)
        except yaml.YAMLError as error:
            raise ConfigError(
                COMMAND_LINE,
                "--reward",
                found=repr(arguments.reward),
                expected="a name, or a list such as [{name: math}, {name: format, weight: 0.1}]",
                fix="correct the list",
            ) from error
    num_workers = arguments.workers
    if num_workers is None:
        num_workers = min(8, len(os.sched_getaffinity(0)))
    given = {
        "function": name,
        "batched": arguments.batched or None,
        "thinking": arguments.thinking,
        "timeout_s": arguments.timeout_s,
        "num_workers": num_workers,
        "http": None if arguments.url is None else {"url": arguments.url},
    }
    tree = {key: value for key, value in given.items() if value is not None}
    config = build(RewardConfig, tree, "reward", Source(file=COMMAND_LINE))
    assert isinstance(config, RewardConfig)
    return config


class _Tally:
    """What has come out so far."""

    def __init__(self) -> None:
        self.scores = self.num_correct = self.num_timed_out = self.num_bad = 0
        self._reward = 0.0
        self._parts: dict[str, tuple[float, int]] = {}
        self._began = self._said = time.monotonic()

    def add(self, score: Score) -> None:
        """Count a score."""
        self.scores += 1
        self.num_correct += score.correct
        self.num_timed_out += score.timed_out
        self._reward += score.reward
        for name, value in part_means([score], "reward/").items():
            total, count = self._parts.get(name, (0.0, 0))
            self._parts[name] = total + value, count + 1

    def bad(self, where: str, what: str) -> None:
        """Name a line without a score, unless there were many."""
        self.num_bad += 1
        if self.num_bad <= _MOST_NAMED:
            print(f"{where}: {what}", file=sys.stderr, flush=True)
        elif self.num_bad == _MOST_NAMED + 1:
            print("further bad lines are counted alone", file=sys.stderr, flush=True)

    def progress(self) -> None:
        """Say how far it is, now and then."""
        now = time.monotonic()
        if now - self._said >= _PROGRESS_S:
            self._said = now
            rate = self.scores / (now - self._began)
            print(f"{self.scores:,} scored, {rate:,.0f} a second", file=sys.stderr, flush=True)

    def summary(self) -> str:
        """All of it in a line."""
        count = max(self.scores, 1)
        said = [
            f"{self.scores} responses: reward_mean {self._reward / count:.4f}",
            f"correct {self.num_correct} ({self.num_correct / count:.2%})",
            f"timed out {self.num_timed_out}",
            f"bad lines {self.num_bad}",
            *(f"{name} {total / count:.4f}" for name, (total, count) in self._parts.items()),
        ]
        return ", ".join(said)


def _score_all(
    lines: Iterator[Line | BadLine], pool: ScoringPool, arguments: argparse.Namespace
) -> _Tally:
    tally = _Tally()
    while part := list(islice(lines, _LINES_AT_A_TIME)):
        good = [line for line in part if isinstance(line, Line)]
        outcomes = iter(pool.outcomes([(line.problem, line.response) for line in good]))
        for line in part:
            outcome = next(outcomes) if isinstance(line, Line) else VerifierError(line.what)
            if isinstance(outcome, VerifierError):
                tally.bad(line.where, _in_a_line(line, outcome))
                continue
            tally.add(outcome)
            said = _as_json(line, outcome, arguments) if arguments.json else None
            print(said or _as_text(line, outcome, explain=arguments.explain))
        sys.stdout.flush()
        tally.progress()
    return tally


def _in_a_line(line: Line | BadLine, error: VerifierError) -> str:
    """The error without its prompt, which is the line, and of its traceback the last line."""
    first, *others = str(error).removeprefix(f"prompt {line.where}: ").strip().splitlines()
    return f"{first} ({others[-1].strip()})" if others else first


def _as_json(line: Line | BadLine, score: Score, arguments: argparse.Namespace) -> str:
    said: dict[str, Any] = {
        "line": line.number,
        "reward": score.reward,
        "correct": score.correct,
        "timed_out": score.timed_out,
        "parts": dict(score.parts),
    }
    if arguments.explain:
        said["explained"] = dict(score.explained)
    return json.dumps(said)


def _as_text(line: Line | BadLine, score: Score, *, explain: bool) -> str:
    said = [f"{line.where}\t{score.reward:g}"]
    if score.timed_out:
        said.append("timed out")
    said += [f"{name} {value:g}" for name, value in score.parts.items()]
    for name, one in score.explained.items():
        whose = f"{name}: " if len(score.explained) > 1 else ""
        said += [whose + text for text in _explained(one, explain=explain)]
    return "\t".join(said)


def _explained(one: Explanation, *, explain: bool) -> Iterator[str]:
    for what, text, read in (
        ("found", one["found"], one["read"]),
        ("reference", one["reference"], one["reference_read"]),
    ):
        yield f"{what} {_short(text)}" + (f" read as {_choices(read)}" if explain and read else "")


def _choices(read: Sequence[str]) -> str:
    return " or ".join(json.dumps(text, ensure_ascii=False) for text in read)


def _short(text: str | None) -> str:
    if text is None:
        return "no answer"
    kept = text if len(text) <= _SHOWN_CHARS else f"...{text[-_SHOWN_CHARS:]}"
    return json.dumps(kept)
