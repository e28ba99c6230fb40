"""HOME and the user's name where the machine has none, in real child processes whose passwd file is
patched. Not exercised: a file system that is read-only."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CHILD = """
import json, os, pwd, sys
entry = json.loads(sys.argv[1])
def getpwuid(uid):
    if entry is None:
        raise KeyError(uid)
    return pwd.struct_passwd((entry[0], "x", uid, uid, "", entry[1], "/bin/sh"))
pwd.getpwuid = getpwuid
from sfpo_megatron.host.home import NoHome, provide_home
try:
    said = provide_home()
except NoHome as error:
    sys.exit(str(error))
import getpass
names = ("HOME", "HF_HOME", "RAY_AUTH_TOKEN_PATH")
found = {name: os.environ.get(name) for name in names}
print(json.dumps({"said": said, "user": getpass.getuser(), "~": os.path.expanduser("~"), **found}))
"""


def child(entry: list[str] | None, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps(entry)],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), **variables},
        capture_output=True,
        text=True,
        timeout=30,
    )


def provided(entry: list[str] | None, **variables: str) -> dict[str, str | None]:
    done = child(entry, **variables)
    assert done.returncode == 0, done.stderr
    found: dict[str, str | None] = json.loads(done.stdout)
    assert found["HOME"] == found["~"]
    return found


def test_a_usual_home_is_left_alone(tmp_path: Path) -> None:
    found = provided(["ann", "/nowhere"], HOME=str(tmp_path), USER="bob")
    assert (found["HOME"], found["user"], found["said"]) == (str(tmp_path), "bob", None)
    assert not any(tmp_path.iterdir())


def test_without_home_it_is_the_users(tmp_path: Path) -> None:
    """Ray reads the variable alone."""
    for unset in ({}, {"HOME": ""}):
        found = provided(["ann", str(tmp_path)], **unset)
        assert (found["HOME"], found["user"], found["said"]) == (str(tmp_path), "ann", None)


@pytest.mark.parametrize("variables", [{}, {"HOME": "/nowhere/at/all"}, {"HOME": "/proc"}])
def test_a_user_id_without_an_entry(tmp_path: Path, variables: dict[str, str]) -> None:
    found = provided(None, TMPDIR=str(tmp_path), **variables)
    home = tmp_path / f"sfpo-home-{os.getuid()}"
    assert found["HOME"] == str(home) and home.stat().st_mode & 0o777 == 0o700
    assert found["user"] == f"uid-{os.getuid()}"
    what = f"{variables['HOME']}, which cannot be written" if variables else "none"
    assert found["said"] == f"HOME: found {what}; caches of this run go to {home}"


def test_what_a_read_only_home_holds_is_still_read(tmp_path: Path) -> None:
    """Its models and tokens. Root may write anywhere: the probe is patched."""
    home = tmp_path / "home"
    (home / ".ray").mkdir(parents=True)
    (home / ".ray/auth_token").write_text("t")
    code = "import sfpo_megatron.host.home as h\nh.can_be_written = lambda folder: False\n"
    done = subprocess.run(
        [sys.executable, "-c", code + CHILD, "null"],
        env={"PYTHONPATH": str(ROOT), "HOME": str(home), "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["HOME"] == f"{tmp_path}/sfpo-home-{os.getuid()}"
    assert found["RAY_AUTH_TOKEN_PATH"] == f"{home}/.ray/auth_token" and found["HF_HOME"] is None


def test_a_home_that_others_could_write_is_refused(tmp_path: Path) -> None:
    home = tmp_path / f"sfpo-home-{os.getuid()}"
    home.mkdir()
    home.chmod(0o777)
    done = child(None, TMPDIR=str(tmp_path))
    assert done.returncode == 1
    assert "is not this user's alone" in done.stderr and len(done.stderr.splitlines()) == 1


ACTOR = """
import os, sys
from pathlib import Path
from sfpo_megatron.rollout.actor_variables import enter_actor
enter_actor(Path(sys.argv[1]))
print(os.environ["HOME"])
"""


@pytest.mark.parametrize("usable", [True, False])
def test_an_actor_has_a_home_on_its_own_node(tmp_path: Path, usable: bool) -> None:
    """Ray's workers have the one of whoever started Ray, which a compute node may show read-only:
    vLLM and Triton would raise."""
    log, given = tmp_path / "logs/engine-0.log", str(tmp_path) if usable else "/proc"
    done = subprocess.run(
        [sys.executable, "-c", ACTOR, str(log)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "HOME": given, "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    *said, home = log.read_text().splitlines()
    own = str(tmp_path / f"sfpo-home-{os.getuid()}")
    assert home == (given if usable else own)
    assert [line.partition(";")[0] for line in said] == (
        [] if usable else ["HOME: found /proc, which cannot be written"]
    )
