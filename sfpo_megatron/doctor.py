"""`sfpo-megatron doctor`: versions, devices, and what a run will use here, with the reason."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING

from sfpo_megatron.host.addresses import gloo_fault, own_address
from sfpo_megatron.host.gpus import VISIBLE, driver
from sfpo_megatron.host.hardware import huge_pages, infiniband, limits, nvlinks
from sfpo_megatron.host.home import can_be_written
from sfpo_megatron.host.shortage import total_memory
from sfpo_megatron.outputs.starts import DISTRIBUTIONS, versions
from sfpo_megatron.sandbox.isolation import isolation

if TYPE_CHECKING:
    from sfpo_megatron.mcore.capabilities import Capabilities

_GIB = 1024**3
_RUNNER = "VLLM_USE_V2_MODEL_RUNNER"


def report() -> str:
    """The whole report, one fact a line."""
    sections = {
        "versions": _versions(),
        "devices": _devices(),
        "machine": _machine(),
        "will be used": _used(),
    }
    lines = []
    for title, facts in sections.items():
        lines.append(title)
        width = max(len(name) for name in facts)
        lines += [f"  {name:<{width}}  {value}" for name, value in facts.items()]
    return "\n".join(lines) + "\n"


def _versions() -> dict[str, str]:
    found = versions()
    named = {name: found.get(name, "not installed") for name in DISTRIBUTIONS}
    return {"python": platform.python_version(), **named}


def _devices() -> dict[str, str]:
    facts = {}
    found = driver()
    if found is not None:
        facts["driver"] = f"{found.version}, {found.num_gpus} GPUs"
        facts["NVLink"] = nvlinks()
    facts["InfiniBand"] = infiniband()
    if VISIBLE in os.environ:
        facts[VISIBLE] = os.environ[VISIBLE] or "empty: no GPU"
    try:
        import torch
    except Exception as error:  # a broken install raises whatever its loader raises
        return facts | {"torch": _not_imported(error)}
    facts["torch build"] = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"
    if not torch.cuda.is_available():
        if torch.version.cuda and found is None:
            facts["torch build"] += ", on a machine without: the CPU build does as well"
        return facts | {"GPUs": "none: gloo, one OpenMP thread a process"}
    facts["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    cudnn = torch.backends.cudnn.version()
    facts["cuDNN"] = f"{cudnn // 10000}.{cudnn // 100 % 100}.{cudnn % 100}" if cudnn else "none"
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        facts[f"GPU {index}"] = f"{device.name}, {device.total_memory / _GIB:.0f} GiB"
    return facts


def _not_imported(error: Exception) -> str:
    return f"cannot be imported: {' '.join(str(error).split()) or type(error).__name__}"


def _machine() -> dict[str, str]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    usable = min(total_memory() or memory, memory)  # less in a container or a Slurm job
    facts = {
        "cores": f"{len(os.sched_getaffinity(0))} usable of {os.cpu_count()}",
        "memory": f"{usable / _GIB:.1f} usable of {memory / _GIB:.1f} GiB",
        "huge pages": huge_pages(),
        "limits": limits(),
        "compiler": _compiler(),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "unset: the launcher sets 1"),
    }
    home = os.environ.get("HOME", "")
    if not home:
        facts["home"] = "none (HOME is not set): a run finds one of its own"
    elif not can_be_written(home):
        facts["home"] = f"{home}, which cannot be written: caches of a run go elsewhere"
    facts["address"] = gloo_fault() or f"{own_address()}, as ranks on other machines are told"
    shm = Path("/dev/shm")
    if shm.is_dir():
        usage = shutil.disk_usage(shm)
        facts["shared memory"] = (
            f"{usage.free / _GIB:.1f} GiB free of {usage.total / _GIB:.1f} ({shm})"
        )
    else:
        facts["shared memory"] = "none: the refit goes through a file"
    missing = isolation().missing
    facts["tool python"] = (
        f"programs of a model are not kept from {' and '.join(missing)}"
        if missing
        else "programs of a model have no network, no files and no processes of others"
    )
    return facts


def _compiler() -> str:
    """Whether Triton can compile its launchers, which it does in each run on GPUs: with what CC
    names, else with one of two (`_build`, triton/runtime/build.py)."""
    named = os.environ.get("CC")
    compiler = shutil.which(named) if named else shutil.which("gcc") or shutil.which("clang")
    header = Path(sysconfig.get_path("include"), "Python.h")
    missing = [] if compiler else [named or "gcc"]
    missing += [] if header.is_file() else [str(header)]
    if missing:
        return f"without {' and '.join(missing)}: on GPUs engines and ranks need it, for Triton"
    return f"{compiler}, with Python's headers"


def _used() -> dict[str, str]:
    """What the trainer and its engines use on this machine, as `mcore/capabilities.py` and vLLM
    decide."""
    try:
        from sfpo_megatron.mcore.capabilities import DoesNotLoad, expect_no_gpu, probe
    except Exception as error:
        return {"unknown here": f"torch {_not_imported(error)}"}
    try:
        found = probe()
        if not found.cuda:
            expect_no_gpu()
    except DoesNotLoad as error:
        return {"error": f"a run ends here: {error}"}
    return _of_trainer(found) | {"model runner": _runner(found.cuda)}


def _of_trainer(found: Capabilities) -> dict[str, str]:
    te = found.layers == "te"
    absent = "TransformerEngine cannot be used here"
    adam = {
        "te": "TransformerEngine FusedAdam",
        "apex": f"Apex FusedAdam ({absent})",
        "torch": f"torch AdamW ({absent}, nor can Apex)",
    }
    fused = "cuDNN's kernels in bf16 and fp16, none fused in float32"
    if importlib.util.find_spec("flash_attn") is not None:
        fused = f"flash_attn's or {fused}"
    fusions = "SwiGLU, bias and dropout, masked softmax (torch.compile)"
    return {
        "layer spec": "TransformerEngine" if te else f"torch ({absent})",
        "optimizer": adam[found.adam],
        "norm": "TransformerEngine RMSNorm" if te else f"torch RMSNorm ({absent})",
        "attention": f"TransformerEngine: {fused}"
        if te
        else f"torch scaled_dot_product_attention, packs padded ({absent})",
        "fusions": (f"{fusions}, RoPE (TransformerEngine)" if te else fusions)
        if found.cuda
        else "none (no CUDA)",
        "collectives": "NCCL" if found.cuda else "gloo (no CUDA)",
    }


def _runner(cuda: bool) -> str:
    """vLLM's model runner, as VllmConfig.use_v2_model_runner chooses it for what we ask of it."""
    if importlib.util.find_spec("vllm") is None:
        return "unknown here: vLLM is not installed"
    if (given := os.environ.get(_RUNNER)) is not None:
        return f"{'V1' if given in ('', '0') else 'V2'} ({_RUNNER}={given})"
    if not cuda or importlib.util.find_spec("triton") is None:
        return "V1 (V2 needs Triton, which cannot be used here)"
    return "V2 (vLLM's choice where Triton is)"
