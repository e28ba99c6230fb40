"""A train step's line: what is counted, timed and compared, and that each key is declared.

tests/e2e holds the lines of whole runs to the declared names; here is what they come from.
"""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from made.batches import make_batch
from made.configs import run_config
from made.model_files import CONFIG

from sfpo_megatron.families.shape import model_shape
from sfpo_megatron.outputs.cost_metrics import COSTS
from sfpo_megatron.outputs.declared import Metric, table, undeclared
from sfpo_megatron.outputs.metric_list import EVALUATION, TRAIN_STEP, WARM_START
from sfpo_megatron.planner.hardware import GPUS, gpu_named
from sfpo_megatron.planner.time import forward_flops
from sfpo_megatron.run import peak, speed
from sfpo_megatron.run.metrics import Totals, batch_metrics, rank_metrics
from sfpo_megatron.tracking.memory import ResidentPeak, peak_memory
from sfpo_megatron.tracking.timers import Timers


def batch_of(lengths: list[int], rewards: list[float], group_size: int = 2) -> Any:
    """Prompts of 3 tokens; what has a reward of 1 is correct."""
    given = torch.tensor(rewards)
    return make_batch(
        torch.full((len(lengths),), 3),
        torch.tensor(lengths),
        rewards=given,
        correct=given >= 1,
        group_size=group_size,
    )


# ---- the batch ------------------------------------------------------------------------------


def test_groups_that_all_and_that_none_has_solved() -> None:
    found = batch_metrics(batch_of([1] * 8, [1, 1, 1, 0, 0, 0, 0, 0.5]), Totals())
    assert found["solved_by_all"] == 0.25 and found["solved_by_none"] == 0.5
    assert found["zero_variance_groups"] == 0.5  # another thing: 0 and 0.5 differ


@pytest.mark.parametrize("num", [1, 2, 10, 11, 100])
def test_percentiles_are_values_of_the_batch(num: int) -> None:
    """The smallest of 1 to n that has that share of them at or below it."""
    lengths = torch.randperm(num, generator=torch.Generator().manual_seed(0)) + 1
    found = batch_metrics(batch_of(lengths.tolist(), [0.0] * num, group_size=1), Totals())
    for share in (10, 50, 90):
        expected = next(n for n in range(1, num + 1) if n * 100 >= share * num)
        assert found[f"response_tokens_p{share}"] == expected
    assert found["response_tokens_max"] == num and found["reward_max"] == 0.0


# ---- ranks, memory, speed -------------------------------------------------------------------


class Control:
    """Three ranks, of which this one is the first."""

    size = 3

    def __init__(self, *others: tuple[dict[str, float], dict[str, int]]) -> None:
        self._others = others

    def all_gather_json(self, own: Any) -> list[Any]:
        return [own, *self._others]


def test_the_slowest_rank_is_named() -> None:
    control: Any = Control(
        ({"time/logprob_s": 3.0, "time/step_s": 9.0}, {"step": 50, "logprob": 20}),
        ({"time/logprob_s": 1.0, "time/step_s": 9.0}, {"step": 40, "logprob": 30}),
    )
    own = {"time/logprob_s": 2.0, "time/step_s": 9.0}
    assert rank_metrics(control, own, {"step": 60, "logprob": 10}) == {
        "ranks/logprob_max_s": 3.0,
        "ranks/logprob_min_s": 1.0,
        "ranks/logprob_slowest": 1,
        "memory/step_peak_bytes": 60,
        "memory/logprob_peak_bytes": 30,
    }


@pytest.mark.parametrize(
    "phase", ["reference", "passes", "reposition", "refit", "onload", "offload"]
)
def test_phases_that_every_rank_has_a_part_in(phase: str) -> None:
    """Whatever rank 0 alone has besides is compared with nobody."""
    control: Any = Control(({f"time/{phase}_s": 0.5}, {}), ({f"time/{phase}_s": 4.0}, {}))
    own = {f"time/{phase}_s": 2.0, "time/generate_s": 9.0, "num_preemptions": 0}
    assert rank_metrics(control, own, {}) == {
        f"ranks/{phase}_max_s": 4.0,
        f"ranks/{phase}_min_s": 0.5,
        f"ranks/{phase}_slowest": 2,
    }


