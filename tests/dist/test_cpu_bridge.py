"""mcore.cpu stands in for CUDA only where it is asked to: never at import, and it can be undone.

Not exercised here: a machine with CUDA (tests/gpu asserts that the module is not imported there).
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "sfpo_megatron"
HEADER = "import sys, pkgutil, importlib, torch, torch.optim, sfpo_megatron\n"
SNAPSHOT = """
def names():
    owners = [torch, torch.cuda, torch.cuda.random, torch.Tensor, torch.nn.Module]
    owners += [torch.distributed, torch.accelerator]
    return {(str(o), n): getattr(o, n, None) for o in owners for n in dir(o) if n[:2] != "__"}
def changed():
    now = names()
    return sorted(k[1] for k, v in before.items() if now.get(k) is not v)
again, before = names(), names()
before = {k: v for k, v in before.items() if again[k] is v}  # some are made anew at each look
"""
INSTALL = """
from sfpo_megatron.mcore import cpu
cpu.install()
first = changed()
expected = {"current_device", "current_accelerator", "Stream", "empty", "cuda", "to", "type"}
assert expected <= set(first), first
assert torch.accelerator.current_accelerator() is None, "with a CUDA build too"
import os
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # vLLM's import sets it, and counts devices so
torch.cuda._is_compiled = lambda: True  # as in a CUDA build
assert torch.cuda.device_count() == 1 and not torch.cuda.is_available()
torch.cuda._is_compiled = before[str(torch.cuda), "_is_compiled"]
assert torch.empty(2, device="cuda").device.type == "cpu"
tensor = torch.empty(2, device=torch.device("cuda", 0)).to("cuda").cuda()
assert tensor.type() == "torch.cuda.FloatTensor"
with torch.device("meta"):
    assert torch.empty(2).is_meta and torch.arange(2).is_meta, "transformers makes its models so"
bound = torch.cuda.current_device
cpu.install()
assert torch.cuda.current_device is bound, "a second install wrapped the first"
cpu.uninstall()
assert changed() == [], changed()
assert torch.empty(2).type() == "torch.FloatTensor"
cpu.uninstall()
assert changed() == []
"""
# Engines are processes of their own that never see the bridge, and vllm takes seconds to import.
IMPORT_ALL = """
modules = [m.name for m in pkgutil.walk_packages(sfpo_megatron.__path__, "sfpo_megatron.")]
other = ("sfpo_megatron.rollout", "sfpo_megatron.resharding.transports")
wanted = [m for m in modules if not m.startswith(other) and not m.endswith("__main__")]
assert "sfpo_megatron.mcore.passes" in wanted and "sfpo_megatron.mcore.cpu" in wanted
from sfpo_megatron.mcore.capabilities import probe
probe("local")
for name in wanted:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:  # a sink whose library is an extra
        if error.name.split(".")[0] not in ("tensorboard", "wandb", "mlflow"):
            raise
assert sys.modules["sfpo_megatron.mcore.cpu"]._installed == []
assert torch.cuda.current_device.__module__ == "torch.cuda", torch.cuda.current_device
assert torch.empty(2).type() == "torch.FloatTensor"
"""


@pytest.mark.parametrize(
    "script",
    [HEADER + SNAPSHOT + INSTALL, HEADER + IMPORT_ALL],
    ids=["install_twice_uninstall_once", "imports_do_not_install"],
)
def test_in_a_fresh_process(script: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_no_module_imports_the_bridge_at_import_time() -> None:
    """Every import of mcore.cpu is inside a function (and there is one: the check is not empty)."""
    inside = 0
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        lazy = {
            id(node)
            for function in ast.walk(tree)
            if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
            for node in ast.walk(function)
        }
        for node in ast.walk(tree):
            if not isinstance(node, ast.Import | ast.ImportFrom):
                continue
            module = getattr(node, "module", None) or ""
            names = {f"{module}.{alias.name}".strip(".") for alias in node.names} | {module}
            if "sfpo_megatron.mcore.cpu" in names:
                assert id(node) in lazy, f"{path}:{node.lineno} imports the CPU bridge at import"
                inside += 1
    assert inside >= 1
