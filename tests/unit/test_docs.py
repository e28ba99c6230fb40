"""The documentation against the code: generated pages are fresh, names and links exist.

Not exercised: whether the prose is right.
"""

from __future__ import annotations

import ast
import copy
import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from made.batches import make_batch
from made.configs import write_run

from sfpo_megatron.config import reference
from sfpo_megatron.config.load import dump_config, load_config
from sfpo_megatron.data.selective import ZeroVarianceHistory
from sfpo_megatron.outputs.cost_metrics import COSTS
from sfpo_megatron.outputs.declared import Metric
from sfpo_megatron.outputs.metric_list import EVALUATION, TRAIN_STEP
from sfpo_megatron.run.metrics import Totals, batch_metrics
from tools import demo_curve, doc_tables, verified

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


# ---- configuration.md -----------------------------------------------------------------------


def test_configuration_page_is_fresh() -> None:
    assert (DOCS / "configuration.md").read_text(encoding="utf-8") == reference.page(), (
        "run: python -m sfpo_megatron.config.reference > docs/configuration.md"
    )


def documented_keys() -> dict[str, reference.Key]:
    return {key.name: key for section in reference.sections() for key in section.keys}


def test_every_key_of_a_config_is_on_the_page(tmp_path: Path) -> None:
    """The keys come from a dumped config, not from the dataclasses that the page is made of."""
    sums = [f"{key}=[{{name: math}}]" for key in ("reward.function", "data.train.0.reward")]
    dumped = dump_config(load_config(write_run(tmp_path), sums))
    keys = documented_keys()

    def leaves(tree: Any, path: str) -> Iterator[str]:
        if isinstance(tree, dict) and path not in keys:  # a section; `megatron.ddp` is a key
            for name, value in tree.items():
                yield from leaves(value, f"{path}.{name}" if path else name)
        elif isinstance(tree, list) and tree and isinstance(tree[0], dict):
            yield path
            yield from leaves(tree[0], f"{path}.N")
        else:
            yield path

    import yaml

    assert set(leaves(yaml.safe_load(dumped), "")) == set(keys)


def test_types_and_defaults_are_said_as_yaml_says_them() -> None:
    keys = documented_keys()
    assert (
        keys["parallel.data"].type == "integer or null" and keys["parallel.data"].default == "`1`"
    )
    assert keys["train.optimizer.betas"].type == "list of 2 numbers"
    assert keys["train.optimizer.betas"].default == "`[0.9, 0.999]`"
    assert keys["model.path"].default == "required"
    assert keys["model.dtype"].type == "`float32`, `bfloat16`, `float16`"
    assert keys["data.train.N.source"].default == "required"
    assert keys["sfpo.latch"].type == "true / false" and keys["sfpo.latch"].default == "`true`"


def test_a_field_without_a_docstring_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = copy.deepcopy(reference._field_docstrings())
    del texts["SFPOConfig"]["alpha"]
    monkeypatch.setattr(reference, "_field_docstrings", lambda: texts)
    with pytest.raises(ValueError, match=r"SFPOConfig\.alpha has no docstring"):
        reference.page()


# ---- verified.md ----------------------------------------------------------------------------


def test_verified_page_is_fresh() -> None:
    """Making it also looks up every test that it names."""
    assert (DOCS / "verified.md").read_text(encoding="utf-8") == verified.page(), (
        "run: python tools/verified.py > docs/verified.md"
    )


def test_feature_keys_are_unique() -> None:
    keys = [feature.key for features in verified.read_table().values() for feature in features]
    assert len(keys) == len(set(keys))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("warp | Warp drive | works", "expected key"),
        ("warp", "expected key"),
        ("warp | Warp drive", "expected either tests or a status"),
        (
            "warp | Warp drive | not built\n    unit/test_docs.py",
            "expected either tests or a status",
        ),
    ],
)
def test_a_row_that_claims_without_a_test_is_refused(row: str, message: str) -> None:
    with pytest.raises(verified.Stale, match=message):
        verified.read_table(f"## Title\n{row}\n")


@pytest.mark.parametrize(
    ("test", "message"),
    [
        ("tests/dist/test_none.py::test_a", "found no file"),
        ("tests/dist/test_it.py::test_b", "found no test_b"),
        ("tests/dist/test_it.py::test_a[PP2]", "does not run under PP2"),
    ],
)
def test_a_test_that_is_not_there_is_named(tmp_path: Path, test: str, message: str) -> None:
    make_test_file(tmp_path)
    with pytest.raises(verified.Stale, match=message):
        verified.link(test, tmp_path)


