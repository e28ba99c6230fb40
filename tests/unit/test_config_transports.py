"""Which layouts each refit transport is refused for: key, found, expected and fix."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from made.configs import run_check, run_config
from made.models import MOE

from sfpo_megatron.config import check
from sfpo_megatron.config.load import ConfigError
from sfpo_megatron.config.rules import transports
from sfpo_megatron.config.rules.engines import colocated

M2N = "refit.transport=nccl_m2n"
OURS = "set refit.transport: nccl_stages"
# key, found, expected, fix, overrides, changes to the model
REFUSED: dict[str, tuple[str, str, str, str, tuple[str, ...], dict[str, Any]]] = {
    "ipc_dedicated": (
        "refit.transport", "ipc with rollout.placement: dedicated", "colocated",
        "memory of its own device", ("refit.transport=ipc",), {}),
    "nccl_verify": (
        "refit.verify_every", "2 with refit.transport: nccl", "0", "set it to 0",
        ("refit.transport=nccl", "refit.verify_every=2"), {}),
    "m2n_verify": (
        "refit.verify_every", "1 with refit.transport: nccl_m2n", "0", "no checksums",
        (M2N, "refit.verify_every=1"), {}),
    "m2n_pipeline": (
        "parallel.pipeline", "2 with refit.transport: nccl_m2n", "a part of every tensor",
        f"{OURS}: a stage holds other layers", (M2N, "parallel.pipeline=2"), {}),
    "m2n_expert": (
        "parallel.expert", "2 with refit.transport: nccl_m2n", "1", f"{OURS}: an expert-parallel",
        (M2N, "parallel.expert=2", "parallel.data=2"), MOE),
    "m2n_expert_tensor": (
        "parallel.expert_tensor", "2 with refit.transport: nccl_m2n", "1 or parallel.tensor (4)",
        "set one of the two",
        (M2N, "parallel.expert_tensor=2", "parallel.tensor=4", "parallel.sequence=true"), MOE),
    "m2n_two_engines": (
        "rollout.num_engines", "2 with refit.transport: nccl_m2n", "a single engine",
        "set it to 1", (M2N, "rollout.num_engines=2"), {}),
    "m2n_tensor": (
        "parallel.tensor", "32 with refit.transport: nccl_m2n", "at most 16", OURS,
        (M2N, "parallel.tensor=32"), {}),
    "own_extension": (
        "rollout.engine_args.worker_extension_cls", "set with refit.transport: gloo", "nothing",
        "remove it",
        ("refit.transport=gloo", "rollout.engine_args={worker_extension_cls: mine.Worker}"), {}),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(here: Path, model_dir: Callable[..., Path], name: str) -> None:
    key, found, expected, fix, overrides, changes = REFUSED[name]
    model_dir(**changes)
    with pytest.raises(ConfigError) as caught:
        run_check(*overrides)
    error = caught.value
    assert error.key == key and found in error.found
    assert expected in error.expected and fix in error.fix


@pytest.mark.parametrize("transport", ["nccl_stages", "nccl", "nccl_m2n", "ipc"])
def test_without_a_cuda_device(here: Path, model_dir: Callable[..., Path], transport: str) -> None:
    """A warning on a login node, refused where training starts."""
    model_dir()
    placement = "colocated" if transport == "ipc" else "dedicated"
    overrides = (f"refit.transport={transport}", f"rollout.placement={placement}")
    expected = f"refit.transport: found {transport} without a CUDA device"
    assert any(expected in warning for warning in run_check(*overrides))
    with pytest.raises(ConfigError, match=r"set refit\.transport: gloo"):
        run_check(*overrides, for_training=True)


def test_m2n_without_its_package(
    here: Path, model_dir: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model_dir()
    monkeypatch.setattr(transports, "find_spec", lambda name: None)
    monkeypatch.setattr(check, "has_cuda", lambda: True)
    with pytest.raises(ConfigError, match="install nccl-extensions"):
        run_check(M2N, for_training=True)
    elsewhere = run_check(M2N, on_cpu=False, for_training=True)
    assert any("install nccl-extensions" in warning for warning in elsewhere)


@pytest.mark.parametrize(
    ("version", "found"),
    [
        ((2, 29, 7), "NCCL 2.29.7"),  # torch 2.13.0's
        ((2, 30, 4), "NCCL 2.30.4"),
        (None, "an NCCL that does not say its version"),
        ((2, 30, 5), None),
        ((3, 0, 0), None),
    ],
)
def test_m2n_goes_by_the_nccl_that_is_there(
    here: Path,
    model_dir: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    version: tuple[int, ...] | None,
    found: str | None,
) -> None:
    """Its packages are no sign: flashinfer brings them."""
    model_dir()
    monkeypatch.setattr(transports, "find_spec", lambda name: object())
    monkeypatch.setattr(transports, "nccl_version", lambda: version)
    monkeypatch.setattr(check, "has_cuda", lambda: True)
    if found is None:
        run_check(M2N, for_training=True)
        return
    with pytest.raises(
        ConfigError, match=rf"found nccl_m2n with {found}.*2\.30\.5 or newer.*SO_PATH"
    ):
        run_check(M2N, for_training=True)


@pytest.mark.parametrize(
    "overrides",
    [
        ("refit.transport=nccl", "parallel.pipeline=2", "rollout.num_engines=3"),
        (M2N, "parallel.tensor=2", "parallel.data=2"),
        (
            "refit.transport=ipc",
            "rollout.placement=colocated",
            "parallel.tensor=2",
            "rollout.num_engines=2",
        ),
        ("refit.transport=gloo", "refit.verify_every=1", "parallel.pipeline=2"),
    ],
)
def test_taken(
    here: Path,
    model_dir: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    overrides: tuple[str, ...],
) -> None:
    model_dir()
    monkeypatch.setattr(transports, "find_spec", lambda name: object())
    monkeypatch.setattr(transports, "nccl_version", lambda: (2, 30, 5))
    warnings = run_check(*overrides, on_cpu=False)
    assert not [text for text in warnings if "refit" in text]


@pytest.mark.parametrize(
    ("one_node", "on_cpu", "placement", "verify_every", "expected"),
    [
        (True, True, "dedicated", 0, "shm"),
        (True, False, "dedicated", 1, "shm"),
        (True, False, "colocated", 0, "shm"),
        (False, True, "dedicated", 0, "gloo"),
        (False, True, "colocated", 1, "gloo"),
        (False, False, "dedicated", 1, "nccl_stages"),
        (False, False, "colocated", 0, "ipc"),
        (False, False, "colocated", 1, "gloo"),
    ],
)
def test_auto_is_a_way_that_reaches_the_engines(
    one_node: bool, on_cpu: bool, placement: Any, verify_every: int, expected: str
) -> None:
    """And one that `check` takes, with the same settings."""
    rollout, refit = {"placement": placement}, {"verify_every": verify_every}
    config = run_config(rollout=rollout, refit=refit)
    found = transports.chosen(config, one_node=one_node, on_cpu=on_cpu)
    assert found.refit.transport == expected
    assert not list(transports.transports(found))
    assert not list(colocated(found, 1))
    given = run_config(rollout=rollout, refit=refit | {"transport": "gloo"})
    assert transports.chosen(given, one_node=one_node, on_cpu=on_cpu) is given
