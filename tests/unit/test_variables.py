"""The environment variables of each role, and that nothing in the package or in launch/slurm/ sets
one that the table does not have.

Not exercised: what vLLM, Ray and torch make of them; shells' own `declare` and `read`.
"""

from __future__ import annotations

import ast
import re
from dataclasses import replace
from pathlib import Path

import pytest
from made.configs import run_config

from sfpo_megatron.config.tree import ParallelConfig
from sfpo_megatron.host.variables import COMPUTED, TABLE, Role, forget, settle, variables
from sfpo_megatron.mcore.setup import order_kernels
from sfpo_megatron.rollout.actor_variables import actor_variables, yield_to

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "sfpo_megatron"
SLURM = ROOT / "launch/slurm"
KNOWN = {row.name for row in TABLE} | {each.name for each in COMPUTED}
ORDERED = "CUDA_DEVICE_MAX_CONNECTIONS"


@pytest.mark.parametrize(
    ("role", "facts", "expected"),
    [
        ("launcher", ["one machine"], {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}),
        ("launcher", [], {"OMP_NUM_THREADS": "1"}),
        ("rank", [], {}),
        ("rank", ["ordered kernels"], {ORDERED: "1"}),
        ("scorer", [], dict.fromkeys(
            ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")),
        ("engine", ["ipc"], {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}),
    ],
)  # fmt: skip
def test_a_role_has_what_is_so_of_it(
    role: Role, facts: list[str], expected: dict[str, str]
) -> None:
    found = variables(role, *facts, environ={})
    assert expected.items() <= found.items()
    assert role == "engine" or found == expected


def test_an_engine_says_what_it_chose_at_its_first_start() -> None:
    first = actor_variables("engine", on_gpu=True)
    again = actor_variables("engine", on_gpu=True, is_restart=True)
    assert (first["VLLM_LOGGING_LEVEL"], again["VLLM_LOGGING_LEVEL"]) == ("INFO", "ERROR")
    assert {k for k in first if first[k] != again[k]} == {"VLLM_LOGGING_LEVEL"}
    # The controller starts it: what that has itself is not taken for the user's.
    controller = actor_variables("controller", on_gpu=False)
    engine = variables("engine", "first start", environ=controller)
    assert engine["VLLM_LOGGING_LEVEL"] == "INFO"
    on_cpu = actor_variables("engine", on_gpu=False)
    assert set(on_cpu) - set(first) == {"TORCH_COMPILE_DISABLE", "GLIBC_TUNABLES"}


def test_a_users_value_stays_where_the_row_says_so() -> None:
    given = {"VLLM_LOGGING_LEVEL": "DEBUG", "OMP_NUM_THREADS": "4", ORDERED: "8"}
    engine = variables("engine", "first start", environ=given)
    assert (engine["VLLM_LOGGING_LEVEL"], engine["OMP_NUM_THREADS"]) == ("DEBUG", "1")
    assert engine["VLLM_CPU_KVCACHE_SPACE"] == "1"
    controller = variables("controller", environ={"VLLM_CPU_KVCACHE_SPACE": "4"})
    assert variables("engine", environ=controller)["VLLM_CPU_KVCACHE_SPACE"] == "4"
    for role, name in (("launcher", "OMP_NUM_THREADS"), ("rank", ORDERED)):
        environ = dict(given)
        settle(role, "ordered kernels", environ=environ)
        assert environ[name] == given[name]


def test_an_argument_of_the_engine_goes_before_a_variable() -> None:
    for engine_args, left in (({"max_num_seqs": 4}, "4"), ({"kv_cache_memory_bytes": 9}, None)):
        environ = {"VLLM_CPU_KVCACHE_SPACE": "4"}
        yield_to(engine_args, environ)
        assert environ.get("VLLM_CPU_KVCACHE_SPACE") == left


def test_an_actor_forgets_what_is_a_ranks_alone() -> None:
    torchrun = dict.fromkeys(("RANK", "MASTER_PORT", "PET_NODE_RANK", "TORCHELASTIC_RUN_ID"), "1")
    for role in ("controller", "engine"):
        environ = torchrun | {ORDERED: "1", "RANKING": "3", "HOME": "/h"}
        forget(role, environ)
        assert environ == {"RANKING": "3", "HOME": "/h"}


@pytest.mark.parametrize(
    ("parallel", "expected"),
    [
        ({}, None),
        ({"data": 4, "pipeline": 2}, None),
        ({"tensor": 2}, "1"),
        ({"tensor": 2, "sequence": True}, "1"),
        ({"context": 2}, "1"),
        ({"expert": 2}, None),
    ],
)
def test_kernels_are_ordered_by_the_layout(parallel: dict[str, int], expected: str | None) -> None:
    """The rule of megatron/training/arguments.py for Hopper; megatron-core alone does not look."""
    config = replace(run_config(), parallel=ParallelConfig(**parallel))
    environ: dict[str, str] = {}
    order_kernels(config, environ)
    assert environ.get(ORDERED) == expected


def assigned(tree: ast.AST) -> set[str]:
    """Names that are set in an `environ`, by a literal or a constant of the module."""
    constants = {
        target.id: node.value.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    found: list[ast.expr] = []
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Subscript)
            and isinstance(node.ctx, ast.Store)
            and ast.unparse(node.value) in ("os.environ", "environ", "variables")
        ):
            found.append(node.slice)
        elif (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr == "setdefault"
            and ast.unparse(node.func.value).endswith("environ")
        ):
            found.append(node.args[0])
    names = {n.value for n in found if isinstance(n, ast.Constant)}
    return names | {constants[n.id] for n in found if isinstance(n, ast.Name) and n.id in constants}


def test_the_package_sets_none_beside_the_table() -> None:
    faults = {
        f"{path.relative_to(PACKAGE)}: {name}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for name in assigned(ast.parse(path.read_text(encoding="utf-8")))
        if name not in KNOWN | {"LOGNAME", "USER"}  # with HOME
    }
    assert not faults, "list it in host/variables.py"


def test_the_search_finds_what_is_set() -> None:
    code = "NAME = 'B'\nos.environ['A'] = environ[NAME] = '1'\nos.environ.setdefault('C', '1')"
    assert assigned(ast.parse(code)) == {"A", "B", "C"}
    assert assigned(ast.parse("x = os.environ['A']; found['B'] = 1")) == set()


def test_computed_ones_are_set_where_the_table_says() -> None:
    for each in COMPUTED:
        (file,) = [f for f in (PACKAGE / each.file, SLURM / each.file) if f.is_file()]
        assert each.name in file.read_text(encoding="utf-8"), each


EXPORTED = re.compile(r"(?<![\w-])([A-Z]\w+)=(\S*)")
OURS = ("SFPO_", "SLURM_", "CONTAINER_")


def scripts() -> str:
    """Shell without comments."""
    files = [*SLURM.glob("*.sh"), *SLURM.glob("*.sbatch")]
    text = "\n".join(file.read_text(encoding="utf-8") for file in files)
    return re.sub(r"(?m)(^|\s)#.*$", "", text)


def test_the_job_scripts_set_what_the_table_says() -> None:
    found = dict(EXPORTED.findall(scripts()))
    for name, value in variables("job", "Ray's part", environ={}).items():
        assert found[name] in (value, f"${{{name}:-{value}}}"), name
    exported = re.findall(r"(?m)^\s*export (.+)$", scripts())
    names = {word.partition("=")[0] for line in exported for word in line.split()}
    # What the job hands to its own parts.
    own = {"GPUS_PER_NODE", "TRAIN_NODES", "RANKS_PER_NODE", "LOGS", "RAY_PORT"}
    own |= {"HEAD_ADDRESS", "NODE_ADDRESSES"}
    found_names = {name for name in names if not name.startswith(OURS)} - own
    assert found_names <= KNOWN | {"RAY_AUTH_TOKEN_PATH"}


def test_the_container_has_what_the_job_has() -> None:
    """But for what a user may set: with pyxis an image's values go before those of the job."""
    text = (SLURM / "container/Dockerfile").read_text(encoding="utf-8")
    (line,) = re.findall(r"^ENV (RAY_\S+ .+)$", text, re.M)
    users = {row.name for row in TABLE if "job" in row.roles and row.yields}
    job = {k: v for k, v in variables("job", environ={}).items() if k not in users}
    assert dict(word.split("=") for word in line.split()) == job
