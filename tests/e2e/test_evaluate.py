"""`sfpo-megatron eval` with real engines: greedy accuracy against transformers, a kill, two models.

Not exercised: benchmarks of pretrained models.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import digits
import pytest

PROBLEMS = [(f"{a}+{b}=", str(a + b)) for a in range(6) for b in range(6)]
COMMAND = [sys.executable, "-m", "sfpo_megatron", "eval"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("evaluate")
    digits.make_model(root / "model")
    rows = [json.dumps({"prompt": prompt, "answer": answer}) for prompt, answer in PROBLEMS]
    (root / "sums.jsonl").write_text("".join(row + "\n" for row in rows))
    return root


def options(folder: Path, out: str, **more: Any) -> list[str]:
    given = {
        "model": folder / "model",
        "data": folder / "sums.jsonl",
        "out": folder / out,
        "reward": "last_number",
        "max-tokens": 8,
    } | more
    return [part for name, value in given.items() for part in (f"--{name}", str(value))]


def evaluate(*arguments: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done


def records(out: Path) -> list[dict[str, Any]]:
    (file,) = out.glob("eval/*/records.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()]


def greedy(model: Path) -> list[str]:
    """Responses of transformers' own generation, a problem at a time."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    texts = []
    for prompt, _ in PROBLEMS:
        ids = tokenizer(prompt, return_tensors="pt")
        made = policy.generate(**ids, max_new_tokens=8, do_sample=False)
        texts.append(
            tokenizer.decode(made[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
        )
    return texts


def test_greedy_accuracy_is_that_of_transformers(folder: Path) -> None:
    from sfpo_megatron.rewards.last_number import score
    from sfpo_megatron.types import Prompt

    expected = greedy(folder / "model")
    done = evaluate(*options(folder, "greedy", temperature=0))
    found = records(folder / "greedy")
    assert [record["text"] for record in found] == expected
    verdicts = [
        score(text, Prompt(id="", text="", token_ids=(), question=prompt, answer=answer)) == 1
        for text, (prompt, answer) in zip(expected, PROBLEMS, strict=True)
    ]
    assert [record["correct"] for record in found] == verdicts
    line = json.loads(done.stdout)
    assert line["eval/accuracy"] == sum(verdicts) / len(verdicts)
    results = json.loads((folder / "greedy/eval/results.json").read_text())
    ((name, sources),) = results["models"].items()
    assert name == str(folder / "model") and sources["sums"]["num_problems"] == 36
    assert "avg@1" in done.stderr and "36/36 problems" in done.stderr
    again = evaluate(*options(folder, "greedy", temperature=0))  # starts no engine
    assert json.loads(again.stdout) == line and "36 of 36 problems are there" in again.stderr
    other = [*COMMAND, *options(folder, "greedy", temperature=1)]
    refused = subprocess.run(other, capture_output=True, text=True, timeout=300)
    assert refused.returncode == 2 and "temperature 0.0 -> 1.0" in refused.stderr


@pytest.mark.full
def test_a_killed_evaluation_goes_on_where_it_was(folder: Path) -> None:
    """The records are those of one without a kill, each problem once."""
    whole = options(folder, "whole", n=64)  # eight problems a part
    same = "rollout.reproducible=true"
    evaluate(*whole, same)
    killed = subprocess.Popen([*COMMAND, *options(folder, "killed", n=64), same])
    deadline = time.monotonic() + 240
    while not (found := list((folder / "killed").glob("eval/*/records.jsonl"))) or not (
        found[0].stat().st_size
    ):
        assert time.monotonic() < deadline and killed.poll() is None
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    kept = {record["problem"] for record in records(folder / "killed")}
    assert kept
    done = evaluate(*options(folder, "killed", n=64), same)
    assert len(kept) == 36 or "problems are there" in done.stderr
    assert records(folder / "killed") == records(folder / "whole")


@pytest.mark.full
def test_two_models_and_a_run_side_by_side(folder: Path) -> None:
    config = digits.write_config(
        folder,
        folder / "model",
        parallel={"tensor": 1},
        train={"num_steps": 2},
        rollout={"max_prompt_tokens": 16, "max_response_tokens": 8},
        checkpoint={"every": 1, "keep_last": 2},
    )
    digits.train(config)
    done = evaluate(*options(folder, "both", n=4), "--model", str(folder / "run"), "--json")
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["model"] for line in lines] == [str(folder / "model"), str(folder / "run")]
    results = json.loads((folder / "both/eval/results.json").read_text())
    (difference,) = results["differences"].values()
    gap = lines[1]["eval/accuracy"] - lines[0]["eval/accuracy"]
    assert difference["sums"]["mean"] == pytest.approx(gap)
    # From its checkpoint, which is converted, the same weights and therefore the same greedy texts.
    hf = evaluate(*options(folder, "hf", model=folder / "run/hf", temperature=0))
    (step,) = (folder / "run/checkpoints").glob("*_0000002")
    native = evaluate(*options(folder, "native", model=step, temperature=0))
    texts = [[r["text"] for r in records(folder / out)] for out in ("hf", "native")]
    assert texts[0] == texts[1]
    a, b = (json.loads(run.stdout) for run in (hf, native))
    assert a["eval/accuracy"] == b["eval/accuracy"]
    assert not list(folder.glob("native/eval/*/converted")), "what was converted is removed"
