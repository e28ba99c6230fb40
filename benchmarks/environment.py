"""Seconds of a request in an environment of one's own with one turn, beside `single_turn`.

    python benchmarks/environment.py [--pairs 10] [--out FILE]

One engine, the demo's model with random weights: the dearest case, since its engine has next to
nothing to compute. Both get the same requests, in turn, and give the same tokens. Prints the median
of the ratios (target: 1.05) and rollouts a second, and writes benchmarks/results/environment.json.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script in a checkout

import ray
import torch

from benchmarks.common import provenance
from benchmarks.common.demo_run import demo_run
from sfpo_megatron.config.load import load_config
from sfpo_megatron.config.tree import RunConfig
from sfpo_megatron.outputs.directory import RunDirectory
from sfpo_megatron.rollout.cluster import create_actor, nodes, start_cluster
from sfpo_megatron.rollout.engine import Engine
from sfpo_megatron.rollout.episode_runner import EpisodeRunner
from sfpo_megatron.rollout.episodes import Episode, Generate
from sfpo_megatron.rollout.handles import EngineActor
from sfpo_megatron.rollout.placement import place_engines
from sfpo_megatron.rollout.reports import RolloutCount
from sfpo_megatron.rollout.rounds import Rounds
from sfpo_megatron.rollout.sampling import RolloutRequest
from sfpo_megatron.rollout.scoring import Scorer
from sfpo_megatron.rollout.updates import UpdatableFleet
from sfpo_megatron.types import Prompt

ENVIRONMENTS = ("single_turn", "benchmarks.environment:OneTurn")
NUM_PROMPTS, NUM_SAMPLES = 16, 8
TARGET = 1.05


class OneTurn:
    """What the model says first is the episode."""

    def __init__(self, tokenizer: object) -> None:
        pass

    async def run(self, prompt: Prompt, generate: Generate, seed: int) -> Episode:
        return Episode().then(await generate(prompt.token_ids))


@contextmanager
def run_of(folder: Path) -> Iterator[RunConfig]:
    """The demo's config on a model and data in `folder`, while Ray runs."""
    file, *words = demo_run(folder)
    words.append("refit.transport=shm")
    words.append("rollout.engine_args.enable_prefix_caching=false")  # the second would have it
    config = load_config(file, words)
    start_cluster()
    try:
        yield config
    finally:
        ray.shutdown()


def request_of(step: int, prompts: Sequence[Prompt], config: RunConfig) -> RolloutRequest:
    return RolloutRequest(
        id=str(step),
        step=step,
        prompts=tuple(prompts),
        num_samples=NUM_SAMPLES,
        temperature=1.0,
        top_p=1.0,
        max_response_tokens=config.rollout.max_response_tokens,
    )


def prompts_of(step: int) -> list[Prompt]:
    return [
        Prompt(
            id=f"made/{step}/{number}",
            text="",
            token_ids=tuple((7 * step + 13 * number + j * j) % 90 + 5 for j in range(40)),
            question="",
            answer="7",
        )
        for number in range(NUM_PROMPTS)
    ]


async def seconds_of_pairs(config: RunConfig, num_pairs: int) -> list[tuple[float, float]]:
    """Seconds in both environments, request after request."""
    cluster = nodes(is_ours=True)
    (place,) = place_engines(cluster, (), num_engines=1, tensor_parallel=1, placement="dedicated")

    def spawn(index: int) -> EngineActor:
        log = RunDirectory.of(config.output_dir).engine_log(index)
        return create_actor(
            Engine, config, model_path=config.model.path, log_file=log, placement=place,
            is_restart=False,
        )  # fmt: skip

    fleet, scorer = UpdatableFleet(config, spawn, version=0), Scorer(config, config.model.path)
    await asyncio.gather(fleet.start(), scorer.start())
    found: list[tuple[float, float]] = []
    try:
        runners = [
            EpisodeRunner(
                replace(config, rollout=replace(config.rollout, environment=name)),
                scorer.tokenizer,
                fleet,
            )
            for name in ENVIRONMENTS
        ]
        sides = [Rounds(config.seed, runner, scorer) for runner in runners]
        for step in range(num_pairs + 2):
            request = request_of(step, prompts_of(step), config)
            took, made = [0.0, 0.0], list[list[tuple[int, ...]]]([[], []])
            for side in (0, 1) if step % 2 else (1, 0):
                begun = time.monotonic()
                selection, _ = await sides[side].until_full(request, RolloutCount())
                took[side] = time.monotonic() - begun
                made[side] = [tuple(rollout.token_ids) for rollout in selection.result()[0]]
            if made[0] != made[1] or not any(made[0]):
                raise SystemExit("error: the two environments gave other tokens")
            if step >= 2:  # the first ones find nothing warm
                found.append((took[0], took[1]))
    finally:
        await fleet.shutdown()
        await scorer.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument(
        "--out", type=Path, default=provenance.ROOT / "benchmarks/results/environment.json"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, run_of(Path(folder)) as config:
        pairs = asyncio.run(seconds_of_pairs(config, options.pairs))
    ratio = statistics.median(own / single for single, own in pairs)
    rates = [
        NUM_PROMPTS * NUM_SAMPLES / statistics.median(side) for side in zip(*pairs, strict=True)
    ]
    for name, rate in zip(ENVIRONMENTS, rates, strict=True):
        print(f"{name:32} {rate:7.0f} rollouts/s")
    said = "met" if ratio <= TARGET else "missed"
    print(f"median of {len(pairs)} ratios: {ratio:.3f} (target {TARGET}: {said})")
    provenance.write(
        options.out,
        {
            "rollouts_per_s": dict(zip(ENVIRONMENTS, rates, strict=True)),
            "median_ratio": ratio,
            "seconds": pairs,
        },
        device=torch.device("cpu"),
        features=["environment"],
    )


if __name__ == "__main__":
    main()
