"""docs/getting-started.md as a reader follows it: all its blocks, in order, in one shell.

Not exercised: `make venv` and `make demo` (test_demo.py runs them) and the download of SmolLM2, in
whose place is a tiny random model; so nothing is said of what is learned.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tools import make_tiny_model

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/getting-started.md"
GET_MODEL = "python tools/get_smollm2.py --out hello/model\n"
ELSEWHERE = ("make venv\n", "make demo\n", GET_MODEL)
"""Blocks that other tests run."""
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
TIMEOUT_S = 1500


def blocks() -> list[str]:
    return re.findall(r"^```sh\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), flags=re.M | re.S)


def make_model(directory: Path) -> None:
    """A tiny model with a chat template, as SmolLM2 has one, and tokens of the page's questions."""
    questions = directory.with_name("questions.jsonl")
    lines = re.findall(r'^{"prompt": .*}$', PAGE.read_text(encoding="utf-8"), flags=re.M)
    questions.write_text("\n".join(lines), encoding="utf-8")
    config = directory.with_name("model.yaml")
    source = {"source": "jsonl", "path": str(questions)}
    settings = {"output_dir": "r", "model": {"path": "m"}, "data": {"train": [source]}}
    config.write_text(json.dumps(settings), encoding="utf-8")
    assert make_tiny_model.main(["--out", str(directory), "--config", str(config)]) == 0
    file = directory / "tokenizer_config.json"
    tokenizer = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**tokenizer, "chat_template": CHAT_TEMPLATE}), encoding="utf-8")


def run(script: str, folder: Path) -> str:
    """Output of `script`, whose processes end with it."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    process = subprocess.Popen(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
    )
    try:
        output, _ = process.communicate(timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        for child in psutil.Process(process.pid).children(recursive=True):
            child.send_signal(signal.SIGTERM)
        process.kill()
        raise
    assert process.returncode == 0, output
    return output


@pytest.mark.full
def test_every_block_runs(tmp_path: Path) -> None:
    found = blocks()
    assert [block for block in found if block in ELSEWHERE] == list(ELSEWHERE)
    (tmp_path / ".venv").symlink_to(sys.prefix)
    (tmp_path / "hello").mkdir()
    make_model(tmp_path / "hello/model")
    script = "".join(
        f"echo '== block {number}'\n{block}"
        for number, block in enumerate(found)
        if block not in ELSEWHERE
    )
    output = run(script, tmp_path)
    work = tmp_path / "hello"
    lines = [json.loads(line) for line in (work / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 9))
    assert [line["step"] for line in lines if "eval/accuracy" in line] == [0, 3, 6, 8]
    assert all("reward/numbers" in line for line in lines if "loss" in line)
    for file in (
        "run/report.html",
        "run/trace/step_0000002.json",
        "run/hf/model.safetensors",
        "warm/hf/model.safetensors",
        "compared/eval/results.md",
    ):
        assert (work / file).stat().st_size > 0, f"{file}\n{output}"
