"""The driver's GPUs and their names, over a table of environments; Ray counts the same table.

Not exercised: a driver; what CUDA itself makes of a list (torch's own reading of it is asked).
"""

from __future__ import annotations

from itertools import takewhile
from pathlib import Path

import pytest

from sfpo_megatron.host.gpus import (
    VISIBLE,
    Driver,
    devices_of_own_node,
    driver,
    own_device,
    unusable,
    visible_devices,
)

KERNEL = {
    "570.86.15": "NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15  Thu Jan 2\n"
    "GCC version:  gcc version 12.3.0 (Ubuntu 12.3.0-1ubuntu1~22.04)\n",
    "580.65.06": "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release\n",
    "unknown": "NVRM version: something else\n",
}


def machine(root: Path, version: str | None, num_gpus: int) -> Path:
    """A root folder with what the driver leaves there."""
    (root / "dev").mkdir(parents=True)
    for name in (*range(num_gpus), "ctl", "-uvm", "-caps"):
        (root / f"dev/nvidia{name}").touch()
    if version is not None:
        (root / "proc/driver/nvidia").mkdir(parents=True)
        (root / "proc/driver/nvidia/version").write_text(KERNEL[version])
    return root


@pytest.mark.parametrize("version", KERNEL)
def test_the_driver_says_its_version_and_its_gpus(tmp_path: Path, version: str) -> None:
    assert driver(machine(tmp_path / "a", version, 8)) == Driver(version=version, num_gpus=8)
    # A container that was given no GPU: the driver is in /proc all the same.
    assert driver(machine(tmp_path / "b", version, 0)) == Driver(version=version, num_gpus=0)
    assert driver(machine(tmp_path / "c", None, 0)) is None


UUIDS = ("GPU-8932f937-d72c-4106-c12f-20bd9faed9f6", "GPU-b1028956-cfa2-0990-bf4a-5da9abb51763")
MIGS = ("MIG-bd1cc1ec-9d6c-5cd0-b7e7-3de2d3ee7c49", "MIG-a6ba4bbd-9c9b-5a3c-b4c6-33f4e1a6f0b1")
ENVIRONMENTS: dict[str | None, tuple[str, ...]] = {
    None: tuple("01234567"),
    "": (),
    "-1": (),
    "NoDevFiles": (),
    "4,5,6,7": ("4", "5", "6", "7"),
    "7,6": ("7", "6"),
    " 4, 5 ": ("4", "5"),
    "04": ("4",),
    "4,-1,5": ("4",),
    "4,,5": ("4",),
    "4,9,5": ("4",),  # there is no ninth: CUDA ends the list there
    "4,4": (),
    f"4,{UUIDS[0]}": ("4",),
    ",".join(UUIDS): UUIDS,
    f"{UUIDS[0]},1": UUIDS[:1],
    f"{UUIDS[0]},{UUIDS[0]}": (),
    MIGS[0]: MIGS[:1],
    ",".join(MIGS): MIGS,
    f"{MIGS[0]},{UUIDS[0]}": MIGS[:1],
}


def environment(listed: str | None) -> dict[str, str]:
    return {} if listed is None else {VISIBLE: listed}


