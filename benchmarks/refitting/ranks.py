"""What every trainer rank of benchmarks/refit.py runs: real Megatron shards (no optimizer), a live
vLLM engine behind Ray, and the three ways to get the weights across.

    torchrun -m benchmarks.refitting.ranks DIR     reads DIR/spec.json, writes DIR/rows.json
"""

from __future__ import annotations

import gc
import importlib
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.refitting.peaks import extra_bytes, resident_bytes
from sfpo_megatron.config.tree import (
    DataConfig,
    DataSource,
    ModelConfig,
    ParallelConfig,
    RefitConfig,
    RewardConfig,
    RolloutConfig,
    RunConfig,
)
from sfpo_megatron.mcore.setup import current_layout, init_distributed
from sfpo_megatron.outputs.directory import RunDirectory
from sfpo_megatron.resharding.export import export_hf
from sfpo_megatron.resharding.refit import Refit
from sfpo_megatron.rollout.engine import Engine

_WARM_UPS = 4  # the first refits wait for the kernel to make huge pages
LAYOUTS: dict[str, dict[str, int]] = {
    "TP1": {},
    "TP2": {"tensor": 2},
    "PP2": {"pipeline": 2},
    "DP2": {"data": 2},
}


class ReloadableEngine(Engine):
    """And the way without a transport: read a checkpoint in place."""

    async def reload(self, path: str) -> None:
        await self._pause("wait")
        await self._rpc("reload_weights", weights_path=path)
        await self.forget_prefixes()
        await self._watched(self._llm.resume_generation())


class GatheredSource:
    """Everything on rank 0 before the first byte is sent."""

    sharded = None

    def __init__(self, source: Any) -> None:
        self._source = source
        self.control = source.control

    def metadata(self) -> list[Any]:
        return self._source.metadata()

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return iter([(name, tensor.clone()) for name, tensor in self._source])


