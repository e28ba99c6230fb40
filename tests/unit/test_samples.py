"""Sample rollouts: which are picked, where they are written, how they are shown."""

from __future__ import annotations

import json
import sys
from io import BytesIO, TextIOWrapper
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from made.configs import run_config
from made.rollouts import group, scored_request

from sfpo_megatron.checkpoints.identity import retire_metrics
from sfpo_megatron.config.tree import RunConfig, SamplesConfig
from sfpo_megatron.outputs.directory import RunDirectory
from sfpo_megatron.rollout.reports import ScoredRequest
from sfpo_megatron.run.continuing import prepare_output
from sfpo_megatron.run.feed import EngineFeed
from sfpo_megatron.run.samples import SamplePicker
from sfpo_megatron.tracking.block import sample_block
from sfpo_megatron.tracking.details import Details, Sample, SampledResponse
from sfpo_megatron.tracking.tracker import Tracker
from sfpo_megatron.types import Prompt, Rollout


def prompt_of(name: str) -> Prompt:
    return Prompt(
        id=name, text=f"Q: {name}?\nA:", token_ids=(1,), question=name, answer=f"answer {name}"
    )


def response(text: str, reward: float = 0.0, **given: Any) -> SampledResponse:
    fields = {"correct": reward >= 1, "finished": True, "num_tokens": 3} | given
    return SampledResponse(text=text, reward=reward, **fields)


def sample(*responses: SampledResponse, **given: Any) -> Sample:
    fields = {"prompt_id": "sums/7", "prompt": "1+1=", "answer": "2"} | given
    return Sample(responses=responses, **fields)


def details(step: int, *samples: Sample) -> Details:
    return Details(step=step, distributions={"reward": [0.0, 1.0]}, samples=samples)


# ---- picked ---------------------------------------------------------------------------------


def test_the_first_prompts_of_the_steps_that_are_due() -> None:
    picker = SamplePicker(SamplesConfig(every=3, num_prompts=2))
    rollouts = [r for name in "abc" for r in group(name, [0.0, 1.0])]
    picked: dict[int, list[str]] = {}
    for step in range(1, 8):
        picker.asked(step, [prompt_of(name) for name in "cbax"])  # and one that was dropped
        samples = picker.pick(step, rollouts, 2)
        picked[step] = [one.prompt_id for one in samples]
    assert {step for step, names in picked.items() if names} == {1, 3, 6}
    assert picked[3] == ["a", "b"]
    last = picker.pick(9, rollouts, 2)
    assert last == ()  # nothing was asked for


def test_a_sample_has_what_was_asked_and_every_response() -> None:
    picker = SamplePicker(SamplesConfig(every=1, num_prompts=5))
    picker.asked(1, [prompt_of("a")])
    (one,) = picker.pick(1, group("a", [0.0, 1.0], finished=False), 2)
    assert (one.prompt, one.answer) == ("Q: a?\nA:", "answer a")
    assert [(r.reward, r.correct, r.finished) for r in one.responses] == [
        (0.0, False, False),
        (1.0, True, False),
    ]
    assert Sample.from_json(json.loads(json.dumps(one.to_json()))) == one


class Client:
    """The engines' end, which answers each request with one group."""

    def __init__(self, version: int = 0) -> None:
        self._version = version

    def submit(self, request: Any) -> None:
        self._name = request.prompts[0].id

    def collect_scored(self, request_id: str, refit: Any) -> ScoredRequest:
        rollouts: list[Rollout] = group(self._name, [0.0, 1.0], weight_version=self._version)
        return scored_request(rollouts)


def feed_of(config: RunConfig, client: Any) -> EngineFeed:
    prompts: Any = SimpleNamespace(
        state_dict=dict,
        load_state_dict=lambda state: None,
        has_changed=False,
        next_batch=lambda count, history: [prompt_of("a")],
    )
    return EngineFeed(config, client, prompts)


def test_samples_of_rollouts_begun_ahead_are_in_the_checkpoint() -> None:
    """With async_steps a checkpoint holds the next step's rollouts: a run that is resumed from it
    shows their samples as the run that went on does."""
    config = run_config(
        train={"prompts_per_step": 1, "minibatches_per_step": 1, "group_size": 2, "num_steps": 3},
        rollout={"async_steps": 1},
        tracking={"samples": SamplesConfig(every=1)},
    )
    feed = feed_of(config, Client())
    feed.collect(1, lambda: None)
    assert [one.prompt_id for one in feed.samples] == ["a"]
    feed.hold(lambda: None)
    state = feed.state_dict()
    rollouts = state.pop("rollouts")
    state = json.loads(json.dumps(state)) | {"rollouts": rollouts}
    resumed = feed_of(config, Client())
    resumed.load_state_dict(state)
    for one in (feed, resumed):
        one.collect(2, lambda: None)
    assert resumed.samples == feed.samples and len(resumed.samples) == 1


# ---- written --------------------------------------------------------------------------------


