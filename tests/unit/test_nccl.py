"""Which NCCL there is, asked of a library that the test compiles. Not exercised: NCCL itself."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from sfpo_megatron.host.nccl import LIBRARY, nccl_version

COMPILER = shutil.which("cc") or shutil.which("gcc")


@pytest.mark.skipif(COMPILER is None, reason="needs a C compiler")
@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("int ncclGetVersion(int *v) { *v = 23005; return 0; }", (2, 30, 5)),
        ("int ncclGetVersion(int *v) { *v = 22907; return 0; }", (2, 29, 7)),
        ("int ncclGetVersion(int *v) { return 3; }", None),
        ("int other(void) { return 0; }", None),
    ],
)
def test_the_library_is_asked(tmp_path: Path, body: str, expected: tuple[int, ...] | None) -> None:
    (tmp_path / "nccl.c").write_text(body)
    library = tmp_path / "libnccl.so.2"
    command = [str(COMPILER), "-shared", "-fPIC", "-o", library, tmp_path / "nccl.c"]
    subprocess.run(command, check=True, timeout=60)
    assert nccl_version({LIBRARY: str(library)}) == expected


def test_a_library_that_is_not_there_says_nothing(tmp_path: Path) -> None:
    assert nccl_version({LIBRARY: str(tmp_path / "none.so")}) is None


def test_else_torchs_wheel_says_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "nvidia_nccl_cu13-2.29.7.dist-info").mkdir()
    (tmp_path / "nvidia_nccl_cu13-2.29.7.dist-info/METADATA").write_text(
        "Metadata-Version: 2.1\nName: nvidia-nccl-cu13\nVersion: 2.29.7\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert nccl_version({}) == (2, 29, 7)
