"""The random number generators of one rank as tensors.

They are torch's, CUDA's, Megatron's tracker, numpy's and Python's."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import tensor_parallel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

RNG_FILES = "rng_"
"""How their names begin."""


def rng_file(directory: Path, rank: int) -> Path:
    """File of a checkpoint in which `rank` keeps its generators."""
    return directory / f"{RNG_FILES}{rank:05d}.safetensors"


def save_rng(path: Path) -> None:
    """Save every generator of this process in one safetensors file."""
    version, words, gauss = random.getstate()
    state: Any = np.random.get_state(legacy=True)
    _, keys, position, has_gauss, cached = state
    tensors: dict[str, Tensor] = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor(words, dtype=torch.int64),
        "numpy": torch.from_numpy(keys.astype(np.int64)),
        "numpy_rest": torch.tensor([position, has_gauss, cached], dtype=torch.float64),
    }
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    for name, state in tensor_parallel.get_cuda_rng_tracker().get_states().items():
        if not isinstance(state, torch.Tensor):  # CUDA graphs keep generators instead
            state = state.get_state()
        tensors[f"tracker/{name}"] = state.clone()
    # float.hex: exact, whatever the number of digits
    extra = {"python_version": str(version), "python_gauss": "" if gauss is None else gauss.hex()}
    save_file(tensors, path, metadata=extra)


def load_rng(path: Path) -> None:
    """Inverse of `save_rng`."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        extra = file.metadata()
    torch.set_rng_state(tensors["torch"])
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])
    gauss = extra["python_gauss"]
    words = tuple(tensors["python"].tolist())
    random.setstate((int(extra["python_version"]), words, float.fromhex(gauss) if gauss else None))
    position, has_gauss, cached = tensors["numpy_rest"].tolist()
    keys = tensors["numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, int(position), int(has_gauss), cached))
    tracker = tensor_parallel.get_cuda_rng_tracker()
    states = tracker.get_states()
    for name in states:
        saved = tensors.get(f"tracker/{name}")
        if saved is None:
            continue
        if isinstance(states[name], torch.Tensor):
            states[name] = saved
        else:
            states[name].set_state(saved)
    tracker.set_states(states)
