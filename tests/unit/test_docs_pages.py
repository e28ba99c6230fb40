"""Every page of the docs against the tree: links, headings, files, functions and keys exist.

Not exercised: whether the prose is right.
"""

from __future__ import annotations

import ast
import functools
import math
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from sfpo_megatron.config import reference
from sfpo_megatron.config.tree import RunConfig
from sfpo_megatron.rollout import endpoint

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "sfpo_megatron"
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.glob("*.md"), *ROOT.glob("*.md"), *ROOT.glob("examples/*/*.md")])
PAGE_IDS = [page.relative_to(ROOT).as_posix() for page in PAGES]


@pytest.mark.parametrize("page", PAGES, ids=PAGE_IDS)
def test_links_lead_to_files(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"https?://|mailto:", target):
            file, _, anchor = target.partition("#")
            there = page.parent / file if file else page
            assert there.exists(), f"{page.name}: {target}"
            assert not anchor or anchor in anchors(there), f"{page.name}: no heading {target}"


def anchors(page: Path) -> set[str]:
    """The names by which GitHub links to a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.M)
    words = (re.sub(r"[^\w -]", "", heading.lower()) for heading in headings)
    return {heading.replace(" ", "-") for heading in words}


NOT_RUN = re.compile(
    r"never (?:been )?(?:run|ran|on a GPU)|not been run|ha(?:s|ve) run on a GPU", re.I
)


def hedges(page: Path) -> list[str]:
    return NOT_RUN.findall(" ".join(page.read_text(encoding="utf-8").split()))


@pytest.mark.parametrize("page", PAGES, ids=PAGE_IDS)
def test_what_has_never_run_is_said_in_its_places(page: Path) -> None:
    """Once in the README and in an example, in docs/verified.md, and as a rule in CONTRIBUTING."""
    places = {"README.md": 1, "CONTRIBUTING.md": 1, "docs/verified.md": math.inf}
    name = page.relative_to(ROOT).as_posix()
    allowed = 1 if name.startswith("examples/") else places.get(name, 0)
    assert len(hedges(page)) <= allowed, hedges(page)


# ---- names in code marks --------------------------------------------------------------------

OURS = (
    "sfpo_megatron",
    "tests",
    "tools",
    "docs",
    "examples",
    "launch",
    "benchmarks",
    "requirements",
)
FILE_ENDS = (".py", ".md", ".json", ".jsonl", ".yaml", ".txt", ".png", ".pt", ".xml", ".sbatch")
# vLLM's; in a run's or a converter's output directory.
OTHERS_FIRST = {"CHANGELOG.md", "coming-from.md"}
"""Pages whose tables have in their first column what is not ours, or not any more."""
FOREIGN = {"multiproc_executor.py", "hf/", "release/"}
ABOUT_FOREIGN_TREES = {"use-in-your-trainer.md"}
MODULES = [
    *PACKAGE.rglob("*.py"),
    *(init.parent for init in PACKAGE.rglob("*/__init__.py")),
]


def code_marks(page: Path) -> list[str]:
    text = page.read_text(encoding="utf-8")
    if page.name in OTHERS_FIRST:
        text = re.sub(r"^\|[^|\n]*\|", "", text, flags=re.M)
    return re.findall(r"`([^`\n]+)`", text)


def make_faults(code: str) -> Iterator[str]:
    """`make x`: is there such a target?"""
    targets = re.findall(r"^([a-z][a-z0-9-]*):", (ROOT / "Makefile").read_text(), flags=re.M)
    if (match := re.match(r"make ([a-z][a-z0-9-]*)", code)) and match[1] not in targets:
        yield f"no make target {match[1]}"


def path_faults(code: str, page: Path) -> Iterator[str]:
    """`tests/x.py`, `mcore/`, `mcore/passes.py`, `passes.py`: is there such a file or folder?

    Paths are those of the repository or of the package; a name alone may be anywhere in it."""
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)*/?", code) or "NAME" in code or code in FOREIGN:
        return
    first = code.split("/")[0]
    is_room = re.fullmatch(r"[a-z_]+/", code) or ((PACKAGE / first).is_dir() and code[-1] == "/")
    is_path = "/" in code and (first in OURS or is_room)
    foreign = page.name in ABOUT_FOREIGN_TREES and first not in OURS
    if foreign or not (is_path or code.endswith(".py")):
        return
    there = [base / code for base in (ROOT, PACKAGE, page.parent)]
    if not any(path.exists() for path in there) and not ("/" not in code and somewhere(code)):
        yield f"no file {code}"


def test_paths_in_code_exist() -> None:
    """A room's files that comments and docstrings name, such as config/rules/engines.py, and pages
    with their headings, such as docs/gpu.md#install. Whether a page speaks of it is not known."""
    rooms = "|".join([*OURS, *(path.name for path in PACKAGE.iterdir() if path.is_dir())])
    faults = []
    for file in (
        *PACKAGE.rglob("*.py"),
        *ROOT.glob("tools/*.py"),
        *ROOT.glob("benchmarks/**/*.py"),
    ):
        text = file.read_text(encoding="utf-8")
        for named in re.findall(rf"(?<![\w/.-])(?:{rooms})/[\w/]+\.py\b", text):
            if not any((base / named).exists() for base in (ROOT, PACKAGE, file.parent)):
                faults.append(f"{file.relative_to(ROOT)}: no file {named}")
        for named, anchor in re.findall(r"(?<![\w/.-])(docs/[\w.-]+\.md)\b(?:#([\w-]+))?", text):
            there = ROOT / named
            if not there.exists() or (anchor and anchor not in anchors(there)):
                faults.append(f"{file.relative_to(ROOT)}: no page {named} {anchor}")
    assert not faults


