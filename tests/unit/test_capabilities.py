"""What mcore.capabilities chooses, with packages that are absent, present, or broken on import.

Packages are fakes on a sys.path of their own, in a process of their own. Not exercised here: real
TransformerEngine or Apex, CUDA.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

Probe = Callable[[dict[str, str], str], str]

TE = {"transformer_engine/__init__.py": "__version__ = '2.9'", "transformer_engine/pytorch.py": ""}
# Installed without its [pytorch] extra.
NO_PYTORCH = {"transformer_engine/__init__.py": "__version__ = '2.9'"}
# As TransformerEngine does without a driver: not an ImportError.
BROKEN = {
    "transformer_engine/__init__.py": "__version__ = '2.9'",
    "transformer_engine/pytorch.py": "raise RuntimeError('libcuda.so.1: cannot open')",
}
APEX = {"apex/__init__.py": "", "apex/optimizers.py": "", "amp_C.py": ""}
HALF_APEX = {"apex/__init__.py": "", "apex/optimizers.py": ""}
SERVER = """
import json, logging, os, sys
import sfpo_megatron.mcore.capabilities  # and with it torch: the seconds are paid once

def case(choice):
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    try:
        found = sfpo_megatron.mcore.capabilities.probe(choice)
    except ValueError as error:
        print("ValueError", error)
        return
    assert "megatron" not in sys.modules, "Megatron was imported before the probe had decided"
    print("RESULT", found.layers, found.adam, found.transformer_engine, found.apex)
    try:
        import transformer_engine
        print("VISIBLE")
    except ImportError:
        print("HIDDEN")

for line in sys.stdin:
    packages, choice, output = json.loads(line)
    child = os.fork()
    if child == 0:
        sys.stdout = open(output, "w")
        sys.path.insert(0, packages)
        case(choice)
        sys.stdout.flush()
        os._exit(0)
    print(os.waitpid(child, 0)[1], flush=True)
"""


@pytest.fixture(scope="module")
def server() -> Iterator[subprocess.Popen[str]]:
    """Forks a process for each case."""
    with subprocess.Popen(
        [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield process


@pytest.fixture
def probe(server: subprocess.Popen[str], tmp_path: Path) -> Probe:
    """`probe(files, choice)` with these files on the path: what it says and logs."""

    def ask(files: dict[str, str], choice: str) -> str:
        for name, text in files.items():
            file = tmp_path / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        assert server.stdin and server.stdout
        print(
            json.dumps([str(tmp_path), choice, f"{tmp_path}/said"]), file=server.stdin, flush=True
        )
        assert server.stdout.readline() == "0\n", "the case raised: see stderr"
        return (tmp_path / "said").read_text()

    return ask


@pytest.mark.parametrize(
    ("files", "choice", "expected"),
    [
        ({}, "auto", "RESULT local torch None False"),
        (TE, "auto", "RESULT te te 2.9 False"),
        (TE, "te", "RESULT te te 2.9 False"),
        (TE, "local", "RESULT local te 2.9 False"),
        (APEX, "auto", "RESULT local apex None True"),
        (HALF_APEX, "auto", "RESULT local torch None False"),
        (TE | APEX, "auto", "RESULT te te 2.9 True"),
    ],
    ids=["nothing", "te", "te_asked", "te_not_wanted", "apex", "half_apex", "both"],
)
def test_choice(probe: Probe, files: dict[str, str], choice: str, expected: str) -> None:
    said = probe(files, choice)
    assert expected in said
    assert "layers: " in said and "adam: " in said, "the choice is not in the log"


@pytest.mark.parametrize(
    ("files", "reason"),
    [(BROKEN, "libcuda.so.1"), (NO_PYTORCH, "No module named 'transformer_engine.pytorch'")],
    ids=["no_driver", "no_pytorch_extra"],
)
def test_a_broken_te_is_hidden_from_megatron_and_logged(
    probe: Probe, files: dict[str, str], reason: str
) -> None:
    """All of it: `import transformer_engine` alone makes Megatron import more, unguarded."""
    said = probe(files, "auto")
    assert "RESULT local torch None False" in said
    assert "HIDDEN" in said, "Megatron would import it and fail"
    assert "transformer_engine.pytorch is installed but does not load here" in said
    assert reason in said


@pytest.mark.parametrize("files", [{}, BROKEN], ids=["absent", "broken"])
def test_te_asked_for_and_not_there(probe: Probe, files: dict[str, str]) -> None:
    said = probe(files, "te")
    assert "ValueError model.transformer_impl: found te" in said and "transformer_impl=auto" in said
