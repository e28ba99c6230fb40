"""What `sft` does with what is in its output_dir, and `train` with a warm start there.

Model and examples are stand-ins. With real ones: tests/dist/test_warm_start.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from made.run_states import RUN, save
from safetensors.torch import save_file

from sfpo_megatron import cli, sft
from sfpo_megatron.checkpoints.identity import Kind, RunRecord
from sfpo_megatron.checkpoints.remembered_shape import KEY
from sfpo_megatron.checkpoints.store import CheckpointError, store_of
from sfpo_megatron.config.tree import RunConfig, SFTConfig
from sfpo_megatron.data.sft import SFTExample
from sfpo_megatron.outputs.directory import RunDirectory
from sfpo_megatron.run import warm_start
from sfpo_megatron.run.continuing import decide, prepare_output
from sfpo_megatron.run.same_model import print_of
from sfpo_megatron.tracking.tracker import NoTracker


def said(capsys: pytest.CaptureFixture[str]) -> str:
    """The line of `check` about the start."""
    assert cli.main(["check", "run.yaml"]) == 0
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("train ")]
    return line.removeprefix("train ")


class Stop(Exception):
    """Far enough: what follows needs a model. On rank 0 with the date that the examples print."""


def run_sft(config: RunConfig, monkeypatch: pytest.MonkeyPatch, *, rank: int, fresh: bool) -> None:
    """A rank of `sft`, up to where it builds the policy."""
    told = [None, RUN, "what rank 0 has decided"]
    control = SimpleNamespace(
        rank=rank, broadcast_json=lambda value=None: value if rank == 0 else told
    )

    def sft_length(*_: object) -> None:
        raise Stop

    monkeypatch.setattr(warm_start, "ControlGroup", lambda _: control)

    def read_examples(config: RunConfig, *, now: str | None) -> None:
        raise Stop(now)

    monkeypatch.setattr(warm_start, "read_examples", read_examples)
    monkeypatch.setattr(warm_start, "sft_length", sft_length)
    capabilities: Any = None
    sft.run(config, capabilities, fresh=fresh)


@pytest.mark.parametrize("rank", [0, 1])
def test_fresh_sets_a_run_aside_before_a_warm_start(
    rank: int, config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0 alone does, and before it takes any memory."""
    directory = RunDirectory.of(config.output_dir)
    RunRecord.new(run_id=RUN).write(directory)
    save(config, 3)
    directory.metrics.write_text('{"step": 3}\n')
    with pytest.raises(Stop):
        run_sft(config, monkeypatch, rank=rank, fresh=True)
    record = RunRecord.read(directory)
    assert record is not None and (record.run_id == RUN) == directory.metrics.exists() == (
        rank == 1
    )
    assert record.kind == ("sft" if rank == 0 else "train")
    assert set(store_of(config).steps()) == ({3} if rank == 1 else set())
    if rank == 0:
        assert (directory.path / "run.json.previous-1").is_file()
        assert (directory.path / "checkpoints.previous-1/step_0000003").is_dir()
        assert (directory.path / "metrics.previous-1.jsonl").read_text() == '{"step": 3}\n'


def test_a_warm_start_does_not_write_among_the_lines_of_a_run(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Stop):  # nothing there
        run_sft(config, monkeypatch, rank=0, fresh=False)
    RunRecord.new(run_id=RUN).write(RunDirectory.of(config.output_dir))
    with pytest.raises(Stop):  # ended before its first checkpoint
        run_sft(config, monkeypatch, rank=0, fresh=False)
    RunRecord.new(run_id=RUN).write(RunDirectory.of(config.output_dir))
    save(config, 3)
    with pytest.raises(CheckpointError, match=r"the last of step 3\).*--fresh"):
        run_sft(config, monkeypatch, rank=0, fresh=False)


def state_of(run_id: str, kind: str) -> str:
    return json.dumps({"format": 2, "run_id": run_id, "kind": kind})


