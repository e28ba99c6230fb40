"""tools/verify_refit.py: equal at every layout; one element that changes on the way is named.

Not exercised: a mixture of experts, GPUs.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.full

# Imported by every Python process that finds it: changes one element before it is written.
PLANT = """
import os
if "RANK" in os.environ:
    from sfpo_megatron.resharding import filling
    real = filling.ShardFiller.fill
    def fill(self, bucket, buffer):
        sums = real(self, bucket, buffer)
        for index, view in enumerate(
            filling.views(self.manifest, bucket, self._buffer), bucket.first
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
    (tmp_path / "plant").mkdir()
    (tmp_path / "plant" / "sitecustomize.py").write_text(PLANT)
    done = verify(model, "--tensor", "2", plant=tmp_path / "plant")
    assert done.returncode == 1
    assert "model.layers.1.self_attn.v_proj.weight: found checksum" in done.stderr, done.stderr


def test_no_checkpoint_is_named(tmp_path: Path) -> None:
    done = verify(tmp_path)
    assert done.returncode == 1 and "found no config.json" in done.stderr