def tracked(folder: Path, *steps: int) -> None:
    """A run that shows a sample after each of these steps."""
    with Tracker(run_config(output_dir=str(folder), tracking={"sinks": ("jsonl",)})) as tracker:
        for step in steps:
            tracker.log({"step": step, "reward_mean": 0.5})
            tracker.details(details(step, sample(response("x" * 5000, 1.0, parts={"f": 0.5}))))


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in RunDirectory.of(folder).samples.read_text().splitlines()]


def test_a_line_a_prompt_whole(tmp_path: Path) -> None:
    tracked(tmp_path, 1, 2)
    first, second = lines_of(tmp_path)
    assert (first["step"], second["step"], first["prompt_id"]) == (1, 2, "sums/7")
    (one,) = first["responses"]
    assert len(one["text"]) == 5000 and one["parts"] == {"f": 0.5} and one["correct"]


def test_a_resumed_run_repeats_no_line(tmp_path: Path) -> None:
    """What came after its checkpoint is cut, and written again."""
    tracked(tmp_path, 1, 2, 3)
    prepare_output(run_config(output_dir=str(tmp_path)), up_to_step=2)
    assert [line["step"] for line in lines_of(tmp_path)] == [1, 2]
    tracked(tmp_path, 3)
    assert [line["step"] for line in lines_of(tmp_path)] == [1, 2, 3]


def test_a_new_run_keeps_those_of_the_one_before(tmp_path: Path) -> None:
    for number in (1, 2):
        tracked(tmp_path, 1)
        retire_metrics(RunDirectory.of(tmp_path))
        assert (tmp_path / f"samples.previous-{number}.jsonl").exists()
    assert not RunDirectory.of(tmp_path).samples.exists()


def test_a_run_without_samples_has_no_file(tmp_path: Path) -> None:
    with Tracker(run_config(output_dir=str(tmp_path), tracking={"sinks": ("jsonl",)})) as tracker:
        tracker.log({"step": 1})
        tracker.details(details(1))
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


# ---- shown ----------------------------------------------------------------------------------


def test_a_block_says_what_was_asked_and_what_came() -> None:
    text = sample_block(
        4,
        [
            sample(
                response("wrong\nanswer", finished=False, num_tokens=32),
                response("right", 1.0, parts={"format": 0.5}),
            )
        ],
    )
    assert text.splitlines() == [
        "step 4: sample rollouts",
        "  prompt sums/7  reference: 2",
        "    | 1+1=",
        "  reward 1  correct  3 tokens  format 0.5",
        "    | right",
        "  reward 0  not correct  32 tokens, cut",
        "    | wrong",
        "    | answer",
    ]


def test_what_is_long_is_cut_in_its_middle_and_what_is_many_to_best_and_worst() -> None:
    many = [response(f"{n}" + "x" * 2000 + "END", n / 10) for n in range(10)]
    text = sample_block(1, [sample(*many)], max_chars=100)
    assert "[... 1904 characters ...]" in text and text.count("END") == 4
    shown = [line for line in text.splitlines() if line.startswith("  reward")]
    assert [line.split()[1] for line in shown] == ["0.9", "0.8", "0.1", "0"]
    assert "(6 more in samples.jsonl)" in text
    assert sample_block(1, [sample(*many)]).count("x" * 2000) == 10


def test_nothing_that_a_terminal_would_obey_is_shown() -> None:
    text = sample_block(1, [sample(response("\x1b[2J\x07\r\u202eé 中"), prompt="\x1b]0;title\x07")])
    assert not [c for c in text if not c.isprintable() and c != "\n"]
    assert r"\x1b[2J\x07\r\u202eé 中" in text


def test_a_terminal_without_the_letters_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = BytesIO()
    monkeypatch.setattr(sys, "stdout", TextIOWrapper(written, encoding="ascii"))
    with Tracker(run_config(output_dir=str(tmp_path), tracking={"sinks": ("console",)})) as tracker:
        tracker.details(details(1, sample(response("é \ud800 中"))))
        tracker.progress("still here")
    assert b"| \\xe9 \\ud800 \\u4e2d\n" in written.getvalue()
    assert written.getvalue().endswith(b"still here\n")


def test_a_sink_with_three_methods_is_asked_for_no_more(tmp_path: Path) -> None:
    name = "examples.your_own.sink:Csv"
    with Tracker(run_config(output_dir=str(tmp_path), tracking={"sinks": (name,)})) as tracker:
        tracker.details(details(1, sample(response("a"))))
        tracker.log({"step": 2, "reward_mean": 0.5})
    assert (tmp_path / "reward.csv").read_text() == "2,0.5\n"


@pytest.mark.parametrize(("field", "value"), [("every", -1), ("num_prompts", 0)])
def test_what_cannot_be_is_refused(field: str, value: int) -> None:
    with pytest.raises(ValueError, match=field):
        SamplesConfig(**{field: value})
