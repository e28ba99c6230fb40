"""(b) 1 + (snapshot + reposition + extra gathers) / passes, timed inside the same SFPO steps.

The product's own `sfpo_step`, `run_pass` and Megatron set-up on torchrun ranks (this file is also
what each rank runs): data parallel 2 on CPU, one GPU otherwise. Random weights, random tokens,
random rewards; 16k tokens or more a rollout batch. The reposition's time holds the copy of main
into model params. A gather that the reposition has made due runs in the slow correction, as one
that an optimizer step has made due would; how many there are is counted.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.overhead.weights import SIZES, Sizes
from sfpo_megatron.host.processes import end_with_parent

K, ALPHA, MINIBATCHES = 3, 0.8, 2
NUM_PROMPTS, GROUP_SIZE, PROMPT_TOKENS, RESPONSE_TOKENS = 32, 8, 16, (32, 80)
MAX_OVERHEAD = 1.01
VARIANTS = {
    "cpu": (("float32", "device"), ("bfloat16", "device")),
    "cuda": (("bfloat16", "device"), ("bfloat16", "host")),
}
"""Model dtype and `sfpo.snapshot`."""
DEMO = Sizes(hidden=128, ffn=256, layers=2, vocab=383, heads=4, kv_heads=2)
"""The demo's model. A small one is the hard case: calls cost as much as with a large one."""


def measure(device: torch.device, num_steps: int) -> list[dict[str, Any]] | str:
    """A row for each variant, or why there is none."""
    if importlib.util.find_spec("megatron") is None:
        return "not measured: megatron-core is not installed"
    sizes, world = (DEMO, 2) if device.type == "cpu" else (SIZES["500M"], 1)
    with tempfile.TemporaryDirectory() as folder:
        sizes.save(Path(folder), torch.float32)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [
            f"--nproc-per-node={world}",
            "-m",
            "benchmarks.overhead.steps",
            folder,
            str(num_steps),
        ]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        subprocess.run(command, check=True, env=environment, cwd=Path(__file__).parents[2])
        return json.loads((Path(folder) / "rows.json").read_text(encoding="utf-8"))


def random_batch(vocab: int) -> Any:
    """One rollout batch, the same on every rank."""
    from sfpo_megatron.types import RolloutBatch

    random = torch.Generator().manual_seed(1)
    num = NUM_PROMPTS * GROUP_SIZE
    responses = torch.randint(*RESPONSE_TOKENS, (num,), generator=random)
    prompts = torch.full((num,), PROMPT_TOKENS)
    rewards = torch.randint(0, 2, (num,), generator=random).float()
    return RolloutBatch(
        group_size=GROUP_SIZE,
        prompt_lengths=prompts,
        response_lengths=responses,
        token_ids=torch.randint(0, vocab, (int((prompts + responses).sum()),), generator=random),
        generator_logprobs=torch.zeros(int(responses.sum())),
        response_mask=torch.ones(int(responses.sum()), dtype=torch.bool),
        rewards=rewards,
        correct=rewards > 0,
        finished=torch.ones(num, dtype=torch.bool),
        weight_version=0,
    )


def run_config(folder: Path, dtype: str, snapshot: str) -> Any:
    from sfpo_megatron.config import tree

    return tree.RunConfig(
        output_dir=str(folder / "run"),
        model=tree.ModelConfig(path=str(folder), dtype=dtype),
        parallel=tree.ParallelConfig(data=None),
        train=tree.TrainConfig(
            prompts_per_step=NUM_PROMPTS,
            group_size=GROUP_SIZE,
            minibatches_per_step=MINIBATCHES,
            max_tokens_per_microbatch=4096,
        ),
        sfpo=tree.SFPOConfig(num_fast_passes=K, alpha=ALPHA, snapshot=snapshot),
        data=tree.DataConfig(
            train=(tree.DataSource(source="reasoning_gym", task="chain_sum", size=4),)
        ),
    )


class Stopwatch:
    """Seconds of a call, with all that it has put on the current stream. A copy on a stream of its
    own counts where it is waited for, as in a run: that of a snapshot in the first pass."""

    def __init__(self) -> None:
        self.times: dict[str, float] = {}

    def __call__(self, name: str, call: Callable[..., Any], *args: Any) -> Any:
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()
        start = time.perf_counter()
        result = call(*args)
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()
        self.times[name] = self.times.get(name, 0.0) + time.perf_counter() - start
        return result


class TimedSnapshot:
    def __init__(self, snapshot: Any, watch: Stopwatch) -> None:
        self._snapshot, self._watch = snapshot, watch

    def take(self) -> None:
        self._watch("snapshot", self._snapshot.take)

    def reposition(self, alpha: float) -> None:
        self._watch("reposition", self._snapshot.reposition, alpha)


