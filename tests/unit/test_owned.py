"""Who owns a directory: what may be written, what is kept, and what a kill leaves.

A kill is an exception that no handler of ours may clean up after: the process is forked and leaves
by `os._exit` at the call in question. File systems without hard links are not exercised.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from made.configs import AIW

from sfpo_megatron.config.check import check_config
from sfpo_megatron.config.load import ConfigError, load_config
from sfpo_megatron.outputs import aside
from sfpo_megatron.outputs.aside import writing
from sfpo_megatron.outputs.exported import RUN_TOOL
from sfpo_megatron.outputs.owned import MARKER, Marker, NotOurs, check_owned

ROOT = Path(__file__).parents[2]


def write(
    out: Path, text: str = "new", *, inputs: Sequence[Path] = (), overwrite: bool = False
) -> None:
    with writing(out, tool="a", inputs=inputs, overwrite=overwrite) as aside:
        (aside / "weights").write_text(text)
        (aside / "sub").mkdir()
        (aside / "sub/inner").write_text(text)


def tree(folder: Path) -> dict[str, str]:
    return {
        str(f.relative_to(folder)): f.read_text()
        for f in sorted(folder.rglob("*"))
        if f.is_file() and f.name != MARKER
    }


WHOLE = {"weights": "new", "sub/inner": "new"}


def test_written_where_absent_empty_or_ours(tmp_path: Path) -> None:
    out = tmp_path / "deep/out"
    write(out, "old")
    write(out)
    assert tree(out) == WHOLE
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty/")
    assert tree(tmp_path / "empty") == WHOLE
    assert sorted(os.listdir(out.parent)) == ["out"]
    marker = Marker.read(out)
    assert marker is not None and set(marker.files or ()) == set(WHOLE)


def test_files_of_others(tmp_path: Path) -> None:
    """Without a marker: never. Beside ours: an error, or kept with overwrite."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(NotOurs, match=r"1 files \(notes.txt\)"):
            write(out, overwrite=overwrite)
    assert os.listdir(out) == ["notes.txt"]
    (out / "notes.txt").unlink()
    write(out, "old")
    (out / "sub/notes.txt").write_text("mine")
    (out / "link").symlink_to("nowhere")
    with pytest.raises(NotOurs, match=r"2 files \(link, sub/notes.txt\)"):
        write(out)
    write(out, overwrite=True)
    assert tree(out) == {**WHOLE, "sub/notes.txt": "mine"}
    assert os.readlink(out / "link") == "nowhere"
    (out / "later").write_text("mine")
    with (
        pytest.raises(NotOurs, match="later"),
        writing(out, tool="a", inputs=(), overwrite=True) as aside,
    ):
        (aside / "later").write_text("ours")
    assert (out / "later").read_text() == "mine" and tree(out).items() >= WHOLE.items()
    assert os.listdir(tmp_path) == ["out"]


def test_another_tools_output(tmp_path: Path) -> None:
    write(tmp_path / "out", "old")
    with pytest.raises(NotOurs, match="an output of a"):
        check_owned(tmp_path / "out", tool="b", inputs=())
    check_owned(tmp_path / "out", tool="b", inputs=(), overwrite=True)


@pytest.mark.parametrize(
    "out", ["m", "m/", "m/../m", "link", ".", "m/inside", "link/inside/deep", "./m/."]
)
def test_never_over_an_input(tmp_path: Path, out: str) -> None:
    """--out is, contains or lies in the input, however it is spelled."""
    model = tmp_path / "m"
    write(model)
    (tmp_path / "link").symlink_to(model)
    before = tree(tmp_path)
    with pytest.raises(NotOurs, match="the input"):
        write(Path(f"{tmp_path}/{out}"), "x", inputs=(model,), overwrite=True)
    assert tree(tmp_path) == before


def test_input_with_links_into_out(tmp_path: Path) -> None:
    """Links into `out`, such as a hub's cache has."""
    write(tmp_path / "out")
    (tmp_path / "m").mkdir()
    (tmp_path / "m/weights").symlink_to(tmp_path / "out/weights")
    with pytest.raises(NotOurs, match="has files of the input"):
        write(tmp_path / "out", inputs=(tmp_path / "m",))


@pytest.mark.parametrize(("inside", "mode"), [("", 0o555), ("sub", 0o555), ("others", 0)])
def test_folders_that_may_not_be_written(inside: str, mode: int) -> None:
    """Nothing is changed: a read-only output was replaced and its rest then refused every further
    one, and files in a folder that cannot be read were left out of the new one."""
    nobody = 65534 if os.geteuid() == 0 else os.geteuid()  # nothing is refused to root
    with TemporaryDirectory() as folder:
        os.chown(folder, nobody, -1)
        os.seteuid(nobody)
        try:
            out = Path(folder, "out")
            write(out, "old")
            (out / "others").mkdir()
            (out / "others/mine").write_text("x")
            (out / inside).chmod(mode)
            with pytest.raises(NotOurs, match="may not read and write, expected a folder"):
                write(out, overwrite=True)
            (out / inside).chmod(0o755)
            assert tree(out) == {"weights": "old", "sub/inner": "old", "others/mine": "x"}
            assert os.listdir(folder) == ["out"]
        finally:
            os.seteuid(os.getuid())


