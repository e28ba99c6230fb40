"""How the tests are built: on tests/made and modules beside them, through public doors.

Not exercised: what a test reads of an object; names that are put together at run time.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
FILES = sorted(TESTS.rglob("*.py"))
TEST_MODULE = re.compile(r"(tests\.)?(\w+\.)*(test_\w+|conftest)\b(?!\.py)")
PACKAGE = re.compile(r"tests(\.(?!made)\w+)?$")
IMPORT = re.compile(rf"(?:^|\n|; ?)\s*(?:from|import) ({TEST_MODULE.pattern})")

ALLOWED = {
    # Objects of Megatron and vLLM, whose private names are part of what is tested.
    "dist/offload.py _get_sub_optimizer_param_groups": "offloads on a machine without a GPU",
    "dist/test_precision_aware.py _copy_main_params_to_model_params": "rounds as FusedAdam does",
    "dist/test_private_names.py _results_queue": "the queue that a writer is given",
    "e2e/test_stock_transports.py _metas": "what vLLM's trainer tells its engine",
    "e2e/test_stock_transports.py _src_mesh": "what vLLM's trainer tells its engine",
    # Faults, and what no machine for tests has.
    "unit/test_addresses.py _address_of": "two networks",
    "unit/test_addresses.py _towards": "two networks",
    "unit/test_config_property.py _get_local_constants": "examples without other files' constants",
    "unit/test_docs.py _field_docstrings": "a field without a docstring",
    "unit/test_owned.py _exchange": "a file system that cannot exchange two folders",
    "unit/test_temporary.py _ELSEWHERE": "a machine without a temporary folder",
    "unit/test_snapshots_host.py _SideStream": "CUDA streams that race",
    # Sizes and times of a module, so that a small and short test reaches them.
    "dist/test_local_attention.py _PAIRS_OF_A_CALL": "sequences attended to one by one, or at once",
    "dist/test_logprob_kernel.py _CPU_BLOCK_BYTES": "blocks below and above a chunk",
    "unit/test_refit_plan.py _ELEMENTS_AT_A_TIME": "a tensor of several parts",
    "unit/conftest.py _POLL_S": "seconds between looks at an engine",
    "unit/test_benchmarks.py _EVICT_BYTES": "256 MiB a round",
    "unit/test_slurm_preflight.py _WAIT_S": "minutes until a node is given up",
}
"""FILE NAME -> why this private name is set; none on an object of ours."""


def name(path: Path) -> str:
    return path.relative_to(TESTS).as_posix()


def imported_tests(code: str) -> Iterator[str]:
    """LINE MODULE of each import of a test module or a conftest, also in code that is a string."""
    for node in ast.walk(ast.parse(code)):
        match node:
            case ast.Import(names=names):
                found = [alias.name for alias in names]
            case ast.ImportFrom(module=str(module), names=names):
                found = [module, *(f"{module}.{a.name}" for a in names if PACKAGE.match(module))]
            case ast.Call(func=ast.Attribute(attr="import_module"), args=[ast.Constant(str(text))]):
                found = [text]
            case ast.Constant(value=str(text)):
                found = [match[1] for match in IMPORT.finditer(text)]
            case _:
                continue
        modules = [module for module in found if TEST_MODULE.fullmatch(module)]
        yield from (f"{node.lineno} {module}" for module in modules[:1])


def is_private(attribute: str) -> bool:
    return attribute.startswith("_") and not attribute.endswith("__")


def set_privately(code: str) -> Iterator[str]:
    """Private names that are set on anything but self and cls: by assignment, by setattr in all its
    forms, by `patch.object`. `__new__` of an object that is not whole is one too."""
    for node in ast.walk(ast.parse(code)):
        match node:
            case ast.Attribute(value=value, attr=attribute, ctx=ast.Store() | ast.Del()):
                own = isinstance(value, ast.Name) and value.id in ("self", "cls")
                if is_private(attribute) and not own:
                    yield attribute
            case ast.Call(func=ast.Attribute(attr="__new__")):
                yield "__new__"
            case ast.Call(func=function, args=[first, *rest]):
                called = getattr(function, "attr", getattr(function, "id", ""))
                if called not in ("setattr", "delattr", "__setattr__", "object", "patch"):
                    continue
                texts = [a.value for a in (first, *rest[:1]) if isinstance(a, ast.Constant)]
                names = [text.rpartition(".")[2] for text in texts if isinstance(text, str)]
                yield from (one for one in names[:1] if is_private(one))


def test_no_test_module_is_imported_by_another() -> None:
    """What two of them need is in tests/made, in a module beside them, or a fixture."""
    assert not [
        f"{name(path)}:{found}"
        for path in FILES
        if path != Path(__file__)  # its cases are such imports
        for found in imported_tests(path.read_text(encoding="utf-8"))
    ]


def test_objects_are_made_through_public_doors() -> None:
    """A private name is set only where ALLOWED says why; what is no longer set is not in it."""
    found = {
        f"{name(path)} {attribute}"
        for path in FILES
        for attribute in set_privately(path.read_text(encoding="utf-8"))
    }
    assert found == set(ALLOWED)


def test_rollout_batches_are_made_in_one_place() -> None:
    built = [name(f) for f in FILES if re.search(r"\bRolloutBatch\(", f.read_text("utf-8"))]
    assert built == ["made/batches.py"]


@pytest.mark.parametrize(
    "code",
    [
        "from test_refit import greedy",
        "def f():\n    import test_fleet as stand_ins",
        "from tests.unit.test_data_prompts import sums",
        "from tests.unit import test_data_prompts",
        "from tests.conftest import MODEL_JSON",
        "import importlib\nimportlib.import_module('test_refit')",
        "CODE = 'import sys\\nfrom tests.unit.test_tracking import STEP\\n'",
        "CODE = 'import sys; from test_tracking import STEP'",
    ],
)
def test_the_check_finds_imports(code: str) -> None:
    assert list(imported_tests(code))


def test_the_check_passes_over_other_imports() -> None:
    """Names that only begin alike, and words about imports."""
    assert not list(
        imported_tests(
            "import pytest, testing, test\nfrom made.batches import test_batch\n"
            "'see test_refit.py: from test_refit it takes nothing'"
        )
    )


@pytest.mark.parametrize(
    "code",
    [
        "shards._members = []",
        "io._control: object = None",
        "a._x, b = 1, 2",
        "io._count += 1",
        "del io._store",
        "setattr(io, '_store', 1)",
        "object.__setattr__(config, '_x', 1)",
        "monkeypatch.setattr(io, '_store', 1)",
        "monkeypatch.setattr('sfpo_megatron.run._store', 1)",
        "patch.object(io, '_store', 1)",
        "patch('sfpo_megatron.run._store')",
        "Policy.__new__(Policy)",
    ],
)
def test_the_check_finds_private_names(code: str) -> None:
    assert list(set_privately(code))


def test_the_check_passes_over_what_is_ones_own() -> None:
    assert not list(
        set_privately(
            "class A:\n"
            "    def __init__(self):\n"
            "        self._x = A.shared = 1\n"
            "monkeypatch.setattr(io, 'store', 1)\nmodule.__name__ = 'x'\nx = io._store\n"
        )
    )