def test_one_rank_is_compared_with_nobody() -> None:
    control: Any = Control()
    assert rank_metrics(control, {"time/passes_s": 1.0}, {}) == {}


def policy_of(dtype: str, num_ranks: int) -> Any:
    control = SimpleNamespace(size=num_ranks)
    return SimpleNamespace(shape=model_shape(CONFIG), dtype=dtype, control=control)


TIMES = {"time/generate_s": 2.0, "time/passes_s": 4.0, "time/step_s": 8.0, "num_passes": 3}


def test_tokens_a_second() -> None:
    """4 prompts of 3 tokens, 20 of responses; 2 ranks and 3 engines of 2 devices each."""
    config = run_config(rollout={"num_engines": 3, "tensor_parallel": 2})
    batch = batch_of([2, 4, 6, 8], [0.0] * 4)
    policy = policy_of("float32", 2)
    found = speed.speed_metrics(config, policy, batch, TIMES, peak_flops=0.0)
    flops = forward_flops(policy.shape, 8.0)  # by the mean length
    assert found.pop("speed/model_flops_per_s") == pytest.approx(3 * flops * 32 * 3 / 4.0)
    assert found == {
        "speed/generation_tokens_per_s": 10.0,
        "speed/training_tokens_per_s": 24.0,
        "speed/tokens_per_s": 4.0,
        "speed/tokens_per_s_per_device": 0.5,
    }
    on_another_rank = {k: v for k, v in TIMES.items() if k != "time/generate_s"}
    found = speed.speed_metrics(config, policy, batch, on_another_rank, peak_flops=0.0)
    assert "speed/generation_tokens_per_s" not in found


@pytest.mark.parametrize(
    "section", [{"rollout": {"placement": "colocated"}}, {"debug": {"train_only": "file"}}]
)
def test_devices_are_counted_once(section: dict[str, Any]) -> None:
    batch = batch_of([5], [0.0], group_size=1)
    policy = policy_of("float32", 2)
    found = speed.speed_metrics(run_config(**section), policy, batch, TIMES, peak_flops=0.0)
    assert found["speed/tokens_per_s_per_device"] == 0.5


def test_mfu_is_model_flops_of_the_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    """MFU is by the planner's analytic count, which tests/unit/test_planner.py holds. What the
    peak is does not change the count, which is logged without one too."""
    monkeypatch.setattr(speed, "forward_flops", lambda shape, length: length * 1e12)
    batch, policy = batch_of([5, 9], [0.0] * 2), policy_of("bfloat16", 4)
    found = speed.speed_metrics(run_config(), policy, batch, TIMES, peak_flops=4e14)
    flops = 3 * 10e12 * 20 * 3  # mean length 10, 20 tokens, 3 passes; a backward is two forwards
    assert found["speed/model_flops_per_s"] == pytest.approx(flops / 4.0)
    assert found["speed/mfu"] == pytest.approx(flops / 4.0 / 4e14)
    unknown = speed.speed_metrics(run_config(), policy, batch, TIMES, peak_flops=0.0)
    assert unknown == {k: v for k, v in found.items() if k != "speed/mfu"}


def test_the_peak_of_gpus_is_the_vendors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    assert peak.trainer_peak_flops(policy_of("bfloat16", 4)) == 4 * 989e12
    assert peak.trainer_peak_flops(policy_of("float32", 4)) == 0.0
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Another GPU")
    assert peak.trainer_peak_flops(policy_of("bfloat16", 4)) == 0.0


class Measured:
    """Four ranks that count how often they meet; the others find what this one does."""

    size = 4

    def __init__(self) -> None:
        self.met: list[str] = []

    def barrier(self) -> None:
        self.met.append("barrier")

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        self.met.append("sum")
        return values * self.size


