"""`sft` against transformers in float64 with labels of -100, and its exact resume.

Not exercised here: conversations by pretrained templates, a kill (tests/e2e does for `train`),
pipeline and context parallelism, which share the passes of the RL loop.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import references
from harness import DP2, TP1, TP2, on_ranks
from made.batches import make_batch

from sfpo_megatron.config.tree import (
    CheckpointConfig,
    DataConfig,
    DataSource,
    RunConfig,
    SFTConfig,
    TrackingConfig,
)
from sfpo_megatron.outputs.cost_metrics import without_costs
from sfpo_megatron.outputs.declared import undeclared
from sfpo_megatron.outputs.directory import RunDirectory
from sfpo_megatron.outputs.metric_list import WARM_START

if TYPE_CHECKING:
    from workbench import Workbench


@on_ranks(TP1, TP2, DP2)
def test_loss_and_gradients_are_those_of_transformers(bench: Workbench) -> None:
    """Ragged rows, a mask with holes, two rows without a learned token, several microbatches. The
    mean over all learned tokens, whatever the split: within 1e-6 of the loss and 1e-5 of the
    gradient's largest element."""
    import exact_gradients

    from sfpo_megatron.mcore.passes import _forward_backward
    from sfpo_megatron.objectives.objective import NextTokenObjective
    from sfpo_megatron.sft import Teacher

    model = references.TRAINED[0]
    exact = exact_gradients.load_next_token(bench.directory, model)
    saved = references.load_batch(bench.directory, 0)
    batch = make_batch(**saved, response_mask=exact.response_mask)
    policy = bench.policy(model, max_tokens=60)
    teacher = Teacher(bench.config_of(policy), policy)
    measured, num_tokens = teacher.loss_of((batch, batch))
    assert num_tokens == 2 * int(exact.response_mask.sum())
    assert abs(measured - exact.loss) < 1e-6 * exact.loss

    (minibatch,) = teacher.cut(batch)
    assert len(minibatch.microbatches) > 1
    for chunk in policy.chunks:
        chunk.zero_grad_buffer()
    policy.optimizer.zero_grad()
    policy.shards.ready_for_training()
    objective = NextTokenObjective()
    totals = [_forward_backward(policy, minibatch, objective)]
    (reduced,) = policy.statistics.reduce(objective, totals)
    assert abs(reduced.loss / objective.normalizer(minibatch) - exact.loss) < 1e-6 * exact.loss
    exact.assert_equal(bench.hf_gradients(policy))


class StopsAtThree:
    """A sink that asks the run to stop while it makes its third step."""

    def __init__(self, run: Any) -> None:
        self._file = RunDirectory.of(run.config.output_dir).stop_file

    def log(self, metrics: Any) -> None:
        if metrics["step"] == 3 and "loss" in metrics:
            self._file.write_text("a test\n")

    def text(self, line: str) -> None:
        """Nothing is shown."""

    def close(self) -> None:
        """Nothing is kept."""


@on_ranks(TP1, TP2, DP2, only=["DP2"])
def test_a_run_that_was_stopped_goes_on_in_the_same_bits(bench: Workbench) -> None:
    """Two epochs of twelve rows in six steps, straight, and in three and three: the exported
    weights and every metric are the same. Under a schedule with warm-up and decay, with the loss on
    held-out rows in between, which must not leave a trace in the weights."""
    import torch.distributed as dist

    from sfpo_megatron import sft
    from sfpo_megatron.checkpoints.store import store_of

    folder = bench.directory / f"warm-{bench.layout.name}"
    if bench.rank == 0:
        _prepare(folder, bench.directory / references.TRAINED[0])
    dist.barrier()

    def run(name: str, *sinks: str, eval_every: int = 2) -> tuple[bool, str, list[Any]]:
        config = _config(bench, folder, name, sinks, eval_every)
        stopped = sft.run(config, bench.capabilities)
        directory = RunDirectory.of(config.output_dir)
        weights = directory.hf / "model.safetensors"
        dist.barrier()
        digest = hashlib.sha256(weights.read_bytes()).hexdigest() if weights.exists() else ""
        lines = [json.loads(line) for line in directory.metrics.read_text().splitlines()]
        timeless = [without_costs(line) for line in lines]
        return stopped, digest, timeless

    stopped, digest, lines = run("straight")
    assert not stopped and digest
    assert not [undeclared(line, WARM_START) for line in lines if undeclared(line, WARM_START)]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 6 and losses[-1] < losses[0]
    assert [x["step"] for x in lines if "eval/loss" in x] == [0, 2, 4, 6]
    cosine = [1e-4 + 9e-4 * (1 + math.cos(math.pi * i / 4)) / 2 for i in (1, 2, 3, 4)]
    rates = [5e-4, 1e-3, *cosine]  # by the optimizer's own param groups
    found = [x["lr"] for x in lines if "lr" in x]
    assert all(math.isclose(a, b, rel_tol=1e-9) for a, b in zip(found, rates, strict=True)), found
    assert run("unmeasured", eval_every=0)[1] == digest

    stopped, nothing, first = run("parts", "test_warm_start:StopsAtThree")
    config = _config(bench, folder, "parts", (), 2)
    assert stopped and nothing == "" and first == lines[: len(first)]
    assert set(store_of(config).steps()) == {3} and first[-1]["step"] == 3
    dist.barrier()
    if bench.rank == 0:
        RunDirectory.of(config.output_dir).stop_file.unlink()  # as the launcher does
    dist.barrier()
    assert run("parts") == (False, digest, lines)
    assert set(store_of(config).steps()) == {3, 6}


def _prepare(folder: Path, model: Path) -> None:
    """A model with a tokenizer and a chat template, and rows of all kinds."""
    from tests.e2e import tiny

    (folder / "model").mkdir(parents=True)
    for file in model.iterdir():
        (folder / "model" / file.name).symlink_to(file)
    tiny.make_tokenizer(folder / "model", ("<pad>", "<eos>", *"0123456789+=. "))
    settings = folder / "model" / "tokenizer_config.json"
    template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"chat_template": template}))
    talk = [("user", "1+1="), ("assistant", "2."), ("user", "2+2="), ("assistant", "4.")]
    rows: list[Any] = [{"prompt": f"{i}+3=", "answer": str(i + 3)} for i in range(6)]
    rows += [{"prompt": f"{i}+4=", "completion": f"{i}+4={i + 4}."} for i in range(5)]
    rows += [{"messages": [{"role": role, "content": text} for role, text in talk]}]
    for name, part in (("rows", rows), ("exam", [{"prompt": "9+9=", "answer": "18"}])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))


def _config(
    bench: Workbench, folder: Path, name: str, sinks: tuple[str, ...], eval_every: int
) -> RunConfig:
    config = bench.config(references.TRAINED[0], max_tokens=24)
    rows, exam = (
        (DataSource(source="jsonl", path=str(folder / f"{name}.jsonl")),)
        for name in ("rows", "exam")
    )
    return dataclasses.replace(
        config,
        output_dir=str(folder / name),
        model=dataclasses.replace(config.model, path=str(folder / "model")),
        data=DataConfig(train=rows, eval=exam),
        sft=SFTConfig(
            num_epochs=2,
            examples_per_step=4,
            lr=1e-3,
            lr_warmup_steps=2,
            lr_floor=1e-4,
            eval_every=eval_every,
        ),
        checkpoint=CheckpointConfig(every=50),
        tracking=TrackingConfig(sinks=("jsonl", *sinks)),
    )