def test_links_say_layout_and_marker(tmp_path: Path) -> None:
    make_test_file(tmp_path)
    target = "(../tests/dist/test_it.py)"
    assert verified.link("tests/dist/test_it.py::test_a[TP2]", tmp_path) == f"[a \\[TP2\\]]{target}"
    assert verified.link("tests/dist/test_it.py::test_long", tmp_path) == f"[long (full)]{target}"
    assert verified.link("tests/dist/test_it.py::test_mix", tmp_path) == (
        f"[mix (partly full)]{target}"
    )
    marked = tmp_path / "tests/dist/test_marked.py"
    marked.write_text("pytestmark = pytest.mark.full\ndef test_a(): ...\n")
    assert verified.link("tests/dist/test_marked.py::test_a", tmp_path) == (
        "[a (full)](../tests/dist/test_marked.py)"
    )


def make_test_file(root: Path) -> None:
    file = root / "tests/dist/test_it.py"
    file.parent.mkdir(parents=True)
    file.write_text(
        "@on_ranks(TP1, TP2)\ndef test_a(): ...\n"
        "@pytest.mark.full\ndef test_long(): ...\n"
        "@pytest.mark.parametrize('x', [1, pytest.param(2, marks=pytest.mark.full)])\n"
        "def test_mix(x): ...\n"
    )


def test_a_result_counts_for_the_features_that_it_names(tmp_path: Path) -> None:
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    results = tmp_path / "benchmarks/results"
    results.mkdir(parents=True)
    content = {
        "features": ["nccl"], "device": "cuda", "hardware": "1 x H100", "commit": "0123456789abcdef"
    }  # fmt: skip
    (results / "smoke.json").write_text(json.dumps(content))
    rows = verified.page(tmp_path).splitlines()
    (nccl,) = (row for row in rows if row.startswith("| NCCL |"))
    assert nccl.endswith("| [1 x H100, 0123456](../benchmarks/results/smoke.json) |")
    assert sum("smoke.json" in row for row in rows) == 1

    (results / "smoke.json").write_text(json.dumps({**content, "device": "cpu"}))
    (nccl,) = (row for row in verified.page(tmp_path).splitlines() if row.startswith("| NCCL |"))
    assert nccl.endswith("| [1 x H100, 0123456](../benchmarks/results/smoke.json) | never run |")

    (results / "smoke.json").write_text(json.dumps({**content, "features": ["warp-drive"]}))
    with pytest.raises(verified.Stale, match=r"smoke\.json: features: found 'warp-drive'"):
        verified.page(tmp_path)
    (results / "smoke.json").write_text(json.dumps({"features": []}))
    with pytest.raises(verified.Stale, match=r"smoke\.json: found no 'device'"):
        verified.page(tmp_path)


# ---- outputs.md -----------------------------------------------------------------------------