def test_a_warm_start_continues_as_a_run_does(config: RunConfig) -> None:
    store = store_of(config)
    first = decide(config, store, fresh=False, kind="sft")
    assert first.found is None and first.said == f"run {first.run_id} begins"
    again = decide(config, store, fresh=False, kind="sft")
    assert again == first  # ended before its first checkpoint
    save(config, 2, state_of(first.run_id, "sft"))
    for _ in range(2):
        found = decide(config, store, fresh=False, kind="sft")
        assert found.run_id == first.run_id and found.continued_step == 2
        RunDirectory.of(config.output_dir).record.unlink()  # then the checkpoint says it
    record = RunRecord.read(RunDirectory.of(config.output_dir))
    assert record is None
    assert decide(config, store, fresh=True, kind="sft").run_id != first.run_id


def test_a_warm_start_continues_with_its_date(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = decide(config, store_of(config), fresh=False, kind="sft")
    state = json.loads(state_of(begun.run_id, "sft"))
    save(config, 2, json.dumps({**state, "data": {"prompts": {"now": "2026-01-31T23:59:00"}}}))
    for fresh, date in ((False, "2026-01-31T23:59:00"), (True, None)):
        with pytest.raises(Stop) as stopped:
            run_sft(config, monkeypatch, rank=0, fresh=fresh)
        assert stopped.value.args == (date,)


def test_a_warm_start_continues_as_the_same_model(
    config: RunConfig, model_dir: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another config.json is refused; other weights in model.path are of no matter, whatever
    objective.kl says: the checkpoint has its own, and there is no reference."""
    model = model_dir()
    save_file({"model.embed_tokens.weight": torch.zeros(4)}, model / "model.safetensors")
    objective = replace(config.objective, kl=replace(config.objective.kl, coef=0.1))
    config = replace(
        config, model=replace(config.model, path=str(model)), objective=objective, sft=SFTConfig()
    )
    begun = decide(config, store_of(config), fresh=False, kind="sft")
    state = json.loads(state_of(begun.run_id, "sft")) | {KEY: print_of(str(model))}
    save(config, 2, json.dumps({**state, "data": {"prompts": {}}}))

    met: list[str] = []
    control = SimpleNamespace(
        rank=0, broadcast_json=lambda value=None: value, barrier=lambda: met.append("barrier")
    )
    examples, told = SimpleNamespace(epoch_size=8, held_out=(), stream=None), []
    for name, stand_in in {
        "ControlGroup": lambda _: control,
        "read_examples": lambda config, *, now: examples,
        "sft_length": lambda config, *_: config,
        "_open_sinks": lambda *given: told.append(given[-1]),
        "hold_to_data": lambda *_, accept: "the same data",
    }.items():
        monkeypatch.setattr(warm_start, name, stand_in)

    def start() -> None:
        with warm_start.open_warm_start(config) as warm:
            assert warm.opened.start.continued_step == 2 and not met
        assert met == ["barrier"], "the other ranks have to wait for rank 0"

    save_file({"model.embed_tokens.weight": torch.ones(4)}, model / "model.safetensors")
    start()
    assert told == [["the same data"]]
    file = model / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"rms_norm_eps": 0.5}))
    with pytest.raises(CheckpointError, match=r"found norm_eps 0\.5 .*as in step_0000002"):
        start()
    assert told == [["the same data"]], "nothing in RUN is replaced by a start that is refused"


def test_held_out_losses_on_other_examples_do_not_compare(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `Best` holds them to says what the loss is taken on, and nothing where nothing is."""
    control = SimpleNamespace(
        rank=0,
        broadcast_json=lambda value=None: value,
        broadcast=lambda value: value,
        barrier=lambda: None,
    )
    for name, stand_in in {
        "ControlGroup": lambda _: control,
        "sft_length": lambda config, *_: config,
        "_open_sinks": lambda *_: NoTracker(),
    }.items():
        monkeypatch.setattr(warm_start, name, stand_in)

    def asked(*learned: int) -> str:
        held_out = tuple(
            SFTExample(prompt_ids=(1,), response_ids=(token,), learned=(True,)) for token in learned
        )
        examples = SimpleNamespace(epoch_size=8, held_out=held_out, stream=None)
        monkeypatch.setattr(warm_start, "read_examples", lambda *_, **__: examples)
        with warm_start.open_warm_start(replace(config, sft=SFTConfig()), fresh=True) as warm:
            return warm.opened.ends.best.asked

    assert asked() == ""
    assert asked(2, 3) == asked(2, 3) != asked(2, 4) != ""


@pytest.mark.parametrize("has", ["checkpoints", "a record", "both"])
def test_a_run_after_a_warm_start_in_one_directory(
    has: str, config: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is a new run; what the warm start has is kept under other names, its hf/ stays."""
    begun = decide(config, store_of(config), fresh=False, kind="sft")
    directory = prepare_output(config)
    directory.metrics.write_text('{"step": 100, "loss": 1.0}\n')
    directory.hf.mkdir()
    if has != "a record":
        save(config, 2, state_of(begun.run_id, "sft"))
    if has == "checkpoints":
        directory.record.unlink()
    outlook = f"sets aside the warm start in {directory.path} and begins a new run"
    assert said(capsys) == outlook.replace("in run ", f"in {Path.cwd()}/run ")
    start = decide(config, store_of(config), fresh=False)
    assert start.found is None and start.said.startswith(f"run {start.run_id} begins; the warm")
    prepare_output(config)
    assert not directory.metrics.exists() and directory.hf.is_dir()
    kept = directory.path / "metrics.previous-1.jsonl"
    assert kept.read_text() == '{"step": 100, "loss": 1.0}\n'
    if has != "a record":
        assert (directory.path / "checkpoints.previous-1/step_0000002").is_dir()
    assert decide(config, store_of(config), fresh=False).run_id == start.run_id
    save(config, 2, state_of(start.run_id, "train"))
    assert decide(config, store_of(config), fresh=False).said.endswith("continues after step 2")
    with pytest.raises(CheckpointError, match=r"the last of step 2\).*--fresh"):
        decide(config, store_of(config), fresh=False, kind="sft")


def test_other_weights_than_those_of_the_reference(config: RunConfig, tmp_path: Path) -> None:
    """A KL penalty holds the policy near model.path at every start: a run from the weights of a
    warm start or of Megatron-LM is refused, and nothing is set aside for it."""
    other = replace(config, output_dir=str(tmp_path / "other"))
    begun = decide(other, store_of(other), fresh=False, kind="sft")
    save(other, 7, state_of(begun.run_id, "sft"))
    where = str(store_of(other).folder / "step_0000007")
    config = replace(config, checkpoint=replace(config.checkpoint, resume=where))
    kl = replace(config.objective, kl=replace(config.objective.kl, coef=0.1))
    with pytest.raises(
        CheckpointError, match=r"step_0000007.*objective\.kl\.coef 0\.1.*model\.path"
    ):
        decide(replace(config, objective=kl), store_of(config), fresh=False)
    assert RunRecord.read(RunDirectory.of(config.output_dir)) is None
    assert decide(config, store_of(config), fresh=False).found is not None


@pytest.mark.parametrize("kinds", [("sft", "train"), ("train", "sft")])
@pytest.mark.parametrize("inside", [True, False])
def test_the_weights_of_the_other_command(
    kinds: tuple[Kind, Kind], inside: bool, config: RunConfig, tmp_path: Path
) -> None:
    """checkpoint.resume at a checkpoint of the other command gives its weights alone: it has no
    gate, or no examples. Even where it lies in the same output_dir and is set aside for it."""
    made_by, starts = kinds
    other = config if inside else replace(config, output_dir=str(tmp_path / "other"))
    begun = decide(other, store_of(other), fresh=False, kind=made_by)
    save(other, 7, state_of(begun.run_id, made_by))
    where = str(store_of(other).folder / "step_0000007")
    config = replace(config, checkpoint=replace(config.checkpoint, resume=where))
    start = decide(config, store_of(config), fresh=inside and starts == "sft", kind=starts)
    assert start.found is not None and start.continued is None and start.continued_step == 0
    assert start.found.directory.is_dir() and start.run_id != begun.run_id
    assert ("previous-1" in str(start.found.directory)) == inside
    record = RunRecord.read(RunDirectory.of(config.output_dir))
    assert record is not None and record.kind == starts
