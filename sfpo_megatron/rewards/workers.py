"""Scores responses in processes of their own, with a time limit for each response.

A response is text that a model wrote under pressure to be rewarded: it may hang a verifier, eat
its memory or crash it. So a verifier runs in a process (`worker.py`) that is killed and replaced
when one response takes longer than `reward.timeout_s`; that response gets 0, all others their
score. One thread per process feeds it, so `score` may be called in any thread, a Ray actor's too.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from sfpo_megatron.config.reward import RewardConfig, WeightedReward
from sfpo_megatron.host.scratch import remove_abandoned
from sfpo_megatron.host.spans import span
from sfpo_megatron.outputs.directory import RunDirectory
from sfpo_megatron.rewards import Problem, VerifierError
from sfpo_megatron.rewards.process import KEEPS_THE_LIMIT, SCRATCH, start_scoring
from sfpo_megatron.rewards.scores import Item, Outcome, Request, Score, not_a_score
from sfpo_megatron.rewards.wire import Batch, Reply, Verdict, packed
from sfpo_megatron.sandbox.output import OutputLog
from sfpo_megatron.sandbox.process import LimitedProcess, WorkerDied, WorkerTimeout

log = logging.getLogger(__name__)

_ITEMS_PER_MESSAGE = 256
_SEND_TIMEOUT_S = 60.0
_NUM_SEND_ATTEMPTS = 3


class WorkerPool:
    """`reward.num_workers` scoring processes, started when the pool is made."""

    def __init__(
        self,
        config: RewardConfig,
        functions: Sequence[WeightedReward],
        run: RunDirectory | None = None,
        *,
        explain: bool = False,
    ) -> None:
        """`functions`: those that the processes load; `run`: where what they print is logged, None
        for stderr; `explain`: scores say how response and reference were read."""
        self._config = config
        self._functions = tuple(functions)
        self._explain = explain
        self._lock = threading.Lock()  # one `score` at a time: a process holds one batch
        self._threads = ThreadPoolExecutor(config.num_workers, thread_name_prefix="scoring")
        self._closed = False
        slots = range(config.num_workers)
        self._logs = [
            OutputLog(run.scoring_log(slot) if run is not None else None) for slot in slots
        ]
        remove_abandoned(SCRATCH)
        start = [self._threads.submit(self._start, slot) for slot in slots]
        self._workers: list[LimitedProcess[Reply] | None] = []
        try:
            self._workers = [future.result() for future in start]
        except BaseException:
            for future in start:
                if future.exception() is None:
                    future.result().kill()
            self._threads.shutdown()
            raise

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers that run now."""
        return [worker.pid for worker in self._workers if worker is not None]

    def score(self, requests: Sequence[Request]) -> list[list[Outcome]]:
        """Outcomes of each request, one for each of its items, in their order."""
        outcomes: list[list[Outcome]] = [[] for _ in requests]
        pending: queue.SimpleQueue[tuple[int, int, int]] = queue.SimpleQueue()
        for number, request in enumerate(requests):
            # Short batches are spread over all workers; long ones are cut so that none waits long.
            num_items = len(request.items)
            step = min(_ITEMS_PER_MESSAGE, -(-num_items // self._config.num_workers) or 1)
            outcomes[number] = [_NOT_YET] * num_items
            for start in range(0, num_items, step):
                pending.put((number, start, start + step))

        def feed(slot: int) -> None:
            while True:
                try:
                    number, start, stop = pending.get_nowait()
                except queue.Empty:
                    return
                function, chunk = requests[number].function, requests[number].items[start:stop]
                score_chunk = self._score_at_once if function.batched else self._score_chunk
                with span("score", track=f"scorer {slot}", responses=len(chunk)):
                    outcomes[number][start:stop] = score_chunk(slot, function, chunk)

        with self._lock:
            if self._closed:
                raise RuntimeError("the scoring pool is closed")
            futures = [self._threads.submit(feed, s) for s in range(self._config.num_workers)]
            errors = [error for future in futures if (error := future.exception())]
        if errors:
            raise errors[0]
        return outcomes

    def close(self) -> None:
        """End the processes."""
        with self._lock:
            self._closed = True
            for worker in self._workers:
                if worker is not None:
                    worker.kill()
            self._workers = []
            for output in self._logs:
                output.close()
            self._threads.shutdown()

    def _start(self, slot: int) -> LimitedProcess[Reply]:
        """Only in a thread of the pool: the process ends with the thread that has started it."""
        return start_scoring(self._config, self._functions, self._logs[slot])

    def _score_chunk(
        self, slot: int, function: WeightedReward, chunk: Sequence[Item]
    ) -> list[Outcome]:
        """Score on worker `slot`; after a response that kills or outlasts it, go on behind that
        response with a new worker."""
        scores: list[Outcome] = []
        limit_s = self._config.timeout_s + KEEPS_THE_LIMIT.get(function.name, 0.0)
        while len(scores) < len(chunk):
            rest = chunk[len(scores) :]
            worker = self._send(slot, function, rest)
            try:
                for prompt, _ in rest:
                    verdict = worker.read(limit_s)
                    scores.append(_outcome(verdict, prompt, function.name))
            except (WorkerTimeout, WorkerDied) as error:
                self._replace(slot)
                scores.append(self._lost(chunk[len(scores)][0], error))
        return scores

    def _score_at_once(
        self, slot: int, function: WeightedReward, chunk: Sequence[Item]
    ) -> list[Outcome]:
        """Score with one call on worker `slot`; where that raises, dies or takes too long, one by
        one, so that only the response that does it gets 0."""
        worker = self._send(slot, function, chunk)
        try:
            reply = worker.read(self._config.timeout_s * len(chunk))
            if "again" not in reply:
                verdicts = zip(reply["verdicts"], chunk, strict=True)
                return [_outcome(one, prompt, function.name) for one, (prompt, _) in verdicts]
        except (WorkerTimeout, WorkerDied) as error:
            self._replace(slot)
            if len(chunk) == 1:
                return [self._lost(chunk[0][0], error)]
        return [one for item in chunk for one in self._score_at_once(slot, function, [item])]

    def _send(
        self, slot: int, function: WeightedReward, items: Sequence[Item]
    ) -> LimitedProcess[Reply]:
        """Hand a batch to worker `slot`. One that ended while it was idle did so for no fault of
        these responses (someone killed it): start another and send again."""
        for _ in range(_NUM_SEND_ATTEMPTS):
            worker = self._workers[slot] or self._start(slot)
            self._workers[slot] = worker
            try:
                worker.send(self._message(function, items), _SEND_TIMEOUT_S)
                return worker
            except (WorkerDied, WorkerTimeout):
                self._replace(slot)
        raise RuntimeError(
            f"reward.function {function.name}: {_NUM_SEND_ATTEMPTS} scoring processes in a "
            f"row took no batch; look for the reason in {self._logs[slot].name} (memory, a process "
            "limit)"
        )

    def _replace(self, slot: int) -> None:
        worker, self._workers[slot] = self._workers[slot], None
        if worker is not None:
            worker.kill()

    def _lost(self, prompt: Problem, error: WorkerTimeout | WorkerDied) -> Score:
        """0 for a response that its process did not survive."""
        timed_out = isinstance(error, WorkerTimeout)
        took = f"took longer than {self._config.timeout_s:g} s in"
        how = took if timed_out else "crashed"
        log.warning("a response to prompt %s %s the scoring process: reward 0", prompt.id, how)
        return Score(reward=0.0, correct=False, timed_out=timed_out)

    def _message(self, function: WeightedReward, items: Sequence[Item]) -> Batch:
        """The batch as JSON; a prompt that several responses share is sent once."""
        names = [(one.name, one.batched) for one in self._functions]
        batch: Batch = {
            "function": names.index((function.name, function.batched)),
            "problems": [],
            "items": [],
            "cpu_s": self._config.timeout_s * len(items),
            "explain": self._explain,
        }
        index_of: dict[str, int] = {}
        for prompt, response in items:
            if prompt.id not in index_of:
                index_of[prompt.id] = len(index_of)
                batch["problems"].append(
                    {
                        "id": prompt.id,
                        "question": prompt.question,
                        "answer": prompt.answer,
                        "metadata": packed(prompt.metadata),
                    }
                )
            batch["items"].append((index_of[prompt.id], response))
        return batch


_NOT_YET = VerifierError("not scored")
"""Stands for an outcome until it is there."""


def _outcome(verdict: Verdict, prompt: Problem, function: str) -> Outcome:
    if "raised" in verdict:
        return VerifierError(
            f"prompt {prompt.id}: reward.function {function} raised, and does so on the reference "
            f"answer {prompt.answer!r} too; correct the row or the function\n{verdict['raised']}"
        )
    if "unjudged" in verdict:
        return VerifierError(
            f"prompt {prompt.id}: reward.function {function}: {verdict['unjudged']}"
        )
    if "refused" in verdict:
        return not_a_score(prompt, function, verdict["refused"])
    reward = verdict["reward"]
    explained = verdict.get("explained")
    return Score(
        reward=reward,
        correct=reward >= 1.0,
        timed_out=False,
        parts=verdict["parts"],
        explained={} if explained is None else {function: explained},
    )
