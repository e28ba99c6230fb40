"""One vLLM engine (AsyncLLM) behind plain methods: generate, and take new weights.

A plain class; the controller makes a Ray actor of it. vllm is imported in `start`, in the actor's
process: constructing an engine reseeds and patches torch.
"""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import Coroutine
from itertools import count
from multiprocessing import active_children
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar

from sfpo_megatron.config.rules.machine import check_shared_memory
from sfpo_megatron.config.tree import RunConfig
from sfpo_megatron.host.shortage import MemoryShortage
from sfpo_megatron.host.spans import span
from sfpo_megatron.host.start_stages import begin_stage
from sfpo_megatron.host.unverified import log_unverified
from sfpo_megatron.outputs.directory import RunDirectory
from sfpo_megatron.outputs.trace import record_spans
from sfpo_megatron.rollout.actor_variables import enter_actor, settle_engine
from sfpo_megatron.rollout.engine_load import LoadListener
from sfpo_megatron.rollout.errors import EngineCallFailed, EngineDied, UpdateInterrupted
from sfpo_megatron.rollout.lifeline import ActorProcesses, Lifeline
from sfpo_megatron.rollout.reports import EngineLoad
from sfpo_megatron.rollout.root_cause import EngineLog, how_ended
from sfpo_megatron.rollout.sampling import Completion, GenerationSettings
from sfpo_megatron.rollout.vllm_arguments import (
    completion_of,
    engine_args,
    sampling_params,
    usage_context,
)

T = TypeVar("T")
Memory: TypeAlias = Literal["weights", "kv_cache"]
"""What an engine holds on its devices, by vLLM's names."""
WireInfo: TypeAlias = dict[str, Any]
"""What vLLM's weight-transfer API carries to engines; the transports know what is in it."""
_HEALTH_POLL_S = 1.0
_WRAPPING = re.compile(
    r"^Call to \w+ method failed: (?:Worker failed with error ['\"])?(?P<inner>.*?)"
    r"(?:['\"], please check the stack trace above.*)?$",
    re.DOTALL,
)

_TWO_TOKENS = GenerationSettings(
    temperature=1.0, top_p=1.0, max_response_tokens=2, stop_token_ids=()
)


