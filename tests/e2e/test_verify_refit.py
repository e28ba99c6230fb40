"""tools/verify_refit.py: equal at every layout; one element that changes on the way is named.

Not exercised: a mixture of experts, GPUs.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import digits
import pytest
import tiny

from sfpo_megatron.config.tree import ParallelConfig
from sfpo_megatron.convert.to_megatron import hf_to_megatron

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.full

# Imported by every Python process that finds it: changes one element before it is written. Not in
# Ray's processes, which have rank 0's environment: each would import torch first, and Ray would not
# have started in time.
PLANT = """
import os, sys
if "RANK" in os.environ and any("verify_refit.py" in a for a in sys.orig_argv):
    from sfpo_megatron.resharding import filling
    real = filling.ShardFiller.fill
    def fill(self, bucket, buffer):
        sums = real(self, bucket, buffer)
        for index, view in enumerate(
            filling.views(self.manifest, bucket, self._buffer.bytes), bucket.first
        ):
            if self.manifest[index].name == "model.layers.1.self_attn.v_proj.weight":
                view[2, 3] += 1e-3
        return sums
    filling.ShardFiller.fill = fill
"""


def verify(
    checkpoint: Path, *options: str, plant: Path | None = None
) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([*([str(plant)] if plant else []), str(ROOT)])
    return subprocess.run(
        [sys.executable, "tools/verify_refit.py", str(checkpoint), *options],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=250,
    )


@pytest.mark.parametrize(
    "options",
    [
        ("--tensor", "2", "--bucket-bytes", "100000"),
        ("--pipeline", "2", "--engine-tensor", "2", "--dtype", "bfloat16"),
    ],
    ids=["TP2", "PP2-engine-TP2-bf16"],
)
def test_equal(tmp_path: Path, options: tuple[str, ...]) -> None:
    done = verify(tiny.make_model(tmp_path / "model", layers=4, tied=False), *options)
    assert done.returncode == 0, done.stderr
    assert "equal: 51 parameters" in done.stdout, done.stdout


def test_a_planted_error_is_named(tmp_path: Path) -> None:
    model = tiny.make_model(tmp_path / "model")
    done = verify(model, "--tensor", "2", plant=planted(tmp_path))
    assert done.returncode == 1
    assert "model.layers.1.self_attn.v_proj.weight: found checksum" in done.stderr, done.stderr


def test_a_checkpoint_of_a_run(tmp_path: Path) -> None:
    """Torch_dist, saved at TP2 and loaded by Megatron at PP2; config.json by way of the run."""
    model = digits.make_model(tmp_path / "model")
    rollouts = tmp_path / "rollouts.safetensors"
    digits.save_rollouts(rollouts, num_steps=1)
    config = digits.write_config(
        tmp_path,
        model,
        parallel={"tensor": 2},
        train={"num_steps": 1, "prompts_per_step": 8, "group_size": 4},
        checkpoint={"every": 1},
        debug={"train_only": str(rollouts)},
    )
    digits.train(config)
    shutil.rmtree(tmp_path / "run" / "hf")  # the export would be taken
    done = verify(tmp_path / "run", "--pipeline", "2")
    assert done.returncode == 0, done.stderr
    assert "checkpoints/step_0000001" in done.stdout and "equal: 26 param" in done.stdout, done


def test_a_planted_error_in_a_converted_checkpoint_is_named(tmp_path: Path) -> None:
    model = tiny.make_model(tmp_path / "model", tied=False)
    hf_to_megatron(model, tmp_path / "checkpoint", ParallelConfig())
    done = verify(tmp_path / "checkpoint", "--tensor", "2", plant=planted(tmp_path))
    assert done.returncode == 1
    assert "model.layers.1.self_attn.v_proj.weight: found checksum" in done.stderr, done.stderr


def planted(folder: Path) -> Path:
    """For PYTHONPATH."""
    (folder / "plant").mkdir()
    (folder / "plant" / "sitecustomize.py").write_text(PLANT)
    return folder / "plant"


def test_no_checkpoint_is_named(tmp_path: Path) -> None:
    done = verify(tmp_path)
    assert done.returncode == 1 and "found no config.json" in done.stderr
