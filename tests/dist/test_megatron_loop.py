"""examples/megatron_loop under torchrun on two ranks: it learns, and SFPO is what its lines say.

Not exercised: pipeline stages, which the example does not have, and CUDA.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "megatron_loop" / "train.py"
SHORT = ["--steps", "2"]
LAYOUTS = {"DP2+overlap": ["--overlap"], "DP2": [], "TP2": ["--tensor", "2"]}
ALL = [pytest.param(name, marks=[pytest.mark.full] * (name != "DP2+overlap")) for name in LAYOUTS]
Results = list[dict[str, dict[str, str]]]  # by rank, by run


PLAIN = "results = [run_pass() for _ in range(4)]"
BY_HAND = """\
members = optimizer.chained_optimizers
main = [p for m in members for group in m.shard_fp32_from_float16_groups for p in group]
slow = [p.detach().clone() for p in main]
results = [run_pass() for _ in range(3)]
for p, start in zip(main, slow, strict=True):
    p.data.copy_(torch.lerp(start, p.data, 0.8))
for m in members:
    m._copy_main_params_to_model_params()
model.start_param_sync(force_sync=True)
results.append(run_pass())
"""


def without_sfpo(instead: str) -> str:
    """The script without its marked lines, and `instead` as the update on a batch."""
    lines = [x for x in SCRIPT.read_text(encoding="utf-8").splitlines() if "  # SFPO" not in x]
    text, marker = "\n".join(lines), "        # without SFPO: results = [run_pass()]"
    assert text.count(marker) == 1
    return text.replace(marker, textwrap.indent(instead, " " * 8))


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Every run that the selected tests need, in one torchrun."""
    directory = tmp_path_factory.mktemp("megatron_loop")
    plain, by_hand = directory / "plain.py", directory / "by_hand.py"
    plain.write_text(without_sfpo(PLAIN))
    by_hand.write_text(without_sfpo(BY_HAND))
    runs: list[tuple[str, str, list[str]]] = [("learn", str(SCRIPT), ["--steps", "6"])]
    callspecs = [getattr(item, "callspec", None) for item in request.session.items]
    wanted = {spec.params.get("layout") for spec in callspecs if spec}
    for name, layout in LAYOUTS.items():
        if name not in wanted:
            continue
        runs.append((f"{name} plain", str(plain), [*SHORT, *layout]))
        runs.append((f"{name} by hand", str(by_hand), [*SHORT, *layout]))
        for alpha in ("1.0", "0.8"):
            runs.append((f"{name} {alpha}", str(SCRIPT), [*SHORT, *layout, "--alpha", alpha]))
    (directory / "runs.json").write_text(json.dumps(runs))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment: dict[str, Any] = os.environ | {
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONPATH": str(ROOT),
        "PYTHONWARNINGS": "ignore",
    }
    done = subprocess.run(
        [*command, str(Path(__file__).parent / "loop_ranks.py"), str(directory)],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    if done.returncode:
        pytest.fail(done.stderr[-4000:], pytrace=False)
    return [json.loads((directory / f"rank{rank}.json").read_text()) for rank in range(2)]


def test_it_prints_a_line_a_step_and_learns(results: Results) -> None:
    """The loss before a step is of a batch not seen before; log 64 is that of a uniform guess."""
    *steps, last = results[0]["learn"]["printed"].splitlines()
    pattern = r"step +(\d+): 4 passes, loss ([\d.]+) -> ([\d.]+), entropy ([\d.]+)"
    matches = [re.fullmatch(pattern, line) for line in steps]
    assert [m and int(m[1]) for m in matches] == [1, 2, 3, 4, 5, 6]
    unseen = [float(m[2]) for m in matches if m]
    assert unseen == sorted(unseen, reverse=True)
    assert unseen[0] > 3.5 and unseen[-1] < 1.5
    held_out = re.fullmatch(r"held-out loss ([\d.]+)", last)
    assert held_out and float(held_out[1]) < 1.2
    assert results[1]["learn"]["printed"] == ""


@pytest.mark.parametrize("layout", ALL)
def test_alpha_one_is_the_plain_loop_with_four_passes(results: Results, layout: str) -> None:
    """Every bf16 param of every rank, bit for bit, against the script without the marked lines."""
    for rank in results:
        assert rank[f"{layout} 1.0"]["digest"] == rank[f"{layout} plain"]["digest"]
        assert rank[f"{layout} 0.8"]["digest"] != rank[f"{layout} plain"]["digest"]


@pytest.mark.parametrize("layout", ALL)
def test_it_is_the_update_written_by_hand(results: Results, layout: str) -> None:
    """Bit for bit against the same four phases on Megatron's own names, by alpha 0.8."""
    for rank in results:
        assert rank[f"{layout} 0.8"]["digest"] == rank[f"{layout} by hand"]["digest"]


@pytest.mark.parametrize("layout", ALL[:2])
def test_data_parallel_ranks_agree(results: Results, layout: str) -> None:
    for alpha in ("1.0", "0.8"):
        assert len({rank[f"{layout} {alpha}"]["digest"] for rank in results}) == 1
        if f"DP2 {alpha}" in results[0]:  # and overlapping the communication changes nothing
            overlapped = results[0][f"DP2+overlap {alpha}"]
            assert results[0][f"DP2 {alpha}"]["digest"] == overlapped["digest"]
