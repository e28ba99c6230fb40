"""What starts say and do beside a plain resume: `check`, `slurm`, no checkpoints, rollouts
alone, and a checkpoint of the format before.

Model, optimizer and engines are stand-ins where a start needs none. With real ones:
tests/e2e/test_resume.py, tests/e2e/test_data_change.py.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from made.configs import run_config
from made.run_states import RUN, save

from sfpo_megatron import cli, trainer
from sfpo_megatron.checkpoints.identity import RunRecord
from sfpo_megatron.checkpoints.store import CheckpointError, Found, store_of
from sfpo_megatron.config.changes import changes
from sfpo_megatron.config.checkpoint import CheckpointConfig
from sfpo_megatron.config.tree import DataConfig, DataSource, DebugConfig, RunConfig
from sfpo_megatron.data import PromptStream
from sfpo_megatron.data.tokenize import load_tokenizer
from sfpo_megatron.host import peers
from sfpo_megatron.outputs.directory import RunDirectory
from sfpo_megatron.outputs.stopping import NoStop
from sfpo_megatron.run import ends, opening, same_data
from sfpo_megatron.run.checkpoints import Checkpoints
from sfpo_megatron.run.continuing import Start, decide, prepare_output
from sfpo_megatron.run.feed import EngineFeed
from sfpo_megatron.run.held_out import Best
from sfpo_megatron.run.learner import Learner
from sfpo_megatron.run.same_data import hold_to_data
from sfpo_megatron.run.saving import read_run_state
from tests.e2e import tiny


def said(
    command: str, capsys: pytest.CaptureFixture[str], *options: str, exit_code: int = 0
) -> str:
    """The line about the start."""
    if command == "slurm":
        options = ("--nodes=4", "--time=4:00:00", "--dry-run", *options)
    assert cli.main([command, "run.yaml", *options]) == exit_code
    who = {"check": "train ", "slurm": "the job "}[command]
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith(who)]
    return line.removeprefix(who)


@pytest.mark.parametrize("command", ["check", "slurm"])
def test_check_and_slurm_say_which_run_it_will_be(
    command: str, config: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = RunDirectory.of(config.output_dir)
    assert said(command, capsys) == "begins a new run"
    RunRecord.new(run_id=RUN).write(directory)
    assert said(command, capsys) == f"begins run {RUN} again: it has no checkpoint"
    save(config, 50)
    for resume in ("auto", "never"):
        override = f"checkpoint.resume={resume}"
        assert said(command, capsys, override) == f"continues run {RUN} after step 50"
    if command == "check":
        assert said(command, capsys, "--fresh").startswith("--fresh sets aside the run in ")
        directory.record.write_text("{}")
        assert said(command, capsys, exit_code=2).startswith("is refused: ")
    directory.record.unlink()
    assert said(command, capsys) == f"continues run {RUN} after step 50"
    assert said(command, capsys, "checkpoint.resume=never") == "begins a new run"


def test_what_a_start_would_refuse_ends_check_and_slurm(
    config: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    """Weights alone beside a KL penalty, whose reference would be model.path; a checkpoint of
    another run; one that no run has written."""
    job = ["slurm", "run.yaml", "--nodes=4", "--time=4:00:00", "--dry-run"]
    weights = Path("weights")
    weights.mkdir()
    (weights / "metadata.json").write_text("{}")
    begin = f"checkpoint.resume={weights}"
    assert said("check", capsys, begin) == f"begins a new run from {weights}"
    refused = said("check", capsys, begin, "objective.kl.coef=0.1", exit_code=2)
    assert refused.startswith("is refused: checkpoint.resume: found weights, which gives its")
    assert said("check", capsys, begin, "objective.kl.coef=0.1", "debug.rollout_only=true") == (
        "makes rollouts only"
    )
    assert cli.main([*job, begin, "objective.kl.coef=0.1"]) == 2
    assert "expected weights from model.path" in capsys.readouterr().err

    folder = store_of(config).folder
    folder.mkdir(parents=True)
    weights.rename(folder / "step_0000001")
    assert "that no run has written" in said("check", capsys, exit_code=2)
    (folder / "step_0000001").rename(weights)
    save(config, 50)
    RunRecord.new(run_id="another").write(RunDirectory.of(config.output_dir))
    assert "expected one of run another" in said("check", capsys, exit_code=2)
    assert cli.main(job) == 2
    assert "expected one of run another" in capsys.readouterr().err


@pytest.mark.parametrize("options", [[], ["--accept-data-change"]])
def test_a_job_accepts_changed_data_where_it_is_told_to(
    options: list[str], config: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["slurm", "run.yaml", "--nodes=4", "--time=4:00:00", "--dry-run", *options]
    assert cli.main(command) == 0
    wanted = " ".join(["-m sfpo_megatron train", *options, '"$CONFIG" &'])
    assert wanted in capsys.readouterr().out


class Stop(Exception):
    """Far enough: what follows needs a model."""


# ---- runs that save nothing ---------------------------------------------------------------------


def test_without_checkpoints_each_start_begins_again(config: RunConfig) -> None:
    """Under one id; metrics of each start are kept, and no stop request is taken."""
    config = replace(config, checkpoint=CheckpointConfig(every=0))
    assert not config.saves_state and isinstance(ends.stop_watch(config), NoStop)
    ids = set()
    for number in (1, 2, 3):
        start = decide(config, store_of(config), fresh=False)
        assert start.found is None
        ids.add(start.run_id)
        prepare_output(config).metrics.write_text(f'{{"step": {number}}}\n')
    assert len(ids) == 1
    kept = [Path(config.output_dir, f"metrics.previous-{n}.jsonl") for n in (1, 2)]
    assert [file.read_text() for file in kept] == ['{"step": 1}\n', '{"step": 2}\n']


def a_checkpoints(config: RunConfig) -> tuple[Checkpoints, list[str]]:
    """Beside engines and a policy that note what is asked of them."""
    asked: list[str] = []

    def note(name: str) -> Callable[..., None]:
        return lambda *_, **__: asked.append(name)

    control = SimpleNamespace(
        rank=0, all_gather_json=lambda value: [value], broadcast_json=lambda value: value
    )
    policy: Any = SimpleNamespace(control=control)
    engines: Any = SimpleNamespace(hold=note("hold"), to_trainer=note("to_trainer"))
    opened: Any = SimpleNamespace(
        start=SimpleNamespace(found=None, run_id=RUN),
        ends=SimpleNamespace(stop=NoStop(), best=Best(), feed=None),
        progress=lambda text: asked.append(text),
        important=lambda text: asked.append(text),
        store=store_of(config),
    )
    return Checkpoints(config, opened, policy, engines, {}), asked


def test_without_checkpoints_nothing_is_saved(config: RunConfig) -> None:
    """Neither at the last step nor for a run that ends with an error."""
    found, asked = a_checkpoints(replace(config, checkpoint=CheckpointConfig(every=0)))
    assert found.resume() == 0
    assert [found.after_step(step) for step in (1, config.train.num_steps)] == [False] * 2
    found.save_now(7)
    assert asked == [] and not store_of(config).folder.exists()


def test_rollouts_alone_touch_no_run(config: RunConfig) -> None:
    """The run that is there continues afterwards; with --fresh it is set aside."""
    begun = decide(config, store_of(config), fresh=False)
    save(config, 3, json.dumps({"format": 2, "run_id": begun.run_id}))
    alone = replace(config, debug=DebugConfig(rollout_only=True))
    assert not alone.saves_state
    start = decide(alone, store_of(alone), fresh=False)
    assert (start.found, start.run_id, start.said) == (None, "", "rollouts only")
    assert decide(config, store_of(config), fresh=False).said.endswith("continues after step 3")
    decide(alone, store_of(alone), fresh=True)
    again = decide(config, store_of(config), fresh=False)
    assert again.found is None and again.run_id != begun.run_id


def test_rollouts_alone_do_not_write_among_the_lines_of_a_run(config: RunConfig) -> None:
    """The run would continue on top of them, and cut them to its own step."""
    begun = decide(config, store_of(config), fresh=False)
    directory = prepare_output(config)
    directory.metrics.write_text('{"step": 3}\n')
    save(config, 3, json.dumps({"format": 2, "run_id": begun.run_id}))
    alone = replace(config, debug=DebugConfig(rollout_only=True))
    decide(alone, store_of(alone), fresh=False)
    with pytest.raises(CheckpointError, match=r"step 3\) with debug.rollout_only.*--fresh"):
        prepare_output(alone)
    assert directory.metrics.read_text() == '{"step": 3}\n'
    decide(alone, store_of(alone), fresh=True)
    prepare_output(alone)
    assert (directory.path / "metrics.previous-1.jsonl").read_text() == '{"step": 3}\n'


# ---- the format before --------------------------------------------------------------------------

VOCABULARY = ("<pad>", "<eos>", *"0123456789+=.")


def on_one_sum(config: RunConfig, folder: Path) -> RunConfig:
    tiny.make_tokenizer(folder / "model", VOCABULARY)
    (folder / "sums.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n')
    source = DataSource(source="jsonl", path=str(folder / "sums.jsonl"))
    return replace(config, data=DataConfig(train=(source,)))


@pytest.mark.parametrize("name", ["sums", "renamed"])
def test_a_checkpoint_by_commit_dcc1758_continues(
    config: RunConfig, tmp_path: Path, name: str
) -> None:
    """run_state.json is what that commit wrote after 3 steps of 16 prompts on tests/e2e's sums."""
    text = (Path(__file__).parent / "run_state_dcc1758.json").read_text()
    tiny.make_tokenizer(tmp_path / "model", VOCABULARY)
    rows = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(8) for b in range(8)]
    (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "exam.jsonl").write_text('{"prompt": "9+0=", "answer": "9"}\n')
    sources = [
        (DataSource(source="jsonl", path=str(tmp_path / f"{file}.jsonl")),)
        for file in (name, "exam")
    ]
    config = replace(config, data=DataConfig(train=sources[0], eval=sources[1]))
    save(config, 3, text)
    start = decide(config, store_of(config), fresh=False)
    assert start.found is not None and start.said.endswith("continues after step 3")
    directory = RunDirectory.of(config.output_dir)
    record = RunRecord.read(directory)
    assert record is not None and record.adopted

    state = read_run_state(start.found.directory)
    prompts = PromptStream(config, load_tokenizer(str(tmp_path / "model")))
    assert hold_to_data(prompts, start.found, state, directory, accept=False) == ""
    assert prompts.eval_names == ["eval.held_out"] and len(prompts.prompts) == 64
    policy: Any = SimpleNamespace(shards=SimpleNamespace(tensors=list))
    anything: Any = SimpleNamespace()
    learner = Learner(run_config(), policy, anything)
    feed, best = EngineFeed(config, anything, prompts), Best()
    state["data"]["rollouts"] = {}
    kept = {"gate": learner.gate, "totals": learner.totals, "data": feed, "best": best}
    for key, part in kept.items():
        part.load_state_dict(state[key])
    assert learner.gate.state_dict()["window"] == state["gate"]["window"]
    assert (learner.totals.num_rollouts, best.step) == (384, 0)
    rest = [prompt.question for prompt in prompts.next_batch(16)]
    fresh = PromptStream(config, load_tokenizer(str(tmp_path / "model")))
    drawn = [prompt.question for _ in range(4) for prompt in fresh.next_batch(16)]
    assert rest == drawn[48:]
    assert {key for key, _, _ in changes(state["config"], asdict(config))} >= {"data.train"}