class Engine:
    """A generator with a weight version."""

    def __init__(self, config: RunConfig, *, model_path: str, log_file: Path) -> None:
        enter_actor(log_file)
        record_spans(RunDirectory.of(config.output_dir), log_file.stem.replace("-", " "))
        self._log = EngineLog(log_file)
        self._lifeline = Lifeline()
        self._config = config
        self._model_path = model_path
        self._llm: Any = None
        self._children: list[BaseProcess] = []
        self._listener = LoadListener()
        self._sleeps = False
        self._ids = map(str, count(1))
        self._one_call = asyncio.Lock()
        self._turn = asyncio.Condition()
        self._next_bucket = 0

    async def start(self) -> None:
        """Load the model; returns when the engine can generate."""
        settle_engine(self._config)
        begin_stage("importing vLLM")
        from vllm.v1.engine.async_llm import AsyncLLM

        begin_stage("starting its processes")
        given = engine_args(self._config, self._model_path)
        self._sleeps = given.enable_sleep_mode
        if self._sleeps:
            log_unverified("sleep mode")
        try:
            check_shared_memory(self._config)
            listen, context = [lambda vllm_config, index: self._listener], usage_context()
            self._llm = AsyncLLM.from_engine_args(given, stat_loggers=listen, usage_context=context)
            self._children = active_children()
        except RuntimeError as error:  # "See root cause above", which is in this engine's log
            sys.stderr.flush()
            raise EngineCallFailed(self._log.root_cause() or str(error)) from error
        begin_stage("making its first tokens")
        # The first request compiles and imports for seconds: now, while Megatron sets up.
        await self.generate([(0,), (0,)], [0, 1], [_TWO_TOKENS, _TWO_TOKENS])
        self._listener.take()  # no load of a rollout

    async def processes(self) -> ActorProcesses:
        """Every process of this engine."""
        return self._lifeline.processes()

    async def alive(self) -> bool:
        """Whether EngineCore and its workers run; answers while generating."""
        return self._llm is not None and not self._llm.errored

    async def num_steps(self) -> int:
        """How many steps vLLM has made; answers while generating."""
        return self._listener.num_steps

    async def take_load(self) -> EngineLoad:
        """How full and how busy the engine was since the last call."""
        return self._listener.take()

    async def generate(
        self,
        prompts: list[tuple[int, ...]],
        seeds: list[int],
        settings: list[GenerationSettings],
    ) -> list[Completion]:
        """One completion for each (prompt, seed, settings), in order."""
        from vllm.v1.engine.exceptions import EngineDeadError

        requests = list(zip(prompts, seeds, settings, strict=True))
        try:
            with span("generate", track="generate", rollouts=len(requests)):
                if self._config.rollout.reproducible:
                    return await self._complete_as_one_batch(requests)
                return await asyncio.gather(*(self._complete(*request) for request in requests))
        except EngineDeadError:
            # vLLM's exceptions would have to be unpickled where vllm is not imported.
            raise await self._died() from None

    async def _complete_as_one_batch(
        self, requests: list[tuple[tuple[int, ...], int, GenerationSettings]]
    ) -> list[Completion]:
        """Complete all of this call in one batch: logits depend, in their last bits, on the batch,
        and that on which requests have arrived when a step begins."""
        async with self._one_call:
            await self._pause("keep")
            ids, answers = [next(self._ids) for _ in requests], []
            try:  # in order: the place in a batch counts too
                for id_, (prompt, seed, settings) in zip(ids, requests, strict=True):
                    request = {"prompt_token_ids": list(prompt)}
                    parameters = sampling_params(seed, settings)
                    answers.append(await self._llm.add_request(id_, request, parameters))
                await self._watched(self._llm.resume_generation())
                finals = [answer.get_nowait() or await answer.get() for answer in answers]
            except asyncio.CancelledError:
                await self._llm.abort(ids)
                raise
        return [completion_of(final) for final in finals]

    async def _complete(
        self, prompt: tuple[int, ...], seed: int, settings: GenerationSettings
    ) -> Completion:
        final = None
        async for answer in self._llm.generate(
            {"prompt_token_ids": list(prompt)}, sampling_params(seed, settings), next(self._ids)
        ):
            final = answer
        assert final is not None
        return completion_of(final)

    async def init_weight_transfer_engine(self, init_info: WireInfo) -> None:
        """Meet the trainer's sending end; raises if the engine expects other tensors."""
        await self._rpc("init_weight_transfer_engine", init_info=init_info)

    async def start_weight_update(self) -> None:
        """Stop scheduling, then begin an update. An update under a running request kills vLLM."""
        await self._pause("wait")
        await self._rpc("start_weight_update")
        self._next_bucket = 0

    async def update_weights(self, update_info: WireInfo, number: int) -> None:
        """Load bucket `number` of the update, after those before it; Ray may begin calls in another
        order than they were made in."""
        async with self._turn:
            await self._turn.wait_for(lambda: self._next_bucket == number)
            loading = asyncio.ensure_future(self._load(update_info, number))
            self._next_bucket += 1
            self._turn.notify_all()
        await loading

    async def _load(self, update_info: WireInfo, number: int) -> None:
        with span("load_bucket", number=number):
            await self._rpc("update_weights", update_info=update_info)

    async def finish_weight_update(self) -> None:
        """End the update, forget what the old weights computed, and schedule again; raises, with
        nothing scheduled, where a worker's update was interrupted."""
        await self._rpc("finish_weight_update")
        if self._config.refit.survives_interruption:
            for reason in await self._rpc("interrupted_update"):
                if reason is not None:
                    raise UpdateInterrupted(f"transfer interrupted: {reason}")
        await self.forget_prefixes()
        await self._watched(self._llm.resume_generation())

    async def _pause(self, mode: Literal["keep", "wait"]) -> None:
        """Schedule nothing new. Without the 20 ms that `AsyncLLM.pause_generation` sleeps so that
        outputs come out before it returns, for which nothing here waits."""
        core = self._llm.engine_core
        await self._watched(core.pause_scheduler_async(mode=mode, clear_cache=False))

    async def forget_prefixes(self) -> None:
        """Drop the cached keys and values: of old weights, they would be reused silently."""
        if not await self._watched(self._llm.reset_prefix_cache()):
            raise RuntimeError("vLLM did not reset its prefix cache: blocks are still in use")

    async def sleep(self) -> None:
        """Give up the devices' memory once what runs has ended: weights, keys and values are lost.
        Where vLLM has no sleep mode (CPU) the engine stays awake, and `wake` does nothing."""
        if self._sleeps:
            async with self._one_call:
                await self._watched(self._llm.sleep(level=2, mode="wait"))

    async def wake(self, memory: Memory) -> None:
        """Take memory back, with nothing in it: "weights", then an update, then "kv_cache"; only
        after that may the engine generate."""
        if self._sleeps:
            await self._watched(self._llm.wake_up([memory]))

    async def shutdown(self) -> None:
        """End EngineCore and the workers in good order."""
        if self._llm is not None:
            await asyncio.to_thread(self._llm.shutdown)

    async def _rpc(self, method: str, **arguments: Any) -> list[Any]:
        """Every worker's answer."""
        try:
            return await self._watched(self._llm.collective_rpc(method, kwargs=arguments))
        except EngineDied:
            raise
        except Exception as error:
            # vLLM sends a worker's error on as bare text, wrapped once or twice.
            text = _WRAPPING.sub(r"\g<inner>", str(error))
            shortage = MemoryShortage.in_text(text)
            raise EngineCallFailed(shortage.line("refit") if shortage else text) from None

    async def _died(self) -> EngineDied:
        """In a thread: the log is long, and an exit code comes late. `alive` answers meanwhile."""
        why = await asyncio.to_thread(lambda: self._log.root_cause() or how_ended(self._children))
        return EngineDied(f"EngineCore or one of its workers ended: {why}")

    async def _watched(self, call: Coroutine[None, None, T]) -> T:
        """Await an engine call, but not for ever: vLLM leaves calls to a dead EngineCore open."""
        task = asyncio.ensure_future(call)
        while not task.done():
            await asyncio.wait({task}, timeout=_HEALTH_POLL_S)
            if not task.done() and self._llm.errored:
                task.cancel()
                raise await self._died()
        return task.result()
