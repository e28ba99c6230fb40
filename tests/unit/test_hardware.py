"""What `doctor` says of links, pages, limits and the compiler, from files and programs given here.

Not exercised: real adapters, nvidia-smi itself.
"""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from sfpo_megatron import doctor
from sfpo_megatron.host.hardware import huge_pages, infiniband, limits, nvlinks

LINKED = """\
GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-1)
\t Link 0: 26.562 GB/s
\t Link 1: 26.562 GB/s
GPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-2)
\t Link 0: 26.562 GB/s
\t Link 1: <inactive>
"""


def port(root: Path, adapter: str, **facts: str) -> None:
    folder = root / f"sys/class/infiniband/{adapter}/ports/1"
    folder.mkdir(parents=True)
    for name, text in facts.items():
        (folder / name).write_text(f"{text}\n")


def test_infiniband_is_counted_by_kind_and_state(tmp_path: Path) -> None:
    assert infiniband(tmp_path).startswith("none: ")
    up = {"link_layer": "InfiniBand", "rate": "400 Gb/sec (4X NDR)"}
    port(tmp_path, "mlx5_0", **up, state="4: ACTIVE")
    port(tmp_path, "mlx5_1", **up, state="4: ACTIVE")
    port(tmp_path, "mlx5_2", **up, state="1: DOWN")
    port(tmp_path, "mlx5_3", link_layer="Ethernet", state="4: ACTIVE")
    assert infiniband(tmp_path).split("; ") == [
        "2 x InfiniBand 400 Gb/sec (4X NDR), ACTIVE",
        "1 x InfiniBand 400 Gb/sec (4X NDR), DOWN",
        "1 x Ethernet unknown here, ACTIVE",
    ]


def test_huge_pages(tmp_path: Path) -> None:
    assert huge_pages(tmp_path) == "transparent: unknown here; set aside: unknown here"
    for name, text in (
        ("sys/kernel/mm/transparent_hugepage/enabled", "always [madvise] never\n"),
        ("proc/sys/vm/nr_hugepages", "128\n"),
    ):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(text)
    assert huge_pages(tmp_path) == "transparent: madvise; set aside: 128"


def test_limits_are_this_process_own() -> None:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    expected = "unlimited" if soft == resource.RLIM_INFINITY else soft
    assert f"open files {expected}" in limits() and limits().startswith("locked memory ")


@pytest.mark.parametrize(
    ("text", "code", "expected"),
    [
        (LINKED, 0, "1 on 1 GPUs; 2 on 1 GPUs, 26.562 GB/s each"),
        (LINKED.replace("<inactive>", "26.562 GB/s"), 0, "2 on 2 GPUs, 26.562 GB/s each"),
        ("GPU 0: NVIDIA L4 (UUID: GPU-1)\n", 0, "none: GPUs reach one another over PCIe"),
        ("", 9, "unknown here: "),
    ],
)
def test_nvlinks_by_the_drivers_own_tool(
    tmp_path: Path, text: str, code: int, expected: str
) -> None:
    (tmp_path / "said").write_text(text)
    smi = tmp_path / "smi"
    smi.write_text(f'#!/bin/sh\ntest "$*" = "nvlink -s" && cat {tmp_path}/said\nexit {code}\n')
    smi.chmod(0o755)
    assert nvlinks(str(smi)).startswith(expected)
    assert nvlinks(str(tmp_path / "none")).endswith("is not on PATH")
    smi.write_text("#!/no/such/shell\n")
    assert nvlinks(str(smi)) == f"unknown here: {smi} does not answer"


@pytest.mark.parametrize(
    ("programs", "named", "said"),
    [
        (["gcc", "clang"], None, "gcc, with"),
        (["clang", "cc"], None, "clang, with"),
        (["cc"], None, "without gcc: on GPUs"),  # Triton does not try it
        (["gcc", "icc"], "icc", "icc, with"),
        (["gcc"], "icc", "without icc: on GPUs"),
        ([], None, "without gcc and "),
    ],
)
def test_the_compiler_is_the_one_that_triton_takes(
    programs: list[str],
    named: str | None,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in programs:
        (tmp_path / name).touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    if named:
        monkeypatch.setenv("CC", named)
    monkeypatch.setattr(doctor.sysconfig, "get_path", lambda name: str(tmp_path))
    if programs:
        (tmp_path / "Python.h").touch()
    assert said in doctor._compiler()