class TimedClient:
    """Seconds of each call, those for buckets being what is waited beside the filling."""

    def __init__(self, client: Any) -> None:
        self._client = client
        self.seconds: dict[str, float] = {}

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            answer = self._timed(name, lambda: getattr(self._client, name)(*args, **kwargs))
            return (lambda: self._timed(name, answer)) if callable(answer) else answer

        return call

    def _timed(self, name: str, work: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        try:
            return work()
        finally:
            took = time.perf_counter() - began
            self.seconds[name] = self.seconds.get(name, 0.0) + took


def make_config(folder: Path, layout: str, bucket_bytes: int, verify_every: int) -> RunConfig:
    return RunConfig(
        output_dir=str(folder / "run"),
        model=ModelConfig(path=str(folder / "model"), dtype="bfloat16"),
        parallel=ParallelConfig(**LAYOUTS[layout]),
        data=DataConfig(train=(DataSource(source="jsonl", path="unused"),)),
        rollout=RolloutConfig(max_prompt_tokens=32, max_response_tokens=16),
        refit=RefitConfig(transport="shm", bucket_bytes=bucket_bytes, verify_every=verify_every),
        reward=RewardConfig(function="exact_match"),
    )


def make_source(config: RunConfig) -> Any:
    """`MegatronWeightSource` over a policy that has nothing but its weights. Collective."""
    capabilities = init_distributed(config)
    from sfpo_megatron.families.shape import model_shape, read_hf_config
    from sfpo_megatron.mcore.control import ControlGroup
    from sfpo_megatron.mcore.model import build_chunks
    from sfpo_megatron.mcore.settings import transformer_config
    from sfpo_megatron.mcore.weights import load_hf_weights
    from sfpo_megatron.resharding.source import MegatronWeightSource

    shape, layout = model_shape(read_hf_config(config.model.path)), current_layout()
    chunks = build_chunks(shape, transformer_config(shape, config, capabilities), capabilities)
    load_hf_weights(
        chunks,
        shape,
        config.model.path,
        tensor=(layout.tensor_rank, layout.tensor_size),
        expert_tensor=(layout.expert_tensor_rank, layout.expert_tensor_size),
    )
    policy: Any = SimpleNamespace(
        config=config,
        shape=shape,
        layout=layout,
        chunks=[chunk.bfloat16() for chunk in chunks],
        control=ControlGroup(600.0),
        shards=SimpleNamespace(params_ready=lambda: None),
    )
    return MegatronWeightSource(policy)


class Fleet:
    """One engine, kept over all layouts; on rank 0 only."""

    def __init__(self, config: RunConfig) -> None:
        from sfpo_megatron.rollout.controller import start_rollouts

        self.client = start_rollouts(config, model_path=config.model.path)
        self.client.wait_ready(300)
        members = self.client.processes.actors[1].members
        self.pids = {f"engine/{n}": p.pid for n, p in enumerate(members)}
        # Before any refit: an engine keeps the last one's buffer mapped.
        self.held = {name: resident_bytes(pid) for name, pid in self.pids.items()}

    def restart_seconds(self, config: RunConfig, path: Path) -> tuple[float, Any]:
        """From nothing to an engine that can generate."""
        import ray

        from sfpo_megatron.rollout.cluster import create_actor, nodes
        from sfpo_megatron.rollout.placement import Placement

        began = time.perf_counter()
        actor = create_actor(
            ReloadableEngine,
            config,
            model_path=str(path),
            log_file=RunDirectory.of(config.output_dir).logs / "restarted.log",
            placement=Placement(node_id=nodes(is_ours=True)[0].id, devices=()),
        )
        ray.get(actor.start.remote())
        return time.perf_counter() - began, actor


def timed(call: Callable[[], object], rounds: int) -> list[float]:
    """Seconds of each round, all ranks in step before each."""
    found = []
    for _ in range(rounds):
        dist.barrier()
        began = time.perf_counter()
        call()
        found.append(time.perf_counter() - began)
    return found


def measure(
    spec: dict[str, Any], folder: Path, layout: str, way: str, fleet: Fleet | None
) -> list[Any]:
    """A row for `way`, and those of the naive ways; meaningful on rank 0. Collective."""
    config = make_config(folder, layout, spec["bucket_bytes"], 0)
    source = make_source(config)
    sizes = [meta.num_bytes for meta in source.metadata()]
    trainer = source.control.all_gather_json(os.getpid())
    pids = {f"trainer/{rank}": pid for rank, pid in enumerate(trainer)}
    pids |= fleet.pids if fleet else {}
    client = TimedClient(fleet.client.sync_client) if fleet else None
    rows: list[dict[str, Any]] = []

    def add(way: str, seconds: list[float], peaks: dict[str, int], **more: Any) -> None:
        median = statistics.median(seconds)
        of = {
            side: max((b for n, b in peaks.items() if n.startswith(side)), default=0)
            for side in ("trainer", "engine")
        }
        rows.append(
            {"way": way, "layout": layout, "model_bytes": sum(sizes), "median_s": median,
             "largest_tensor_bytes": max(sizes), "seconds": seconds,
             "gb_per_s": sum(sizes) / median / 1e9, "trainer_peak_bytes": of["trainer"],
             "engine_peak_bytes": of["engine"], **more}
        )  # fmt: skip

    def refit_of(some: Any, bucket_bytes: int, verify: int = 0) -> Refit:
        settings = make_config(folder, layout, bucket_bytes, verify)
        return Refit(settings, source=some, client=client)

    gc.collect()
    if way == "streamed":
        sender = refit_of(source, spec["bucket_bytes"])
    else:
        sender = refit_of(GatheredSource(source), 1 << 62)
    version = itertools.count(1)
    held = fleet.held if fleet else {}

    def warm_up() -> None:
        for _ in range(_WARM_UPS):
            sender.send(next(version))

    peaks = extra_bytes(warm_up, pids, held)
    if client is not None:
        client.seconds.clear()
    seconds = timed(lambda: sender.send(next(version)), spec["rounds"])
    parts = client.seconds if client is not None else {}
    add(way, seconds, peaks, calls_mean_s={n: took / spec["rounds"] for n, took in parts.items()})
    sender.close()
    if way == "gathered":  # memory has been measured
        checked = refit_of(source, spec["bucket_bytes"], verify=1)
        checked.send(next(version))  # an engine whose checksums differ would be ended
        checked.close()
        if fleet is not None:
            assert fleet.client.health().num_restarts == 0, "checksums differ"
        if layout in spec["naive_layouts"]:
            naive(config, source, fleet, add, pids)
    return rows


def naive(config: RunConfig, source: Any, fleet: Fleet | None, add: Any, pids: Any) -> None:
    """Save a Hugging Face directory; reload it in the engine, or start another engine on it."""
    out = RunDirectory.of(config.output_dir).path / "saved"

    def save() -> None:
        export_hf(
            source,
            out,
            model_path=config.model.path,
            dtype=config.model.dtype,
            is_writer=fleet is not None,
        )

    peaks = extra_bytes(save, pids)
    (save_s,) = timed(save, 1)
    if fleet is None:
        return
    import ray

    restart_s, actor = fleet.restart_seconds(config, out)
    began = time.perf_counter()
    reload_peaks: dict[str, int] = {}
    try:
        members = ray.get(actor.processes.remote())[0]
        engine = {f"engine/{n}": member[0] for n, member in enumerate(members)}
        reload_peaks = extra_bytes(lambda: ray.get(actor.reload.remote(str(out))), engine)
        began = time.perf_counter()
        ray.get(actor.reload.remote(str(out)))
        reload_s: float | None = time.perf_counter() - began
    except Exception as error:
        print(f"reload_weights failed: {str(error).splitlines()[-1]}", flush=True)
        reload_s = None
    ray.kill(actor)
    add("save_and_restart", [save_s + restart_s], peaks, save_s=save_s)
    if reload_s is not None:
        add("save_and_reload", [save_s + reload_s], peaks | reload_peaks, save_s=save_s)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    spec = json.loads((folder / "spec.json").read_text())
    first = make_config(folder, spec["layouts"][0], spec["bucket_bytes"], 0)
    # Before Megatron's CPU bridge and torch.distributed: the engine's processes inherit neither.
    fleet = Fleet(first) if os.environ["RANK"] == "0" else None
    if fleet is not None:  # imported by the first sender, and no part of a refit's memory
        importlib.import_module("sfpo_megatron.resharding.transports.shm")
    rows: list[Any] = []
    try:
        for way, layout in itertools.product(("streamed", "gathered"), spec["layouts"]):
            found = measure(spec, folder, layout, way, fleet)
            rows += found if fleet else []
            from megatron.core import parallel_state

            parallel_state.destroy_model_parallel()
            gc.collect()
    finally:
        if fleet is not None:
            fleet.client.close()
    if fleet is not None:
        (folder / "rows.json").write_text(json.dumps(rows))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
