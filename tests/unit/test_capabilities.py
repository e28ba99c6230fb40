"""What mcore.capabilities chooses, with packages that are absent, present, or broken on import.

Packages are fakes on a sys.path of their own, in a process of their own. Not exercised here: real
TransformerEngine or Apex; a device: what is asked of one that is there is told.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sfpo_megatron.mcore.capabilities import Capabilities, DoesNotLoad

Probe = Callable[..., str]

TE = {"transformer_engine/__init__.py": "__version__ = '2.9'", "transformer_engine/pytorch.py": ""}
# Installed without its [pytorch] extra.
NO_PYTORCH = {"transformer_engine/__init__.py": "__version__ = '2.9'"}
# As TransformerEngine does without a driver: not an ImportError.
BROKEN = {
    "transformer_engine/__init__.py": "__version__ = '2.9'",
    "transformer_engine/pytorch.py": "raise RuntimeError('libcuda.so.1: cannot open')",
}
APEX = {"apex/__init__.py": "", "apex/optimizers.py": "", "amp_C.py": ""}
BROKEN_APEX = {
    "apex/__init__.py": "",
    "apex/optimizers.py": "",
    "amp_C.py": "raise ImportError('undefined symbol: _ZN3c10')",
}
FALLBACKS: dict[str, Any] = {
    "cuda": False,
    "transformer_engine": None,
    "apex": False,
    "layers": "local",
    "adam": "torch",
}
HALF_APEX = {"apex/__init__.py": "", "apex/optimizers.py": ""}
SERVER = """
import json, logging, os, sys
import sfpo_megatron.mcore.capabilities  # and with it torch: the seconds are paid once

def case(choice, cuda):
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    try:
        found = sfpo_megatron.mcore.capabilities.probe(choice, cuda=cuda)
    except (ValueError, RuntimeError) as error:
        print(type(error).__name__, error)
        return
    assert "megatron" not in sys.modules, "Megatron was imported before the probe had decided"
    print("RESULT", found.layers, found.adam, found.transformer_engine, found.apex)
    try:
        import transformer_engine
        print("VISIBLE")
    except ImportError:
        print("HIDDEN")

for line in sys.stdin:
    packages, choice, cuda, output = json.loads(line)
    child = os.fork()
    if child == 0:
        sys.stdout = open(output, "w")
        sys.path.insert(0, packages)
        case(choice, cuda)
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

    def ask(files: dict[str, str], choice: str, *, cuda: bool = False) -> str:
        for name, text in files.items():
            file = tmp_path / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        assert server.stdin and server.stdout
        print(
            json.dumps([str(tmp_path), choice, cuda, f"{tmp_path}/said"]),
            file=server.stdin,
            flush=True,
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
    assert "transformer_engine is installed but does not load here" in said
    assert reason in said


@pytest.mark.parametrize("files", [{}, BROKEN], ids=["absent", "broken"])
def test_te_asked_for_and_not_there(probe: Probe, files: dict[str, str]) -> None:
    said = probe(files, "te")
    assert "ValueError model.transformer_impl: found te" in said and "transformer_impl=auto" in said
    assert "requirements/gpu.sh or `sfpo-megatron install gpu`" in said, (
        "pip would build it wrongly"
    )


@pytest.mark.parametrize(
    ("files", "cause", "fix"),
    [
        (BROKEN, "RuntimeError: libcuda.so.1: cannot open", "requirements/gpu.sh"),
        (NO_PYTORCH, "No module named 'transformer_engine.pytorch'", "requirements/gpu.sh"),
        (HALF_APEX, "No module named 'amp_C'", "APEX_CUDA_EXT=1"),
        (BROKEN_APEX, "undefined symbol", "APEX_CUDA_EXT=1"),
    ],
    ids=["te", "te_without_its_extension", "apex_without_its_extensions", "apex"],
)
def test_on_cuda_what_is_installed_and_broken_ends_the_run(
    probe: Probe, files: dict[str, str], cause: str, fix: str
) -> None:
    """A warning would leave it at a run several times slower; `local` accepts that."""
    said = probe(files, "auto", cuda=True)
    assert said.startswith("DoesNotLoad model.transformer_impl: found ")
    assert cause in said and fix in said and "set model.transformer_impl: local" in said
    accepted = probe(files, "local", cuda=True)
    assert "RESULT local torch None False" in accepted and "does not load here" in accepted


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, "RESULT local torch None False"),
        (TE, "RESULT te te 2.9 False"),
        (TE | HALF_APEX, "RESULT te te 2.9 False"),
        (TE | BROKEN_APEX, "RESULT te te 2.9 False"),
    ],
    ids=["nothing", "te", "te_and_half_apex", "te_and_a_broken_apex"],
)
def test_on_cuda_what_is_absent_or_not_needed_ends_nothing(
    probe: Probe, files: dict[str, str], expected: str
) -> None:
    assert expected in probe(files, "auto", cuda=True)


def test_a_gpu_that_torch_cannot_use_ends_the_run_before_any_group_is_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By CPU it would run on, for weeks."""
    from made.configs import run_config

    from sfpo_megatron.host.gpus import VISIBLE, Driver
    from sfpo_megatron.mcore import capabilities, setup

    monkeypatch.delenv(VISIBLE, raising=False)
    monkeypatch.setattr(capabilities, "driver", lambda: Driver(version="570.86.15", num_gpus=8))
    monkeypatch.setattr(setup, "probe", lambda choice: Capabilities(**FALLBACKS))
    with pytest.raises(DoesNotLoad, match=r"found driver 570\.86\.15 with 8 GPUs"):
        setup.init_distributed(run_config())
    monkeypatch.setenv(VISIBLE, "")
    capabilities.expect_no_gpu()