def test_what_is_no_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "dangling").symlink_to("nowhere")
    for name, what in (("file", "a file"), ("dangling", "a link to nothing")):
        with pytest.raises(NotOurs, match=what):
            write(tmp_path / name)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for name in (".", "..", str(tmp_path / "here")):
        with pytest.raises(NotOurs, match="working directory"):
            write(Path(name))


def test_link_is_written_through(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    write(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and tree(tmp_path / "real") == WHOLE


def test_what_stands_beside_is_not_touched(tmp_path: Path) -> None:
    write(tmp_path / "out", "old")
    for name in ("out.old", "out.tmp", ".out.sfpo-new-1-x", ".out.sfpo-old-1-x"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "notes").write_text("mine")
    write(tmp_path / "out")
    assert len(list(tmp_path.glob("*/notes"))) == 4 and tree(tmp_path / "out") == WHOLE


def test_failure_leaves_the_old_one(tmp_path: Path) -> None:
    write(tmp_path / "out", "old")
    before = tree(tmp_path)
    with (
        pytest.raises(KeyboardInterrupt),
        writing(tmp_path / "out", tool="a", inputs=()) as aside,
    ):
        (aside / "weights").write_text("half")
        raise KeyboardInterrupt
    assert tree(tmp_path) == before and os.listdir(tmp_path) == ["out"]


def test_second_writer_is_refused(tmp_path: Path) -> None:
    with writing(tmp_path / "out", tool="a", inputs=()) as aside:
        (aside / "weights").write_text("first")
        with pytest.raises(NotOurs, match="another process"):
            write(tmp_path / "x/../out")
    assert tree(tmp_path / "out") == {"weights": "first"}
    assert os.listdir(tmp_path) == ["out"]


def dies_at(
    calls: Sequence[tuple[object, str]], number: int, action: Callable[[], None], before: bool
) -> bool:
    """Run `action` in a child that dies at the `number`th of `calls`; whether it came so far."""
    child = os.fork()
    if child == 0:
        count = 0

        def dying(real: Callable[..., object]) -> Callable[..., object]:
            def call(*arguments: object, **keywords: object) -> object:
                nonlocal count
                count += 1
                own = count  # calls within `real` count too
                if before and own == number:
                    os._exit(9)
                result = real(*arguments, **keywords)
                if own == number:
                    os._exit(9)
                return result

            return call

        for owner, name in calls:
            setattr(owner, name, dying(getattr(owner, name)))
        action()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("before", [True, False])
def test_killed_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool, before: bool
) -> None:
    """At every rename, link, unlink, exchange and rmtree: old or new, the user's file in it, and
    the next writer finds its way and leaves nothing beside it."""
    if not exchange:
        monkeypatch.setattr(aside, "_exchange", lambda one, other: False)
    calls: list[tuple[object, str]]
    calls = [(os, "rename"), (os, "replace"), (os, "link"), (os, "unlink"), (shutil, "rmtree")]
    calls += [(aside, "_exchange"), (aside, "_remove")]
    number = 0
    while True:
        number += 1
        folder = tmp_path / str(number)
        write(folder / "out", "old")
        (folder / "out/notes").write_text("mine")
        action = lambda: write(folder / "out", overwrite=True)  # noqa: B023, E731
        killed = dies_at(calls, number, action, before)
        if (folder / "out").exists():
            text = (folder / "out/weights").read_text()
            assert tree(folder / "out") == {"weights": text, "sub/inner": text, "notes": "mine"}
        else:
            assert not exchange
        with (  # a writer that fails brings the old one back
            pytest.raises(ZeroDivisionError),
            writing(folder / "out", tool="a", inputs=(), overwrite=True),
        ):
            raise ZeroDivisionError
        assert (folder / "out/notes").read_text() == "mine", number
        write(folder / "out", overwrite=True)
        assert tree(folder / "out") == {**WHOLE, "notes": "mine"}
        assert os.listdir(folder) == ["out"], number
        if not killed:
            break
    assert number > 6


def config_problem(*overrides: str) -> str:
    task = str(AIW)
    try:
        check_config(load_config(task, list(overrides)), file=task)
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("model", ["r/hf", "r/checkpoints/x", "r/../r/hf/.", "link"])
def test_model_within_the_runs_outputs(tmp_path: Path, model: str) -> None:
    for folder in ("hf", "checkpoints/x"):
        (tmp_path / "r" / folder).mkdir(parents=True)
    (tmp_path / "link").symlink_to("r/hf")
    text = config_problem(f"output_dir={tmp_path}/r", f"model.path={tmp_path}/{model}")
    assert "model.path" in text and "which a run of output_dir writes" in text


def test_hf_of_a_run(tmp_path: Path) -> None:
    """A user's file is said before the run; what an earlier version has exported is adopted."""
    model, hf = tmp_path / "m", tmp_path / "r/hf"
    shutil.copytree(ROOT / "examples/qwen2.5-math-1.5b/model", model)
    hf.mkdir(parents=True)
    arguments = (f"output_dir={tmp_path}/r", f"model.path={model}")
    for name in ("config.json", "model.safetensors"):
        (hf / name).write_text("earlier")
    assert "output_dir" not in config_problem(*arguments)
    (hf / "notes.txt").write_text("mine")
    assert "notes.txt" in config_problem(*arguments)
    Marker(tool=RUN_TOOL, source="", files=("config.json", "model.safetensors")).write(hf)
    assert "1 files (notes.txt)" in config_problem(*arguments)
    (hf / "notes.txt").unlink()
    assert "output_dir" not in config_problem(*arguments)
