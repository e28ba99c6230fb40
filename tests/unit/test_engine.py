"""The engine's plain methods, without vllm."""

from __future__ import annotations

import asyncio
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
from made.configs import run_config

from sfpo_megatron.rollout import engine as module
from sfpo_megatron.rollout.engine import Engine
from sfpo_megatron.rollout.errors import EngineCallFailed


class Recording(Engine):
    """Its workers note what they are asked; bucket 1 fails."""

    def __init__(self) -> None:
        super().__init__(run_config(), model_path="unused", log_file=Path("unused"))
        self.calls: list[Any] = []

    async def _pause(self, mode: Any) -> None:
        pass

    async def _rpc(self, method: str, **arguments: Any) -> list[Any]:
        self.calls.append(arguments.get("update_info", method))
        await asyncio.sleep(0.01)
        if arguments.get("update_info") == "bucket 1":
            raise RuntimeError("checksum")
        return []


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Recording:
    monkeypatch.setattr(module, "enter_actor", lambda log_file: None)
    monkeypatch.setattr(module, "Lifeline", lambda: None)
    return Recording()


def test_buckets_load_in_order_whatever_order_their_calls_begin_in(engine: Recording) -> None:
    """And the next goes out before the last is done; one that fails keeps none from its turn."""

    async def run() -> None:
        for _ in range(2):
            await engine.start_weight_update()
            order = (2, 0, 3, 1)
            calls = [engine.update_weights(f"bucket {n}", n) for n in order]  # type: ignore[arg-type]
            answers = await asyncio.gather(*calls, return_exceptions=True)
            assert [str(answer) for answer in answers] == ["None", "None", "None", "checksum"]

    asyncio.run(run())
    once = ["start_weight_update", *(f"bucket {n}" for n in range(4))]
    assert engine.calls == once * 2


@pytest.mark.parametrize("waits_with", [2, 4])  # amid its requests, and with all of them
def test_a_batch_that_nobody_awaits_is_generated_no_further(
    engine: Recording, waits_with: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Left in a paused scheduler, it would hold up the next refit for ever."""

    class Batch:
        def __init__(self, waits_with: int) -> None:
            self.waits_with = waits_with
            self.errored, self.added, self.aborted = False, list[str](), list[str]()

        async def add_request(self, id_: str, request: Any, parameters: Any) -> asyncio.Queue[Any]:
            self.added.append(id_)
            await asyncio.sleep(60.0 if len(self.added) == self.waits_with else 0.0)
            return Answers()

        async def resume_generation(self) -> None:
            pass

        async def abort(self, ids: list[str]) -> None:
            self.aborted += ids

    class Answers(asyncio.Queue[Any]):
        def get_nowait(self) -> Any:
            return None if self.empty() else super().get_nowait()

    class Batching(Recording):
        def __init__(self) -> None:
            super().__init__()
            self._llm = batch

    async def run() -> None:
        requests: list[Any] = [((1, 2), seed, None) for seed in range(3)]
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(Batching()._complete_as_one_batch(requests), 0.05)
        assert batch.added == ["1", "2", "3"][:waits_with] and batch.aborted == ["1", "2", "3"]

    monkeypatch.setattr(module, "sampling_params", lambda seed, settings: None)
    batch = Batch(waits_with)
    asyncio.run(run())


def test_an_engine_that_has_died_answers_while_its_processes_end(
    engine: Recording,
) -> None:
    """Its one child lives on here, so that what became of it is waited for in full."""

    child = get_context("spawn").Process(target=time.sleep, args=(60,), daemon=True)
    child.start()

    class Dead(Recording):
        def __init__(self) -> None:
            super().__init__()
            self._children = [child]

    async def ticks() -> int:
        died, num = asyncio.ensure_future(dead._died()), 0
        while not died.done():
            await asyncio.sleep(0.01)
            num += 1
        assert str(died.result()).endswith("ended: without a word")
        return num

    dead = Dead()
    try:
        assert asyncio.run(ticks()) > 5
    finally:
        child.kill()


def test_memory_that_runs_out_in_a_worker(engine: Recording) -> None:
    """vLLM sends a worker's error on as bare text: it is parsed here, and named by the fleet."""

    class Worker:
        async def collective_rpc(self, method: str, kwargs: dict[str, Any]) -> list[Any]:
            raise RuntimeError(
                "Call to update_weights method failed: CUDA out of memory. Tried to allocate 2.00 "
                "GiB. GPU 0 has a total capacity of 79.11 GiB of which 1.00 GiB is free."
            )

    class Failing(Recording):
        def __init__(self) -> None:
            super().__init__()
            self._llm = Worker()

    with pytest.raises(EngineCallFailed) as raised:
        asyncio.run(Engine._rpc(Failing(), "update_weights"))
    assert str(raised.value) == (
        "GPU memory ran out during refit: 2.00 GiB wanted, 1.00 GiB free of 79.11 GiB; lower "
        "refit.bucket_bytes"
    )
