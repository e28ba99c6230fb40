"""How much memory the converters take: a model of 494M parameters, in a process of its own.

Peak anonymous memory (RssAnon: what is not a file of the disk) is at most three times the largest
tensor and 1 GiB.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from made.hf import make_hf

from benchmarks.common import provenance

ROOT = Path(__file__).parents[2]
QWEN2_5_0_5B = {
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 151936,
}
LARGEST_BYTES = 151936 * 896 * 2


def run(tool: str, *arguments: object) -> tuple[int, float]:
    """(peak RssAnon in bytes, seconds) of `python tools/TOOL.py`."""
    command = [sys.executable, str(ROOT / "tools" / tool), *map(str, arguments)]
    begun, peak = time.monotonic(), 0
    process = subprocess.Popen(command)
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        found = re.search(r"RssAnon:\s+(\d+) kB", status.read_text())
        peak = max(peak, 1024 * int(found.group(1)) if found else 0)
        time.sleep(0.002)
    assert process.returncode == 0
    return peak, time.monotonic() - begun


@pytest.mark.full
def test_peak_memory(tmp_path: Path) -> None:
    hf = make_hf(tmp_path / "hf", **QWEN2_5_0_5B)
    results: dict[str, object] = {"largest_tensor_mib": LARGEST_BYTES / 2**20}
    for name, tool, *arguments in (
        ("hf_to_megatron", "convert_hf_to_megatron.py", "--hf", hf, "--tp", 2),
        ("megatron_to_hf", "convert_megatron_to_hf.py", "--checkpoint", tmp_path / "m"),
    ):
        out = tmp_path / ("m" if name == "hf_to_megatron" else "back")
        peak, seconds = run(tool, *arguments, "--out", out)
        assert peak <= 3 * LARGEST_BYTES + 2**30, f"{name}: {peak / 2**20:.0f} MiB"
        results[name] = {"peak_anonymous_mib": round(peak / 2**20), "seconds": round(seconds, 1)}
    size = (hf / "model.safetensors").stat().st_size
    assert size == (tmp_path / "back/model.safetensors").stat().st_size
    results["model_mib"] = round(size / 2**20)
    provenance.write_cpu("converter_memory", results)
