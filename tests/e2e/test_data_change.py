"""A resume on data that has changed, through the command, with engines.

That what is drawn is right: tests/unit/test_data_changes.py. Not exercised: Slurm.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import digits
import pytest
import yaml
from digits import ALONE, environment
from made.same_run import lines, timeless

pytestmark = pytest.mark.full


def start(config: Path, *arguments: str) -> tuple[int, str]:
    process = digits.start_train(config, *ALONE, *arguments, environment=environment(ALONE))
    try:
        output, _ = process.communicate(timeout=300)
    finally:
        digits.end(process)
    return process.returncode, output


def test_a_wrong_row_ends_the_run_for_good(tmp_path: Path) -> None:
    """With the code after which a job is not requeued, before an engine starts."""
    config = digits.write_config(tmp_path, digits.make_model(tmp_path / "model"))
    with (tmp_path / "sums.jsonl").open("a") as rows:
        rows.write('{"prompt": "1 + 1 ="}\n')
    code, output = start(config)
    assert code == 2 and "engines ready" not in output
    (error,) = [line for line in output.splitlines() if line.startswith("error:")]
    assert "sums.jsonl:" in error and "found no key 'answer'" in error
    assert (tmp_path / "run/logs/rank_0.exit").read_text() == "2\n"


def test_a_changed_row_is_refused_and_accepted(tmp_path: Path) -> None:
    """Before an engine starts; then once by the option, and after that without."""
    config = digits.write_config(
        tmp_path,
        digits.make_model(tmp_path / "model"),
        rollout={"reproducible": True},
        train={"num_steps": 2},
        checkpoint={"every": 2},
    )
    run, rows = tmp_path / "run", tmp_path / "sums.jsonl"
    assert start(config)[0] == 0
    kept = rows.read_text().splitlines()
    del kept[20]
    rows.write_text("".join(f"{line}\n" for line in kept))
    code, output = start(config, "train.num_steps=3")
    assert code == 2 and "engines ready" not in output
    (error,) = [line for line in output.splitlines() if line.startswith("error:")]
    assert "found 1 row is gone (data.train[0] row 21)" in error
    assert "--accept-data-change" in error
    code, output = start(config, "train.num_steps=3", "--accept-data-change")
    assert code == 0, output
    assert "the data has changed since step 2, accepted: 1 row is gone" in output
    (change,) = json.loads((run / "run.json").read_text())["data_changes"]
    assert change["after_step"] == 2 and "row 21" in change["what"]
    code, output = start(config, "train.num_steps=4")
    assert code == 0 and "the data has changed" not in output, output
    assert [line["step"] for line in lines(run) if "loss" in line] == [1, 2, 3, 4]


def test_a_renamed_file_is_no_change_in_any_bit(tmp_path: Path) -> None:
    """Sampling seeds are made of ids, which have the file's name in them."""
    config = digits.write_config(
        tmp_path,
        digits.make_model(tmp_path / "model"),
        rollout={"reproducible": True},
        train={"num_steps": 4},
        eval={"every": 2},
        checkpoint={"every": 2},
    )
    straight, run = tmp_path / "run", tmp_path / "renamed"
    assert start(config)[0] == 0
    shutil.copytree(straight, run)
    shutil.rmtree(run / "checkpoints/step_0000004")
    (run / "checkpoints/latest").write_text("step_0000002\n")
    tree = yaml.safe_load(config.read_text())
    tree["output_dir"] = str(run)
    for split, name in (("train", "sums"), ("eval", "held_out")):
        (tmp_path / f"{name}.jsonl").rename(tmp_path / f"other_{name}.jsonl")
        tree["data"][split][0]["path"] = str(tmp_path / f"other_{name}.jsonl")
    config.write_text(yaml.safe_dump(tree))
    code, output = start(config)
    assert code == 0 and "after step 2" in output, output
    assert timeless(run) == timeless(straight)
