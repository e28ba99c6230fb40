"""`check` on sinks whose library is not installed."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
from made.configs import EVALUATED, run_check, write_run

from sfpo_megatron.config.load import ConfigError


@pytest.fixture(autouse=True)
def run(tmp_path: Path, model_dir: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    model_dir()
    monkeypatch.chdir(tmp_path)
    for name in ("tensorboard", "wandb", "mlflow", "sqlalchemy", "alembic"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    write_run(data=EVALUATED)


def install(folder: Path, *libraries: str) -> None:
    """Packages of these names on `sys.path`, and none of those that this Python has."""
    for name in libraries:
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").touch()


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow"])
def test_a_missing_library_is_named_with_its_extra(name: str, tmp_path: Path) -> None:
    """A warning of `check`, as a login node need not have it; an error of a start. The folder that
    wandb makes in the working directory is no library."""
    if find_spec(name) is not None:
        pytest.skip(f"{name} is installed here")
    (tmp_path / name).mkdir()
    sinks = f"tracking.sinks=[console, {name}]"
    (warning,) = run_check(sinks)
    assert f"pip install 'sfpo-megatron[{name}]', or leave {name} out" in warning
    with pytest.raises(ConfigError, match=rf"tracking\.sinks: found {name}, and no library {name}"):
        run_check(sinks, for_training=True)


def test_a_local_store_of_mlflow_is_a_database(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tracking server needs mlflow alone."""
    if find_spec("mlflow") is not None or find_spec("sqlalchemy") is not None:
        pytest.skip("installed here")
    install(tmp_path / "lib", "mlflow")
    monkeypatch.syspath_prepend(str(tmp_path / "lib"))
    sinks = "tracking.sinks=[mlflow]"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    assert run_check(sinks) == []
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    (warning,) = run_check(sinks)
    assert "mlflow, and no library sqlalchemy" in warning
    install(tmp_path / "lib", "sqlalchemy", "alembic")
    assert run_check(sinks) == []


def test_what_is_installed_is_not_mentioned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path / "lib", "tensorboard", "wandb")
    monkeypatch.syspath_prepend(str(tmp_path / "lib"))
    assert run_check("tracking.sinks=[console, jsonl, tensorboard, wandb]") == []