def test_the_peak_of_cores_is_measured_once_on_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the dtype of the model, all at once, and summed. No test says what a machine can do: here
    only that the figure is that of products of this size (`measured_flops` on its own)."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    dtypes: list[torch.dtype] = []

    def measured(dtype: torch.dtype) -> float:
        dtypes.append(dtype)
        return 5e9

    monkeypatch.setattr(peak, "measured_flops", measured)
    control, policy = Measured(), policy_of("bfloat16", 4)
    policy.control = control
    batch, followed = batch_of([5, 9], [0.0] * 2), speed.Speed(run_config(), policy)
    first, second = followed.of(batch, TIMES), followed.of(batch, TIMES)
    assert first == second and dtypes == [torch.bfloat16] and control.met == ["barrier", "sum"]
    assert first["speed/mfu"] == pytest.approx(first["speed/model_flops_per_s"] / 2e10)


def test_a_measured_peak_counts_what_was_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that a product takes 20 ms of: three of them pass the 50 ms."""
    clock = {"s": 0.0, "calls": 0}
    product = torch.mm

    def mm(*args: Any, **kwargs: Any) -> torch.Tensor:
        clock["s"], clock["calls"] = clock["s"] + 0.02, clock["calls"] + 1
        return product(*args, **kwargs)

    monkeypatch.setattr("time.perf_counter", lambda: clock["s"])
    monkeypatch.setattr(torch, "mm", mm)
    assert peak.measured_flops(torch.float32) == pytest.approx(2 * 512**3 / 0.02)
    assert clock["calls"] == 4  # the first is not timed


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100-80gb"),
        ("NVIDIA H200", "h200-141gb"),
        ("NVIDIA H20", "h20-96gb"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA A100-PCIE-40GB", "a100-80gb"),  # the same peak
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_gpus_by_the_names_that_cuda_gives_them(device: str, name: str | None) -> None:
    assert gpu_named(device) is (GPUS[name] if name is not None else None)


class Memory:
    """Peaks in the order that they are asked for."""

    def __init__(self, *peaks: int) -> None:
        self._peaks = list(peaks)

    def take_bytes(self) -> int:
        return self._peaks.pop(0)


def test_an_inner_phase_is_part_of_the_outer_one() -> None:
    timers = Timers(Memory(99, 30, 70, 20, 10, 40))
    with timers("step"):  # before it 99
        with timers("passes"):  # before it 30, in it 70
            pass
        with timers("passes"):  # before it 20, in it 10
            pass
    assert timers.take_peaks() == {"step": 70, "passes": 70}  # at its end 40
    assert timers.take_peaks() == {}


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="no clear_refs here")
def test_resident_memory_rises_and_is_forgotten() -> None:
    memory = peak_memory()
    assert isinstance(memory, ResidentPeak)
    memory.take_bytes()
    before = memory.take_bytes()
    block = bytearray(os.urandom(1)) * 2**26  # 64 MiB
    during = memory.take_bytes()
    del block
    memory.take_bytes()
    after = memory.take_bytes()
    assert during - before > 60 * 2**20 and during - after > 60 * 2**20


# ---- declared -------------------------------------------------------------------------------

ALL = (*TRAIN_STEP, *COSTS, *EVALUATION, *WARM_START)


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("pass_12/grad_norm", "pass_k/grad_norm"),
        ("pass_1/my_entropy", "pass_k/NAME"),
        ("reward/format/share", "reward/NAME"),
        ("eval/accuracy/math", "eval/accuracy/SOURCE"),
        ("ranks/passes_slowest", "ranks/PHASE_slowest"),
    ],
)
def test_a_key_by_its_declared_name(key: str, name: str) -> None:
    assert any(metric.name == name and metric.matches(key) for metric in ALL)


@pytest.mark.parametrize("key", ["pass_0/loss", "pass_k/loss", "rewards", "steps", "memory/step"])
def test_what_is_not_declared_is_found(key: str) -> None:
    assert undeclared(["step", "pass_1/loss", key], ALL) == {key}


def test_names_are_declared_once_and_said_in_full() -> None:
    for metrics in ((*TRAIN_STEP, *COSTS), EVALUATION, WARM_START):
        names = [metric.name for metric in metrics]
        assert len(names) == len(set(names))
    assert not [metric.name for metric in ALL if not metric.meaning.endswith(".")]


def test_bars_are_part_of_a_cell() -> None:
    row = table([Metric("a", "", "|x| and b.")]).splitlines()[-1]
    assert row == r"| `a` |  | \|x\| and b. |  |"