def count_gathers() -> list[int]:
    """Sizes of the all-gathers from now on. Before Megatron is imported: it keeps the function."""
    found: list[int] = []
    original = torch.distributed.all_gather_into_tensor

    def counting(output: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        found.append(output.numel())
        return original(output, *args, **kwargs)

    torch.distributed.all_gather_into_tensor = counting
    return found


def run_variant(
    folder: Path, num_steps: int, gathers: list[int], capabilities: Any, dtype: str, where: str
) -> dict[str, Any]:
    from sfpo_megatron.mcore import setup
    from sfpo_megatron.mcore.batches import cut
    from sfpo_megatron.mcore.passes import compute_logprobs, run_pass, set_old_logprobs
    from sfpo_megatron.objectives.objective import PolicyObjective
    from sfpo_megatron.run.slow_snapshot import slow_snapshot
    from sfpo_megatron.sfpo import sfpo_step
    from sfpo_megatron.snapshots.predicted import Scales

    config = run_config(folder, dtype, where)
    lr = setup.LRSchedule(peak=1e-6, floor=0.0, warmup_ticks=0, total_ticks=9, style="constant")
    policy = setup.build_policy(config, capabilities, lr, model_path=config.model.path)
    batch = random_batch(policy.shape.vocab_size)
    minibatches = cut(config, policy, batch)
    set_old_logprobs(minibatches, compute_logprobs(policy, minibatches, temperature=1.0))
    one_pass = partial(run_pass, policy, minibatches, PolicyObjective.of(config))

    gathers.clear()
    for _ in range(K + 1):  # what the same optimizer steps gather without SFPO; also warms up
        one_pass()
    policy.shards.params_ready()
    without = len(gathers)
    snapshot = slow_snapshot(config, policy, Scales())
    overheads, parts, most = [], {"snapshot": [], "reposition": [], "pass": []}, 0
    for _ in range(num_steps):
        gathers.clear()
        watch = Stopwatch()
        results = sfpo_step(
            partial(watch, "pass", one_pass), TimedSnapshot(snapshot, watch),
            num_fast_passes=K, alpha=ALPHA,
        )  # fmt: skip
        policy.shards.params_ready()
        assert all(m.grad_norm > 0 for r in results for m in r.minibatches), "nothing was trained"
        most = max(most, len(gathers))
        overheads.append(1 + (watch.times["snapshot"] + watch.times["reposition"])
                         / watch.times["pass"])  # fmt: skip
        for name, seconds in parts.items():
            seconds.append(watch.times[name])
    median = torch.tensor([statistics.median(overheads)], dtype=torch.float64)
    worst = policy.control.max(median).item()
    missed = goals_missed(worst, most, without)
    return {
        "dtype": dtype,
        "snapshot": where,
        "ranks": torch.distributed.get_world_size(),
        "num_params": sum(p.numel() for c in policy.chunks for p in c.parameters()),
        "tokens_a_batch": batch.token_ids.numel(),
        "num_steps": num_steps,
        "passes_s": statistics.median(parts["pass"]),
        "snapshot_s": statistics.median(parts["snapshot"]),
        "reposition_s": statistics.median(parts["reposition"]),
        "gathers_with": most,
        "gathers_without": without,
        "overhead": worst,
        "reached": not missed,
        "missed": missed,
    }


def goals_missed(overhead: float, gathers: int, gathers_without: int) -> list[str]:
    """What a row does not reach, in words."""
    missed = []
    if overhead > MAX_OVERHEAD:
        missed.append(f"overhead {overhead:.4f}, to reach: at most {MAX_OVERHEAD}")
    if gathers > gathers_without:
        missed.append(f"{gathers} gathers, to reach: at most the {gathers_without} without SFPO")
    return missed


HEADER = (
    "| dtype | snapshot | ranks | params | tokens | steps | passes s | snapshot ms "
    "| reposition ms | gathers (without SFPO) | overhead | reached |\n" + "|---" * 12 + "|"
)


def line(row: dict[str, Any]) -> str:
    return (
        f"| {row['dtype']} | {row['snapshot']} | {row['ranks']} | {row['num_params']:,} "
        f"| {row['tokens_a_batch']:,} | {row['num_steps']} | {row['passes_s']:.2f} "
        f"| {1e3 * row['snapshot_s']:.2f} | {1e3 * row['reposition_s']:.2f} "
        f"| {row['gathers_with']} ({row['gathers_without']}) "
        f"| {row['overhead']:.5f} "
        f"| {'yes' if row['reached'] else 'NO: ' + '; '.join(row['missed'])} |"
    )


def main() -> None:
    """One rank."""
    # Torchrun gives it a session of its own, which who ends the benchmark does not reach.
    end_with_parent(signal.SIGKILL)
    folder, num_steps = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    gathers = count_gathers()
    from sfpo_megatron.mcore import setup

    variants = VARIANTS["cuda" if torch.cuda.is_available() else "cpu"]
    capabilities = setup.init_distributed(run_config(folder, *variants[0]))
    rows = [run_variant(folder, num_steps, gathers, capabilities, *variant) for variant in variants]
    if torch.distributed.get_rank() == 0:
        (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    setup.shut_down()


if __name__ == "__main__":
    main()
