"""Errors about what a user gave: one form, whoever says it."""

from __future__ import annotations

import copy
import errno
import pickle

import pytest

from sfpo_megatron.config.fields import FieldError
from sfpo_megatron.config.origin import ConfigError
from sfpo_megatron.config.paths import PathError
from sfpo_megatron.data.errors import BadRowsError, DataError, SourceError
from sfpo_megatron.errors import InputError, may_pass, shortened
from sfpo_megatron.families.safetensors_header import ModelFilesError
from sfpo_megatron.families.shape import UnsupportedModel
from sfpo_megatron.planner.nodes import LayoutError
from sfpo_megatron.plugins import PluginError

SAID = {"found": "3", "expected": "4", "fix": "set 4"}
ERRORS = {
    "run.yaml: seed: ": ConfigError("run.yaml", "seed", **SAID),
    "seed: ": FieldError("seed", 3, "4", "set 4"),
    "data.train.0.size: ": SourceError("size", **SAID).at("data.train.0"),
    "rows.jsonl:2: ": DataError("rows.jsonl:2", **SAID),
    "objective.loss: ": PluginError("objective.loss", **SAID),
    "--nodes: ": LayoutError("--nodes", **SAID),
    "config.json: ": UnsupportedModel(**SAID),
}


@pytest.mark.parametrize("at", ERRORS)
def test_where_found_expected_and_fix(at: str) -> None:
    error = ERRORS[at]
    assert str(error) == f"{at}found 3, expected 4; set 4"
    assert (error.found, error.expected, error.fix) == ("3", "4", "set 4")


@pytest.mark.parametrize("error", [PathError(**SAID), ModelFilesError(**SAID)])
def test_whoever_calls_knows_where(error: InputError) -> None:
    assert error.where == "" and str(error) == "found 3, expected 4; set 4"


WRONG_ROW = DataError("rows.jsonl:2", **SAID, kind="too long")


@pytest.mark.parametrize(
    "error",
    [
        *ERRORS.values(),
        PathError(**SAID),
        ModelFilesError(**SAID, not_there=True),
        BadRowsError([WRONG_ROW], {"too long": 3}),
        ConfigError("run.yaml", "seed", **SAID, line=7),
    ],
    ids=lambda error: type(error).__name__,
)
def test_another_process_has_the_same_error(error: InputError) -> None:
    """An actor of Ray's, or a process of a pool, raised it."""
    for made in (pickle.loads(pickle.dumps(error)), copy.copy(error)):  # noqa: S301
        assert type(made) is type(error) and str(made) == str(error)
        assert vars(made) == vars(error)


@pytest.mark.parametrize(
    ("cause", "passes"),
    [
        (ConnectionError("the hub is away"), True),
        (TimeoutError(), True),
        (OSError(errno.ESTALE, "Stale file handle"), True),
        (OSError(errno.EIO, "Input/output error"), True),
        (FileNotFoundError(errno.ENOENT, "No such file"), False),
        (PermissionError(errno.EACCES, "Permission denied"), False),
        (OSError("no index"), False),
        (KeyError("x"), False),
    ],
)
def test_what_may_pass(cause: Exception, passes: bool) -> None:
    middle, outer = ValueError("between"), DataError("rows.jsonl:2", **SAID)
    middle.__cause__, outer.__cause__ = cause, middle
    assert may_pass(cause) is passes and may_pass(outer) is passes
    cause.__cause__ = outer  # a circle
    assert may_pass(outer) is passes


def test_a_line_of_a_file_stands_last() -> None:
    error = ConfigError("run.yaml", "seed", **SAID, line=7)
    assert str(error) == "run.yaml: seed: found 3, expected 4; set 4 (line 7)"
    assert error.fix == "set 4"


@pytest.mark.parametrize(("text", "cut"), [("123456", "123456"), ("1234567", "123...")])
def test_what_is_quoted_is_cut_at_a_limit(text: str, cut: str) -> None:
    assert shortened(text, 6) == cut
