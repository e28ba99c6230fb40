"""The RolloutController: one CPU-only actor between trainer rank 0 and all engines.

It owns dispatch, scoring, refit order and the engines' lives, so that no Python thread of a trainer
rank does. Async, so it answers health checks while it generates.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Awaitable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray.exceptions import RayTaskError

from sfpo_megatron.config.tree import RunConfig
from sfpo_megatron.rollout.client import RolloutClient
from sfpo_megatron.rollout.cluster import ACTOR_GONE, start_cluster, why_gone
from sfpo_megatron.rollout.engine import Engine
from sfpo_megatron.rollout.environment import ACTOR_VARIABLES, CPU_ACTOR_VARIABLES, enter_actor
from sfpo_megatron.rollout.errors import EngineCallFailed, EngineDied, RolloutError
from sfpo_megatron.rollout.lifeline import ActorProcesses, Lifeline
from sfpo_megatron.rollout.reports import FleetHealth, RolloutTimes, ScoredRequest
from sfpo_megatron.rollout.sampling import (
    Completion,
    GenerationSettings,
    RolloutRequest,
    request_seed,
    stop_token_ids,
)
from sfpo_megatron.types import Prompt, Rollout

T = TypeVar("T")
_ROLLOUTS_PER_CALL = 16  # of one actor call: fewer calls for Ray, more overlap for scoring
_SHUTDOWN_S = 8.0


def start_rollouts(config: RunConfig, *, model_path: str) -> RolloutClient:
    """Start the controller and its engines; returns while they load (`client.wait_ready`)."""
    owns_cluster = start_cluster()
    controller = create_actor(RolloutController, config, model_path=model_path)
    log_dir = Path(config.output_dir).resolve() / "logs"
    return RolloutClient(
        controller,
        owns_cluster=owns_cluster,
        log_dir=log_dir,
        request_timeout_s=config.rollout.timeout_s,
    )


def create_actor(actor_class: type, *args: Any, num_gpus: int = 0, **kwargs: Any) -> Any:
    """An actor in a process of its own, with the environment that vLLM needs here."""
    variables = ACTOR_VARIABLES if num_gpus else CPU_ACTOR_VARIABLES
    return (
        ray.remote(actor_class)
        .options(
            num_cpus=0,
            num_gpus=num_gpus,
            max_restarts=0,
            max_concurrency=1000,
            runtime_env={"env_vars": variables},
        )
        .remote(*args, **kwargs)
    )


@dataclass(kw_only=True, frozen=True, slots=True)
class _Job:
    """Samples that one engine makes in one call."""

    engine: int
    members: tuple[tuple[Prompt, int], ...]
    """(prompt, sample)."""


class RolloutController:
    """See the module."""

    engine_class: type = Engine

    def __init__(self, config: RunConfig, *, model_path: str) -> None:
        self._log_dir = Path(config.output_dir).resolve() / "logs"
        enter_actor(self._log_dir / "controller.log")
        self._lifeline = Lifeline()
        self._config = config
        self._model_path = model_path
        # One thread: the pool is not asked twice at a time, and batches keep their order.
        self._scorer = ThreadPoolExecutor(1, thread_name_prefix="scorer")
        num_gpus = config.rollout.tensor_parallel if ray.cluster_resources().get("GPU") else 0
        self._engines = [
            create_actor(
                self.engine_class,
                config,
                model_path=model_path,
                log_file=self._log_file(index),
                num_gpus=num_gpus,
            )
            for index in range(config.rollout.num_engines)
        ]
        self._requests: dict[str, asyncio.Task[ScoredRequest]] = {}
        self._generating: set[str] = set()
        self._updating = False
        self._broken: str | None = None
        self._weight_version = 0

    # --- life ---------------------------------------------------------------------------------

    async def start(self) -> None:
        """Returns when every engine can generate and the scoring pool runs."""
        starts = self._on_all("start", doing="starting")
        await asyncio.gather(starts, self._in_scorer(self._prepare_scoring))

    def _prepare_scoring(self) -> None:
        from transformers import AutoTokenizer

        from sfpo_megatron.rewards.pool import ScoringPool

        self._tokenizer = AutoTokenizer.from_pretrained(self._model_path)
        self._stop_token_ids = stop_token_ids(Path(self._model_path), self._tokenizer)
        self._pool = ScoringPool(self._config.reward)

    async def health(self) -> FleetHealth:
        """Answers at once, also while generating; an engine that does not is not alive."""
        alive = await asyncio.gather(*(self._engine_alive(engine) for engine in self._engines))
        return FleetHealth(
            engines_alive=tuple(alive),
            num_unfinished_requests=sum(not task.done() for task in self._requests.values()),
            weight_version=self._weight_version,
        )

    async def _engine_alive(self, engine: Any) -> bool:
        try:
            return await asyncio.wait_for(engine.alive.remote(), timeout=2.0)
        except (*ACTOR_GONE, TimeoutError):
            return False

    async def processes(self) -> tuple[str, list[ActorProcesses]]:
        """Host name, and every process of ours (engines on other hosts have their guards there)."""
        found = [self._lifeline.processes()]
        answers = (engine.processes.remote() for engine in self._engines)
        for answer in await asyncio.gather(*answers, return_exceptions=True):
            if not isinstance(answer, BaseException):
                found.append(ActorProcesses(*answer))
        return socket.gethostname(), found

    async def shutdown(self) -> None:
        """End engines and scoring processes in good order; the guards catch what is left."""
        for task in self._requests.values():
            task.cancel()
        stops = [asyncio.ensure_future(_value(e.shutdown.remote())) for e in self._engines]
        await asyncio.wait(stops, timeout=_SHUTDOWN_S)
        if hasattr(self, "_pool"):
            await asyncio.wait([self._in_scorer(self._pool.close)], timeout=2.0)

    # --- rollouts -----------------------------------------------------------------------------

    async def submit(self, request: RolloutRequest) -> None:
        """Begin a request; `collect` gives its rollouts."""
        rollout = self._config.rollout
        if self._broken:
            raise RolloutError(self._broken)
        if self._updating:
            raise RolloutError(f"request {request.id}: refused, a refit is under way")
        if request.id in self._requests:
            raise RolloutError(f"request {request.id}: already submitted and not collected")
        if not 1 <= request.max_response_tokens <= rollout.max_response_tokens:
            raise RolloutError(
                f"request {request.id}: found max_response_tokens {request.max_response_tokens}, "
                f"expected 1 to rollout.max_response_tokens ({rollout.max_response_tokens})"
            )
        for prompt in request.prompts:
            if not 1 <= len(prompt.token_ids) <= rollout.max_prompt_tokens:
                raise RolloutError(
                    f"prompt {prompt.id}: found {len(prompt.token_ids)} tokens, expected 1 to "
                    f"rollout.max_prompt_tokens ({rollout.max_prompt_tokens}); raise that or set "
                    "data.on_bad_row=skip"
                )
        self._generating.add(request.id)
        self._requests[request.id] = asyncio.create_task(self._run(request, self._weight_version))

    async def collect(self, request_id: str) -> ScoredRequest:
        """The request's rollouts: prompt after prompt, sample after sample, each scored."""
        if request_id not in self._requests:
            raise RolloutError(f"request {request_id}: never submitted, or already collected")
        try:
            return await self._requests[request_id]
        finally:
            self._requests.pop(request_id, None)

    async def _run(self, request: RolloutRequest, weight_version: int) -> ScoredRequest:
        began = time.monotonic()
        settings = GenerationSettings(
            temperature=request.temperature,
            top_p=request.top_p,
            max_response_tokens=request.max_response_tokens,
            stop_token_ids=self._stop_token_ids,
        )
        jobs = _jobs(request, len(self._engines))
        generations = [asyncio.create_task(self._generate(job, request, settings)) for job in jobs]
        scorings = [
            asyncio.create_task(self._score(job, generation, weight_version))
            for job, generation in zip(jobs, generations, strict=True)
        ]
        try:
            async with asyncio.timeout(self._config.rollout.timeout_s):
                await asyncio.gather(*generations)
                generated = time.monotonic()
                self._generating.discard(request.id)
                scored = await asyncio.gather(*scorings)
        except TimeoutError:
            parts = zip(jobs, scorings, strict=True)
            done = sum(len(job.members) for job, task in parts if task.done())
            raise RolloutError(
                f"request {request.id}: {done} of {len(request.prompts) * request.num_samples} "
                f"rollouts after rollout.timeout_s={self._config.rollout.timeout_s:g} s; raise it "
                f"or lower rollout.max_response_tokens; logs: {self._log_dir}"
            ) from None
        finally:
            self._generating.discard(request.id)
            for task in (*generations, *scorings):
                task.cancel()
        return ScoredRequest(
            rollouts=[rollout for part in scored for rollout in part],
            times=RolloutTimes(generate_s=generated - began, reward_s=time.monotonic() - generated),
        )

    async def _generate(
        self, job: _Job, request: RolloutRequest, settings: GenerationSettings
    ) -> list[Completion]:
        seeds = [
            request_seed(self._config.seed, request.step, prompt.id, sample)
            for prompt, sample in job.members
        ]
        prompts = [prompt.token_ids for prompt, _ in job.members]
        call = self._engines[job.engine].generate.remote(prompts, seeds, settings)
        return await self._answer(job.engine, call, doing=f"generating step {request.step}")

    async def _score(
        self, job: _Job, generation: Awaitable[list[Completion]], weight_version: int
    ) -> list[Rollout]:
        completions = await generation
        return await self._in_scorer(self._score_now, job, completions, weight_version)

    def _score_now(
        self, job: _Job, completions: list[Completion], weight_version: int
    ) -> list[Rollout]:
        texts = [
            self._tokenizer.decode(completion.token_ids, skip_special_tokens=True)
            for completion in completions
        ]
        prompts = [prompt for prompt, _ in job.members]
        scores = self._pool.score(list(zip(prompts, texts, strict=True)))
        return [
            Rollout(
                prompt_id=prompt.id,
                sample=sample,
                prompt_token_ids=prompt.token_ids,
                token_ids=completion.token_ids,
                generator_logprobs=completion.logprobs,
                finished=completion.finished,
                text=text,
                reward=score.reward,
                correct=score.correct,
                weight_version=weight_version,
            )
            for (prompt, sample), completion, text, score in zip(
                job.members, completions, texts, scores, strict=True
            )
        ]

    # --- refit --------------------------------------------------------------------------------

    async def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Introduce the trainer's sending end to every engine."""
        await self._on_all("init_weight_transfer_engine", init_info, doing="preparing a refit")

    async def start_weight_update(self) -> None:
        """Pause every engine and begin; refused while a request is generating."""
        if self._generating:
            raise RolloutError(
                f"refit refused: request {min(self._generating)} is still generating; collect it "
                "first (a rollout has one weight version)"
            )
        self._updating = True
        await self._in_update("start_weight_update")

    async def update_weights(self, update_info: dict[str, Any]) -> None:
        """Hand one bucket to every engine."""
        await self._in_update("update_weights", update_info)

    async def finish_weight_update(self, weight_version: str | None) -> None:
        """End the update everywhere; rollouts submitted from now on carry the new version."""
        await self._in_update("finish_weight_update")
        self._weight_version = (
            self._weight_version + 1 if weight_version is None else int(weight_version)
        )
        self._updating = False

    async def _in_update(self, method: str, *args: Any) -> None:
        try:
            await self._on_all(method, *args, doing="taking new weights")
        except RolloutError as error:
            # vLLM cannot go back: a half-loaded engine has to be started anew.
            self._broken = f"engines are unusable after a failed refit: {error}"
            raise

    # --- helpers ------------------------------------------------------------------------------

    async def _on_all(self, method: str, *args: Any, doing: str) -> None:
        await asyncio.gather(
            *(
                self._answer(index, getattr(engine, method).remote(*args), doing=doing)
                for index, engine in enumerate(self._engines)
            )
        )

    async def _answer(self, index: int, call: Awaitable[T], *, doing: str) -> T:
        """Await an engine's answer; its failure becomes one message that names the engine."""
        try:
            return await call
        except (*ACTOR_GONE, EngineDied) as error:
            reason = _cause(error) if isinstance(error, EngineDied) else why_gone(error)
            raise RolloutError(
                f"engine {index} died while {doing} ({reason}); its log: {self._log_file(index)}"
            ) from None
        except RayTaskError as error:
            raise RolloutError(
                f"engine {index} failed while {doing}: {_cause(error)}; its log: "
                f"{self._log_file(index)}"
            ) from None

    def _log_file(self, index: int) -> Path:
        return self._log_dir / f"engine-{index}.log"

    def _in_scorer(self, function: Any, *args: Any) -> asyncio.Future[Any]:
        return asyncio.get_running_loop().run_in_executor(self._scorer, function, *args)


def _jobs(request: RolloutRequest, num_engines: int) -> list[_Job]:
    """Cut a request into calls, in order, engines in turn; siblings share an engine."""
    prompts_per_job = max(1, _ROLLOUTS_PER_CALL // request.num_samples)
    return [
        _Job(
            engine=(start // prompts_per_job) % num_engines,
            members=tuple(
                (prompt, sample)
                for prompt in request.prompts[start : start + prompts_per_job]
                for sample in range(request.num_samples)
            ),
        )
        for start in range(0, len(request.prompts), prompts_per_job)
    ]


def _cause(error: Exception) -> str:
    cause = getattr(error, "cause", None) or error
    if isinstance(cause, EngineCallFailed):
        return str(cause)
    return f"{type(cause).__name__}: {str(cause).strip().splitlines()[-1] if str(cause) else ''}"


async def _value(call: Awaitable[T]) -> T:
    return await call