def test_the_endpoint_names_the_page_of_its_protocol() -> None:
    named = re.findall(r"docs/[\w-]+\.md", endpoint.__doc__ or "")
    assert [ROOT / name for name in named] == [DOCS / "agents.md"]
    assert "/v1/chat/completions" in (DOCS / "agents.md").read_text(encoding="utf-8")


@functools.cache
def somewhere(name: str) -> bool:
    return any(any((ROOT / folder).rglob(name)) for folder in OURS)


def name_faults(code: str) -> Iterator[str]:
    """`section.key` and `module.function`: is there such a key, or such a name in the package?"""
    match = re.fullmatch(r"([A-Za-z_]\w*(?:[.:]\w+)+?)(?:\(.*\)|[:=]\s?.*)?", code)
    if not match or code.endswith(FILE_ENDS):
        return
    key = re.split(r"=|:\s", match[1])[0]
    parts = re.split(r"[.:]", key)
    if parts[0] in RunConfig.__dataclass_fields__:
        if not is_key(key.split(":")[0]) and not is_defined(parts):
            yield f"no config key {key}"
    elif not is_defined(parts):
        yield f"no {key} in the package"


def is_key(name: str) -> bool:
    keys = known_keys()
    free = tuple(f"{key}." for key, is_free in keys.items() if is_free)
    name = re.sub(r"^data\.(?:train|eval)\.(?:N|\d+)", "data.train.N", name)
    return name in keys or name.startswith(free)


@functools.cache
def known_keys() -> dict[str, bool]:
    """Every key and section of a config -> whether any keys may stand below it."""
    known = {}
    for key in (key for section in reference.sections() for key in section.keys):
        parts = key.name.split(".")
        known |= {".".join(parts[: n + 1]): False for n in range(len(parts))}
        known[key.name] = key.type == "section of any keys"
    return known


def is_defined(parts: list[str]) -> bool:
    """Whether a.b.c names something of the package, from any module or package called `a` on. True
    too if there is none: the name is of something else."""
    if parts[0] == PACKAGE.name:
        return is_in(ROOT, parts)
    homes = [path.parent for path in MODULES if path.stem == parts[0]]
    return not homes or any(is_in(home, parts) for home in homes)


def is_in(folder: Path, parts: list[str]) -> bool:
    first, *rest = parts
    file = folder / f"{first}.py"
    if file.is_file():
        return set(rest) <= names_in(file)
    if (folder / first).is_dir():
        return not rest or is_in(folder / first, rest)
    return set(parts) <= names_in(folder / "__init__.py")


@functools.cache
def names_in(file: Path) -> frozenset[str]:
    """What a module defines or imports, at its top level or in a class; what it exports lazily."""
    found: set[str] = set()
    if not file.exists():
        return frozenset()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.alias):
            found.add((node.asname or node.name).split(".")[0])
        elif isinstance(node, ast.Dict):
            found |= {key.value for key in node.keys if isinstance(key, ast.Constant)}
    return frozenset(found)


@pytest.mark.parametrize("page", PAGES, ids=PAGE_IDS)
def test_names_in_code_marks_exist(page: Path) -> None:
    faults: list[str] = []
    for code in code_marks(page):
        faults += [*make_faults(code), *path_faults(code, page), *name_faults(code)]
    assert not faults


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("set `sfpo.alfa: 1`", "no config key sfpo.alfa"),
        ("run `make coffee`", "no make target coffee"),
        ("see `tests/unit/test_none.py`", "no file tests/unit/test_none.py"),
        ("in `mcore/stepping.py`", "no file mcore/stepping.py"),
        ("in `run_io.py`", "no file run_io.py"),
        ("in `report/`", "no file report/"),
        ("in `mcore/x/`", "no file mcore/x/"),
        ("by `passes.run_passes(policy)`", "no passes.run_passes in the package"),
        ("by `mcore.cpu.uninstalled`", "no mcore.cpu.uninstalled in the package"),
        ("`sfpo_megatron.Snapshot2`", "no sfpo_megatron.Snapshot2 in the package"),
    ],
)
def test_the_check_of_names_finds_faults(tmp_path: Path, text: str, fault: str) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        f"{text}, `sfpo.alpha: 1`, `megatron.ddp.any_name`, `make venv`, `trainer.run(config)`, "
        "`sfpo_megatron.SlowSnapshot`, `mcore/`, `passes.py`, `torch.lerp`, `config.yaml`\n"
    )
    with pytest.raises(AssertionError, match=re.escape(f"['{fault}']")):
        test_names_in_code_marks_exist(page)