def logged_keys(file: str) -> set[str]:
    """Metric names in a module: keys of dict displays, assigned subscripts, names of timers."""
    found, dropped = set(), set()
    for node in ast.walk(ast.parse((ROOT / "sfpo_megatron" / file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Dict):
            found |= {k.value for k in node.keys if isinstance(k, ast.Constant)}
        elif isinstance(node, ast.Assign):
            targets = (t.slice for t in node.targets if isinstance(t, ast.Subscript))
            found |= {t.value for t in targets if isinstance(t, ast.Constant)}
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            if isinstance(node.func, ast.Name) and node.func.id == "timers":
                found.add(f"time/{node.args[0].value}_s")
            elif isinstance(node.func, ast.Attribute) and node.func.attr == "pop":
                dropped.add(node.args[0].value)
    return found - dropped


def keys_of_passes() -> set[str]:
    """What `pass_metrics` makes of all that an objective names, and `NAME` of a user's loss."""
    from ragged import ragged, run

    from sfpo_megatron.config.objective import ImportanceSamplingConfig, ObjectiveConfig
    from sfpo_megatron.mcore.passes import MinibatchResult, PassResult
    from sfpo_megatron.run.metrics import Totals, pass_metrics

    config = ObjectiveConfig(importance_sampling=ImportanceSamplingConfig(weight="token"))
    found = {*run(ragged(0), config)[1], "ref_kl", "NAME"}
    one = MinibatchResult(
        **dict.fromkeys(("loss", "entropy", "grad_norm"), 0.0),
        stats=dict.fromkeys(found - {"ratio_max"}, 0.0),
        maxima={"ratio_max": 0.0},
        num_tokens=1,
        skipped=False,
    )
    keys = pass_metrics([PassResult(minibatches=(one,))], Totals())
    return {key.replace("pass_1/", "pass_k/") for key in keys}


def names(*tables: Iterable[Metric]) -> set[str]:
    return {metric.name for metrics in tables for metric in metrics}


KEPT = {"gate", "totals", "collapse", "data", "best"}  # by checkpoints, not logged


def test_every_metric_of_a_train_step_is_described() -> None:
    saved = {"prompts", "history", "held", "samples", "rollouts"}
    feed = logged_keys("run/feed.py") - saved
    feed |= {"environment/NAME"}  # rollout.reports.environment_metrics
    feed |= {"reward/NAME"}  # rewards.parts.part_means
    feed |= {f"speed/{key}" for key in logged_keys("run/speed.py")}
    feed |= ZeroVarianceHistory(0.25).metrics.keys()
    for file in ("run/checkpoints.py", "run/device_turns.py", "run/engines.py"):
        feed |= {key for key in logged_keys(file) if key.startswith("time/")}
    feed -= {"time/evaluate_s"}  # of the evaluation's own line
    assert "time/checkpoint_s" in feed
    files = ("trainer.py", "run/learner.py", "run/metrics.py")
    logged = set().union(*map(logged_keys, files), keys_of_passes()) - {"time/sfpo_s", *KEPT}
    assert {"loss", "pass_k/ratio_max", "ref_kl", "time/generate_s", "staleness"} <= logged
    lengths = torch.ones(2, dtype=torch.int64)
    logged |= set(batch_metrics(make_batch(lengths, lengths.clone()), Totals()))
    several = {f"ranks/PHASE_{what}" for what in ("max_s", "min_s", "slowest")}
    made = several | {"memory/PHASE_peak_bytes"}  # run.metrics.rank_metrics
    assert names(TRAIN_STEP, COSTS) == logged | feed | made


def test_every_metric_of_an_evaluation_is_described() -> None:
    logged = logged_keys("run/held_out.py") | logged_keys("evaluate.py")
    expected = {key for key in logged if key.startswith("eval/")} | {"step", "model"}
    expected |= logged_keys("run/engines.py") & {"time/evaluate_s"}
    assert names(EVALUATION) == expected | {"eval/reward/NAME", "eval/accuracy/SOURCE"}


# ---- generated tables -----------------------------------------------------------------------


@pytest.mark.parametrize("page", doc_tables.pages(), ids=lambda p: p.relative_to(ROOT).as_posix())
def test_generated_tables_are_fresh(page: Path) -> None:
    fresh = doc_tables.pages()[page]
    assert page.read_text(encoding="utf-8") == fresh, "run: python tools/doc_tables.py"


def test_the_table_of_layers_has_every_room_and_its_sentence() -> None:
    """Counted in the folder and read from one docstring, not by the tool."""
    table = doc_tables.layers()
    rooms = re.findall(r"^\| L\d \| \[`(\w+)", table, flags=re.M)
    package = ROOT / "sfpo_megatron"
    assert len(rooms) == sum(f.suffix == ".py" or f.is_dir() for f in package.iterdir()) - sum(
        (package / name).exists() for name in ("__init__.py", "__pycache__")
    )
    assert "| L0 | [`sfpo.py`](../sfpo_megatron/sfpo.py) | Slow-Fast Policy Optimization" in table
    assert "`vllm` in `rollout/` and `resharding/transports/`" in table


def test_asking_for_help_writes_no_table(tmp_path: Path) -> None:
    """In a copy whose pages are not there: to make one would fail."""
    for folder in ("sfpo_megatron", "tests"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    shutil.copytree(ROOT / "tools", tmp_path / "tools")
    command = [sys.executable, "tools/doc_tables.py", "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "usage: doc_tables.py" in done.stdout, done.stderr


def test_a_table_needs_its_markers() -> None:
    text = "a\n<!-- x: how -->\nold\n<!-- /x -->\nb\n"
    assert doc_tables.with_table(text, "x", "| t |", page="p.md") == text.replace(
        "old\n", "\n| t |\n"
    )
    for broken in (text.replace("/x", "/y"), text + text):
        with pytest.raises(doc_tables.Stale, match=r"p\.md: found [02] times <!-- x: -->"):
            doc_tables.with_table(broken, "x", "| t |", page="p.md")


def test_the_demos_picture_has_a_line_for_each_seed_and_their_mean() -> None:
    """The last point of the mean is read back from the committed file."""
    result = json.loads((ROOT / "benchmarks/results/demo.json").read_text())
    finals = [run["held_out_accuracy"]["20"] for key, run in result.items() if "seed" in key]
    picture = ElementTree.parse(DOCS / "images/demo.svg")
    *seeds, mean = picture.findall("{*}polyline")
    assert len(seeds) == len(finals) == 3
    height = float(mean.get("points", "").rpartition(",")[2])
    low, high = demo_curve.LOW, demo_curve.HIGH
    share = (demo_curve.BOTTOM - height) / (demo_curve.BOTTOM - demo_curve.TOP)
    assert low + (high - low) * share == pytest.approx(sum(finals) / 3, abs=1e-3)


def test_readme_says_the_demos_result() -> None:
    """The first screen's figures are those of seed 0 in the committed result."""
    result = json.loads((ROOT / "benchmarks/results/demo.json").read_text())["seed 0"]
    (_, first), *_, (steps, last) = result["held_out_accuracy"].items()
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert f"goes from {100 * first:.1f}% to {100 * last:.1f}% in {steps} train steps" in text
    assert f"{math.ceil(result['seconds'] / 60)} minutes on two cores" in text