def test_a_checkpoint_by_saved_rollouts_has_no_cursor(config: RunConfig, tmp_path: Path) -> None:
    """debug.train_only draws no prompt: a run with engines begins its data at the beginning."""
    config = on_one_sum(config, tmp_path)
    state: dict[str, Any] = {"data": {}, "config": asdict(config)}
    save(config, 3, json.dumps(state))
    start = decide(config, store_of(config), fresh=False)
    assert start.found is not None
    prompts = PromptStream(config, load_tokenizer(str(tmp_path / "model")))
    directory = RunDirectory.of(config.output_dir)
    assert hold_to_data(prompts, start.found, state, directory, accept=False) == ""
    client: Any = None
    EngineFeed(config, client, prompts).load_state_dict({"rollouts": {}})
    assert prompts.state_dict()["position"] == 0


@pytest.mark.parametrize("accept", [False, True])
def test_the_option_reaches_the_data_before_an_engine_starts(
    accept: bool, config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []
    config = on_one_sum(config, tmp_path)
    save(config, 3)
    start = decide(config, store_of(config), fresh=False)
    directory = prepare_output(replace(config, seed=7))
    directory.metrics.write_text('{"step": 3}\n{"step": 4}\n')
    before = [file.read_text() for file in (directory.config, directory.metrics)]
    monkeypatch.setattr(opening, "ControlGroup", lambda _: SimpleNamespace(rank=0))
    monkeypatch.setattr(opening, "find", lambda *_, **__: start)

    def hold(*_: object, accept: bool) -> str:
        asked.append(accept)
        raise Stop

    monkeypatch.setattr(same_data, "hold_to_data", hold)
    monkeypatch.setattr(trainer, "objective_of", lambda config: None)
    capabilities: Any = None
    with pytest.raises(Stop):
        trainer.run(config, capabilities, accept_data_change=accept)
    assert asked == [accept]
    assert [file.read_text() for file in (directory.config, directory.metrics)] == before
    assert not directory.environment.exists(), "nothing in RUN is replaced by a refused start"


def test_foreign_weights_are_looked_at_before_an_engine_starts(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = Found(directory=tmp_path / "release", step=0, has_run_state=False)
    start, held = Start(found=found, run_id="a", said=""), []

    def hold(_: RunConfig, found: Found) -> None:
        held.append(found)
        raise Stop

    monkeypatch.setattr(opening, "ControlGroup", lambda _: SimpleNamespace(rank=0))
    monkeypatch.setattr(opening, "find", lambda *_, **__: start)
    monkeypatch.setattr(opening, "hold_weights_to_model", hold)
    monkeypatch.setattr(trainer, "objective_of", lambda config: None)
    capabilities: Any = None
    with pytest.raises(Stop):
        trainer.run(on_one_sum(config, tmp_path), capabilities, accept_data_change=False)
    assert held == [found]
    assert not RunDirectory.of(config.output_dir).environment.exists()


def test_the_other_ranks_wait_for_rank_0_at_the_end(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It looks no longer whether they live then; where the run has failed nobody waits."""
    start = decide(config, store_of(config), fresh=False)
    with subprocess.Popen(["true"]) as ended:
        ended.wait()
    met: list[int | None] = []
    control = SimpleNamespace(rank=1, barrier=lambda: met.append(peers.lost_peer()))
    monkeypatch.setattr(opening, "ControlGroup", lambda _: control)
    monkeypatch.setattr(opening, "find", lambda *_, **__: start)
    try:
        with pytest.raises(Stop), opening.open_run(config):
            peers.watch_peers([ended.pid])
            raise Stop
        assert met == [] and peers.lost_peer() == ended.pid
        with opening.open_run(config):
            peers.watch_peers([ended.pid])
        assert met == [None]
    finally:
        peers.watch_peers([])


def test_data_that_has_changed_since_commit_dcc1758(config: RunConfig, tmp_path: Path) -> None:
    text = (Path(__file__).parent / "run_state_dcc1758.json").read_text()
    config = on_one_sum(config, tmp_path)
    save(config, 3, text)
    start = decide(config, store_of(config), fresh=False)
    assert start.found is not None
    prompts = PromptStream(config, load_tokenizer(str(tmp_path / "model")))
    directory = RunDirectory.of(config.output_dir)
    with pytest.raises(ValueError, match=r"the format before.*--accept-data-change"):
        hold_to_data(
            prompts, start.found, read_run_state(start.found.directory), directory, accept=False
        )
