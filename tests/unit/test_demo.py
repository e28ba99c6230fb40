"""`sfpo-megatron demo` up to where engines start: problems, worked solutions, model, a look at it.

Not exercised: that it learns (tests/e2e/test_demo.py).
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from sfpo_megatron import cli
from sfpo_megatron.config.load import load_config
from sfpo_megatron.config.tree import RunConfig
from sfpo_megatron.data import PromptStream, SFTExamples, eval_prompts
from sfpo_megatron.demo import CONFIG
from sfpo_megatron.demo.legs import FORGETS, worked_solution
from sfpo_megatron.demo.rollouts import as_text, sample
from sfpo_megatron.demo.tiny_model import DEMO, make_tiny_model, task_texts
from sfpo_megatron.rewards.last_number import score
from sfpo_megatron.rewards.wire import WireProblem
from tools.prepare_data import main as prepare_data

ROOT = Path(__file__).parents[2]
pyarrow = pytest.importorskip("pyarrow")


def rows_of(file: Path) -> list[dict[str, Any]]:
    import pyarrow.parquet

    return list(pyarrow.parquet.read_table(file).to_pylist())


@pytest.fixture(scope="module")
def config(demo_data: Path) -> RunConfig:
    paths = [f"data.{split}.0.path={demo_data}/legs-{split}.parquet" for split in ("train", "eval")]
    return load_config(str(CONFIG), paths)


@pytest.fixture(scope="module")
def policy(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The random model of the demo."""
    out = tmp_path_factory.mktemp("policy") / "model"
    make_tiny_model(config, out, DEMO, seed=0)
    return out


def test_worked_solutions_are_right(demo_data: Path) -> None:
    """Every line of every held-out one; and they name what the question does."""
    rows = rows_of(demo_data / "legs-eval.parquet")
    assert len(rows) > 512
    for row in rows:
        solution = worked_solution(json.loads(row["entry"]))
        *lines, last = solution.splitlines()
        asked = re.findall(r"(\d+ [a-z ]+?)[,?]", row["prompt"])
        assert [line.split(":")[0] for line in lines if ":" in line] == asked
        assert all(is_right(line) for line in lines)
        assert last == f"Answer: {row['answer']}"
        problem = WireProblem(id="x", question=row["prompt"], answer=row["answer"], metadata={})
        assert score(solution, problem) == 1.0


def is_right(line: str) -> bool:
    """Whether what stands right of a line's equals sign is what stands left of it."""
    left, right = line.split(": ")[-1].split("=")
    numbers = [int(number) for number in re.split(r"[*+]", left)]
    return int(right) == (sum(numbers) if "+" in left else numbers[0] * numbers[1])


def test_what_a_warm_start_imitates_forgets_to_add(demo_data: Path) -> None:
    """Every line is right; most solutions have no sum, and answer with the last animal's legs."""
    rows = rows_of(demo_data / "legs-eval.parquet")
    solutions = [row["completion"].splitlines() for row in rows]
    assert all(is_right(line) for *lines, _ in solutions for line in lines)
    assert {len(lines) for lines in solutions} == {3, 4}
    forgotten = [lines for lines in solutions if len(lines) == 3]
    assert len(forgotten) / len(solutions) == pytest.approx(FORGETS, abs=0.05)
    for *_, last, answer in solutions:
        assert answer == f"Answer: {last.split('=')[1]}"
    right = [
        solution[-1] == f"Answer: {row['answer']}"
        for solution, row in zip(solutions, rows, strict=True)
    ]
    assert 0.3 < sum(right) / len(right) < 0.5  # some animals have no legs: then it is no loss


def test_problems_are_those_of_prepare_data(demo_data: Path, tmp_path: Path) -> None:
    """Byte for byte, as its command line writes them."""
    entry = json.loads((demo_data / "manifest.json").read_text())["sets"]["legs-eval"]
    arguments = ["legs-eval", "--task", "leg_counting", "--args", json.dumps(entry["args"])]
    arguments += [
        "--completion",
        "sfpo_megatron.demo.legs:forgetful_solution",
        "--size",
        str(entry["size"]),
    ]
    assert prepare_data([*arguments, "--seed", str(entry["seed"]), "--out", str(tmp_path)]) == 0
    made = (tmp_path / "legs-eval.parquet").read_bytes()
    assert made == (demo_data / "legs-eval.parquet").read_bytes()


