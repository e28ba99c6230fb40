"""Calls a reward function and makes verdicts of what it returns or raises.

An exception is told apart by what raises it. If the function also raises on the prompt's own
reference answer, prompt or function is broken: the verdict says so, and the run ends. If only the
response makes it raise (or run out of memory), the response is a wrong answer: 0. `sys.exit` is an
exception like any other; CannotBeJudged is none of the response's.
"""

from __future__ import annotations

import asyncio
import inspect
import traceback
from collections.abc import Awaitable, Callable, Sequence

from sfpo_megatron.plugins import Foreign
from sfpo_megatron.rewards import CannotBeJudged, Problem
from sfpo_megatron.rewards.returned import NotAScore, each_of, scored
from sfpo_megatron.rewards.wire import Explanation, Reply, Verdict
from sfpo_megatron.sandbox.surroundings import Surroundings


class Judge:
    """Holds the function; `batched`: it takes lists. Either kind may be `async`."""

    def __init__(
        self,
        function: Callable[..., Foreign],
        *,
        batched: bool,
        surroundings: Surroundings,
        explain: Callable[[str, Problem], Explanation] | None = None,
    ) -> None:
        """`explain`: what a built-in function says of how it reads."""
        self._function = function
        self._explain = explain
        self.batched = batched
        self._surroundings = surroundings
        # One loop for the life of the process, so that a client opened in one call serves the next.
        self._runner = asyncio.Runner()

    def verdict(self, response: str, problem: Problem) -> Verdict:
        """Score one response."""
        try:
            return _verdict_of(self._call_one(response, problem))
        except NotAScore as error:
            return {"refused": str(error)}
        except CannotBeJudged as error:
            return {"unjudged": str(error)}
        except BaseException:
            raised = traceback.format_exc(limit=8)
        try:
            scored(self._call_one(problem.answer, problem))
        except NotAScore as error:
            return {"refused": f"for the reference answer {error}"}
        except BaseException:
            return {"raised": raised}
        reason = raised.strip().splitlines()[-1]
        print(f"prompt {problem.id}: this response alone made the function raise {reason}")
        return {"reward": 0.0, "parts": {}}

    def explained(self, response: str, problem: Problem) -> Verdict:
        """What `verdict` is to have besides."""
        if self._explain is None:
            return {}
        try:
            return {"explained": self._explain(response, problem)}
        except Exception:  # of a row that is broken, which the verdict says
            return {}

    def verdicts(self, responses: Sequence[str], problems: Sequence[Problem]) -> Reply:
        """Score a batch in one call."""
        if len(responses) == 1:
            return {"verdicts": [self.verdict(responses[0], problems[0])]}
        try:
            values = self._call(responses, problems)
            return {"verdicts": [_checked(value) for value in values]}
        except NotAScore as error:
            return {"verdicts": [{"refused": str(error)}] * len(responses)}
        except BaseException:
            traceback.print_exc(limit=8)
            print(f"a batch of {len(responses)} raised this; its responses follow one by one")
            return {"again": True}

    def _call_one(self, response: str, problem: Problem) -> Foreign:
        return self._call([response], [problem])[0]

    def _call(self, responses: Sequence[str], problems: Sequence[Problem]) -> list[Foreign]:
        """A value for each response, as the function gave them."""
        try:
            if self.batched:
                given = self._function(list(responses), list(problems))
            else:
                given = self._function(responses[0], problems[0])
            if inspect.isawaitable(given):
                given = self._runner.run(_waited(given))
            return each_of(given, len(responses)) if self.batched else [given]
        finally:
            self._surroundings.restore()


async def _waited(given: Awaitable[Foreign]) -> Foreign:
    return await given


def _checked(value: Foreign) -> Verdict:
    try:
        return _verdict_of(value)
    except NotAScore as error:
        return {"refused": str(error)}


def _verdict_of(value: Foreign) -> Verdict:
    reward, parts = scored(value)
    return {"reward": reward, "parts": parts}