@pytest.mark.parametrize("listed", ENVIRONMENTS)
def test_a_list_is_read_as_cuda_reads_it(
    listed: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's reading of the same list, which stands in for CUDA's where NVML counts devices."""
    found = visible_devices(8, environment(listed))
    assert found == ENVIRONMENTS[listed]
    from torch.cuda import _parse_visible_devices

    monkeypatch.delenv(VISIBLE, raising=False)
    if listed is not None:
        monkeypatch.setenv(VISIBLE, listed)
    theirs = map(str, _parse_visible_devices())  # it does not know how many there are
    assert found == tuple(takewhile(lambda n: not n.isdecimal() or int(n) < 8, theirs))


@pytest.mark.parametrize("listed", ENVIRONMENTS)
def test_rays_count_never_names_a_device_outside_the_list(
    listed: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray's own counting, on a machine of eight: NVML alone is replaced."""
    from ray._private.accelerators import NvidiaGPUAcceleratorManager
    from ray._private.resource_and_label_spec import ResourceAndLabelSpec

    monkeypatch.delenv(VISIBLE, raising=False)
    if listed is not None:
        monkeypatch.setenv(VISIBLE, listed)
    monkeypatch.setattr(
        NvidiaGPUAcceleratorManager, "get_current_node_num_accelerators", staticmethod(lambda: 8)
    )
    _, counted = ResourceAndLabelSpec._get_current_node_accelerator(None, {})
    root = machine(tmp_path, "580.65.06", 8)
    found = devices_of_own_node(int(counted), environment(listed), root)
    assert found == ENVIRONMENTS[listed]
    assert len(found) <= counted


@pytest.mark.parametrize(
    ("environ", "num_visible", "expected"),
    [
        ({}, 1, 0),
        ({"LOCAL_RANK": "3"}, 4, 3),
        ({"LOCAL_RANK": "1", VISIBLE: "7,6"}, 2, 1),
        ({"LOCAL_RANK": "1", VISIBLE: "7"}, 1, None),  # a GPU bound to each task
        ({"LOCAL_RANK": "1", VISIBLE: ",".join(MIGS)}, 1, None),
        ({"LOCAL_RANK": "8"}, 8, None),
    ],
)
def test_a_rank_has_a_device_of_its_own(
    environ: dict[str, str], num_visible: int, expected: int | None
) -> None:
    if expected is not None:
        assert own_device(num_visible, environ) == expected
        return
    found = f"found {environ['LOCAL_RANK']} where torch has {num_visible} devices"
    with pytest.raises(ValueError, match=found):
        own_device(num_visible, environ)


def test_without_nvml_there_are_no_devices_whatever_the_list_says(tmp_path: Path) -> None:
    assert devices_of_own_node(0, {VISIBLE: "4,5"}, machine(tmp_path, None, 0)) == ()


CPU_BUILD, CUDA_13, CUDA_12 = ("2.13.0+cpu", None), ("2.13.0+cu130", "13.0"), ("2.7.0", "12.8")


@pytest.mark.parametrize(
    ("version", "build", "environ", "expected"),
    [
        ("570.86.15", CUDA_13, {}, ["found driver 570.86.15 with 2 GPUs", "expected 580 or newer",
                                    "CUDA 13.0 of torch 2.13.0+cu130", "cuda-compat-13-0"]),
        ("580.65.06", CPU_BUILD, {}, ["torch 2.13.0+cpu, a CPU build", "set for GPUs"]),
        ("580.65.06", CUDA_13, {}, ["cannot use (busy or gone)"]),
        ("570.86.15", CUDA_12, {}, ["cannot use (busy or gone)"]),
        ("unknown", CUDA_13, {}, ["driver unknown", "cannot use (busy or gone)"]),
        ("570.86.15", CUDA_13, {VISIBLE: "1"}, ["expected 580 or newer"]),
        ("570.86.15", CUDA_13, {VISIBLE: ""}, None),
        ("570.86.15", CUDA_13, {VISIBLE: "-1"}, None),
    ],
)  # fmt: skip
def test_a_gpu_that_torch_cannot_use_is_said_with_the_fix(
    tmp_path: Path,
    version: str,
    build: tuple[str, str | None],
    environ: dict[str, str],
    expected: list[str] | None,
) -> None:
    found = driver(machine(tmp_path, version, 2))
    said = unusable(
        found, torch_version=build[0], torch_cuda=build[1], why="busy or gone", environ=environ
    )
    assert (said is None) == (expected is None)
    if said is not None and expected is not None:
        assert all(part in said for part in [*expected, f"set {VISIBLE}="]), said


def test_machines_without_a_gpu_of_their_own_are_meant_for_cpu(tmp_path: Path) -> None:
    """No driver; and a container on a machine with GPUs that was given none."""
    build = {"torch_version": "2.13.0+cu130", "torch_cuda": "13.0", "why": "", "environ": {}}
    assert unusable(driver(machine(tmp_path / "a", None, 0)), **build) is None
    assert unusable(driver(machine(tmp_path / "b", "570.86.15", 0)), **build) is None