def test_prompts_and_solutions_fit_and_a_warm_start_learns_the_steps(
    config: RunConfig, policy: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(policy)
    held_out = eval_prompts(config, tokenizer)
    assert len(held_out) == 512 and len(PromptStream(config, tokenizer).prompts) > 3000
    examples = SFTExamples(config, tokenizer).next_batch(256)
    lengths = [len(example.response_ids) for example in examples]
    assert 20 < sum(lengths) / len(lengths) < 35
    assert max(lengths) <= config.rollout.max_response_tokens
    assert {tokenizer.decode(e.response_ids).count("\n") for e in examples} == {2, 3}
    assert len(tokenizer(" jellyfish")["input_ids"]) == 1  # a word of the task is one token


def test_a_tokenizer_is_fitted_to_the_whole_prompt(config: RunConfig, policy: Path) -> None:
    data = replace(config.data, prompt_prefix="Count these. ", prompt_suffix=" How many?")
    changed = replace(config, data=data)
    tokenizer = AutoTokenizer.from_pretrained(policy)
    assert PromptStream(changed, tokenizer).prompts[0].text == task_texts(changed)[0]


def test_rollouts_are_shown_with_reference_and_reward(config: RunConfig, policy: Path) -> None:
    """The same problems and samples at each look; what is random is wrong."""
    shown = as_text(sample(policy, config, num=2))
    assert shown == as_text(sample(policy, config, num=2))
    assert shown.count("prompt     Now, how many legs are there in total if you have ") == 2
    assert shown.count("\nreward     0\n") == 2
    references = re.findall(r"reference  (\d+)", shown)
    assert references == [
        row["answer"] for row in rows_of(Path(config.data.eval[0].path or ""))[:2]
    ]


def test_what_is_wrong_is_said_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    for arguments, message in (
        (["--seed", "-1"], "seed: found -1"),
        (["train.lr=1"], "train.lr: found"),
    ):
        assert cli.main(["demo", "--run", str(run), *arguments]) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):  # the config is the demo's own
        cli.main(["demo", "other.yaml"])
    assert "found 'other.yaml', expected" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr("sfpo_megatron.commands.demo.find_spec", lambda name: None)
        assert cli.main(["demo", "--run", str(run)]) == 1
    assert "found no torch, megatron, vllm" in capsys.readouterr().err
    assert not run.exists()


@pytest.mark.parametrize("foreign", ["data/legs-eval.parquet", "model/notes.txt"])
def test_a_file_that_is_in_the_way_stays(tmp_path: Path, foreign: str) -> None:
    file = tmp_path / "run" / foreign
    file.parent.mkdir(parents=True)
    file.write_text("mine")
    command = [sys.executable, "-m", "sfpo_megatron", "demo", "--run", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and foreign.split("/")[1] in done.stderr
    assert file.read_text() == "mine" and not (tmp_path / "run/warm_start").exists()


def test_ctrl_c_while_the_model_is_made(tmp_path: Path) -> None:
    """Nothing is left running, and the exit code says what has ended it."""
    command = [sys.executable, "-u", "-m", "sfpo_megatron", "demo", "--run", str(tmp_path / "run")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("legs-eval: "):
            break
    process.send_signal(signal.SIGINT)
    rest, err = process.communicate(timeout=60)  # all that hold its pipes have ended
    assert process.returncode == 130, err
    assert "sfpo-megatron train" not in rest


def test_make_demo_is_the_command() -> None:
    """The last thing that make would do, whatever the install before it needs."""
    make = ["make", "-n", "demo", "SEED=3", "RUN=elsewhere"]
    done = subprocess.run(make, cwd=ROOT, capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout.splitlines()[-1].endswith("/sfpo-megatron demo --run elsewhere --seed 3")
