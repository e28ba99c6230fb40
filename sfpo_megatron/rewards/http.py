"""The reward `http`: batches of responses, posted to a server of the user's own.

POST reward.http.url, application/json:

    {"responses": ["... 42", ...],
     "prompts": [{"id": "sums/17", "question": "6 * 7 =", "answer": "42", "metadata": {}}, ...]}

The answer is a JSON list with an entry a response: a number in [0, 1], or an object with that as
`reward` and further numbers (`returned.py`). A server that is away, slow or overloaded is asked
again after a pause, and nothing is lost meanwhile; one that answers something else is an error.
"""

from __future__ import annotations

import json
import logging
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from typing import Any, TypeVar

from sfpo_megatron.config.reward import FIRST_PAUSE_S, HttpRewardConfig, pauses_s
from sfpo_megatron.plugins import Foreign
from sfpo_megatron.rewards import Problem, VerifierError, WrongReward
from sfpo_megatron.rewards.posting import Connection, Refused, Unavailable
from sfpo_megatron.rewards.returned import NotAScore, each_of, scored, shown
from sfpo_megatron.rewards.scores import Item, Outcome, Score, not_a_score

HTTP = "http"
"""Its name in reward.function."""

T = TypeVar("T")

log = logging.getLogger(__name__)


class HttpScorer:
    """Posts batches, `reward.http.concurrency` at a time."""

    def __init__(self, config: HttpRewardConfig, *, first_pause_s: float = FIRST_PAUSE_S) -> None:
        """Returns when something listens at the address; VerifierError if that takes longer than
        an outage may."""
        if config.url is None:
            raise WrongReward(
                "reward.http.url: found null, expected the address of the server that scores; "
                "set it, or choose another reward.function"
            )
        self._config = config
        self._url = config.url
        self._connection = Connection(config.url, config.timeout_s)
        self._first_pause_s = first_pause_s
        self._closed = threading.Event()
        self._outage = threading.Lock()
        self._is_away = False
        self._threads = ThreadPoolExecutor(config.concurrency, thread_name_prefix="scoring-http")
        try:
            self._persevere(self._connection.reach)
        except BaseException:
            self._threads.shutdown()
            raise

    def score(self, items: Sequence[Item]) -> list[Outcome]:
        """An outcome for each item, in their order; VerifierError if the server is of no use."""
        size = min(self._config.batch_size, -(-len(items) // self._config.concurrency) or 1)
        batches = [items[start : start + size] for start in range(0, len(items), size)]
        posted = [self._threads.submit(self._score_batch, batch) for batch in batches]
        try:
            return [outcome for future in posted for outcome in future.result()]
        finally:
            for future in posted:
                future.cancel()

    def close(self) -> None:
        """Post no more; what waits for the server ends."""
        self._closed.set()
        self._threads.shutdown(cancel_futures=True)

    def _score_batch(self, items: Sequence[Item]) -> list[Outcome]:
        body = _body(items)
        try:
            entries = each_of(self._persevere(lambda: self._answer(body)), len(items))
        except NotAScore as error:
            raise self._useless(str(error).removeprefix("found ")) from error
        return [
            self._outcome(entry, prompt) for entry, (prompt, _) in zip(entries, items, strict=True)
        ]

    def _answer(self, body: bytes) -> Foreign:
        answer, is_whole = self._connection.post(body)
        try:
            return json.loads(answer)
        except (ValueError, RecursionError) as error:
            text = answer[:200].decode(errors="replace")
            if not is_whole:  # nothing said how long it is: it may have been cut
                raise Unavailable(
                    f"it answered what is no JSON ({text!r}), or only a part"
                ) from error
            raise Refused(f"{shown(text)}, which is no JSON") from error

    def _outcome(self, entry: Foreign, prompt: Problem) -> Outcome:
        try:
            reward, parts = scored(entry)
        except NotAScore as error:
            return not_a_score(prompt, f"{HTTP} ({self._url})", str(error))
        return Score(reward=reward, correct=reward >= 1.0, timed_out=False, parts=parts)

    def _persevere(self, ask: Callable[[], T]) -> T:
        """What `ask` gives, however often it takes within `reward.http.retries`."""
        pauses = pauses_s(self._config.retries, self._first_pause_s)
        while True:
            try:
                answer = ask()
            except Refused as error:
                raise self._useless(str(error)) from error
            except Unavailable as error:
                pause_s = next(pauses, None)
                if pause_s is None:
                    raise self._gone_for_good(error) from error
                self._has_gone(error)
            else:
                self._is_back()
                return answer
            if self._closed.wait(pause_s):
                raise VerifierError(f"reward.http.url: {self._url} was away when scoring ended")

    def _gone_for_good(self, last: Unavailable) -> VerifierError:
        return VerifierError(
            f"reward.http.url: found no scores from {self._url} in {self._config.retries + 1} "
            f"attempts (the last: {last}), expected them within {self._config.timeout_s:g} s; "
            "start the server, correct the address, or raise reward.http.retries or timeout_s"
        )

    def _useless(self, found: str) -> VerifierError:
        return VerifierError(
            f"reward.http.url: {self._url}: found {found}; correct the server (docs/extend.md says "
            "what it is asked and what it answers)"
        )

    def _has_gone(self, why: Unavailable) -> None:
        with self._outage:
            if not self._is_away:
                log.warning(
                    "reward.http.url: %s: %s; scoring pauses and asks again", self._url, why
                )
            self._is_away = True

    def _is_back(self) -> None:
        with self._outage:
            if self._is_away:
                log.warning("reward.http.url: %s answers again", self._url)
            self._is_away = False


def _body(items: Sequence[Item]) -> bytes:
    content = {
        "responses": [response for _, response in items],
        "prompts": [
            {
                "id": prompt.id,
                "question": prompt.question,
                "answer": prompt.answer,
                "metadata": _plain(prompt.metadata),
            }
            for prompt, _ in items
        ],
    }
    # UTF-8 has no lone surrogates: a question mark stands for one.
    return json.dumps(content, ensure_ascii=False, allow_nan=False).encode("utf-8", "replace")


def _plain(value: Any) -> Any:
    """Metadata as JSON has it: lists for tuples, text for keys and for fractions, null for what is
    not finite."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Fraction):
        return str(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value
