"""Signatures of Megatron-Core, vLLM and TransformerEngine, read from their sources by `ast`.

    python tests/made/signatures.py NAME VERSION FOLDER     # writes tests/contracts/NAME-VERSION

FOLDER has the package unpacked (site-packages, or a wheel). Nothing of it is imported, so that the
release for GPUs is read where no GPU is. What a table has: every name that sfpo_megatron takes from
there, with parameters and defaults; of a class that one of ours subclasses also its public methods;
of TransformerEngine, what tests/te_standin stands in for.
"""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple, TypeAlias

ROOT = Path(__file__).parents[2]
CONTRACTS = ROOT / "tests/contracts"
PACKAGES = {
    "megatron-core": "megatron.core",
    "vllm": "vllm",
    "transformer-engine": "transformer_engine",
}
OURS = (ROOT / "sfpo_megatron", ROOT / "tests/te_standin")
Definition: TypeAlias = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
Table: TypeAlias = dict[str, list[str]]
"""`module:name` -> its parameters: `name`, `name=default`, `*name`, `*`, `**name`."""


class Found(NamedTuple):
    """A definition, and the module that it stands in."""

    module: str
    node: ast.AST


class Sources:
    """Modules below a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._trees: dict[str, ast.Module | None] = {}

    def tree(self, module: str) -> ast.Module | None:
        """The module's source; None where there is none."""
        if module not in self._trees:
            base = self._folder.joinpath(*module.split("."))
            files = [f for f in (base / "__init__.py", base.with_suffix(".py")) if f.is_file()]
            text = files[0].read_text(encoding="utf-8") if files else None
            self._trees[module] = None if text is None else ast.parse(text)
        return self._trees[module]

    def is_package(self, module: str) -> bool:
        """Whether relative imports in it start at itself."""
        return self._folder.joinpath(*module.split("."), "__init__.py").is_file()

    def find(self, module: str, name: str, depth: int = 0) -> Found | None:
        """The definition that `from module import name` gives, through re-exports."""
        tree = self.tree(module)
        if tree is None or depth > 8:
            return None
        nodes = list(_top_level(tree))
        for node in nodes:
            if isinstance(node, Definition) and node.name == name:
                return Found(module, node)
        for node in nodes:
            if isinstance(node, ast.ImportFrom) and (
                found := self._imported(module, node, name, depth + 1)
            ):
                return found
        for node in nodes:
            if isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                if any(isinstance(target, ast.Name) and target.id == name for target in targets):
                    return Found(module, node)
        if self.tree(f"{module}.{name}") is not None:
            return Found(module, tree)
        return None

    def _imported(self, module: str, node: ast.ImportFrom, name: str, depth: int) -> Found | None:
        source = self._absolute(module, node)
        for alias in node.names:
            if alias.name == "*" and (found := self.find(source, name, depth)):
                return found
            if (alias.asname or alias.name) == name:
                return self.find(source, alias.name, depth)
        return None

    def _absolute(self, module: str, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        parts = module.split(".")
        parts = parts[: len(parts) - node.level + (1 if self.is_package(module) else 0)]
        return ".".join([*parts, *filter(None, [node.module])])

    def parameters(self, found: Found) -> list[str]:
        """A function's parameters; a class's constructor's, or its fields."""
        node = found.node
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            return arguments_of(node.args)
        if not isinstance(node, ast.ClassDef):
            return []
        for item in node.body:
            if isinstance(item, ast.FunctionDef) and item.name == "__init__":
                return arguments_of(item.args)[1:]
        inherited: list[str] = []
        for base in reversed(node.bases):
            if isinstance(base, ast.Name) and (at := self.find(found.module, base.id)):
                inherited += self.parameters(at)
        fields = {
            item.target.id: _with_default(item.target.id, item.value)
            for item in node.body
            if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
        }
        members = [
            target.id
            for item in node.body
            if isinstance(item, ast.Assign)
            for target in item.targets
            if isinstance(target, ast.Name)
        ]
        kept = [line for line in inherited if line.partition("=")[0] not in fields]
        return [*kept, *fields.values(), *(m for m in members if m not in kept)]

    def member(self, owner: str, name: str) -> list[str] | None:
        """Parameters of a class's method but the first, `owner` being `module.Class`; [] of another
        member. None of what only an object has."""
        module, _, class_name = owner.rpartition(".")
        found = self.find(module, class_name) if module else None
        if found is None or not isinstance(found.node, ast.ClassDef):
            return None
        return next((args[1:] for each, args in self.methods(found) if each == name), [])

    def methods(self, found: Found) -> Iterator[tuple[str, list[str]]]:
        """Methods of a class and of its bases in the same sources, but for constructors."""
        if not isinstance(found.node, ast.ClassDef):
            return
        for base in found.node.bases:
            if isinstance(base, ast.Name) and (at := self.find(found.module, base.id)):
                yield from self.methods(at)
        for item in found.node.body:
            if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef) and item.name != "__init__":
                yield item.name, arguments_of(item.args)


def _top_level(tree: ast.AST) -> Iterator[ast.AST]:
    """Statements of a module, those inside `if` and `try` too."""
    for node in ast.iter_child_nodes(tree):
        yield node
        if isinstance(node, ast.If | ast.Try | ast.With | ast.ExceptHandler):
            yield from _top_level(node)


def _with_default(name: str, default: ast.expr | None) -> str:
    return name if default is None else f"{name}={ast.unparse(default)}"


def arguments_of(args: ast.arguments) -> list[str]:
    plain = [*args.posonlyargs, *args.args]
    defaults: list[ast.expr | None] = [None] * (len(plain) - len(args.defaults)) + [*args.defaults]
    lines = [_with_default(a.arg, d) for a, d in zip(plain, defaults, strict=True)]
    if args.vararg or args.kwonlyargs:
        lines.append(f"*{args.vararg.arg if args.vararg else ''}")
    lines += [
        _with_default(a.arg, d) for a, d in zip(args.kwonlyargs, args.kw_defaults, strict=True)
    ]
    return lines + ([f"**{args.kwarg.arg}"] if args.kwarg else [])


# ---- what we take ---------------------------------------------------------------------------


class Taken(NamedTuple):
    """What our sources take of a package."""

    names: frozenset[str]
    """`module:name` each."""
    bases: frozenset[str]
    """Those of them that a class of ours has for a base."""


@cache
def taken(package: str) -> Taken:
    """What we take of `package`; of TransformerEngine what the stand-in defines, for Megatron."""
    if package == PACKAGES["transformer-engine"]:
        return Taken(frozenset(stand_in()), frozenset(stand_in()))
    names: set[str] = set()
    bases: set[str] = set()
    for path in our_files():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        local = names_of(tree, package)
        names |= set(local.values())
        bases |= {local[base] for node in classes(tree) for base in base_names(node) & set(local)}
    return Taken(frozenset(names), frozenset(bases))


def our_files() -> list[Path]:
    """The package's modules."""
    return sorted(OURS[0].rglob("*.py"))


def classes(tree: ast.AST) -> list[ast.ClassDef]:
    """All of a module's, those inside functions too."""
    return [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]


def base_names(node: ast.ClassDef) -> set[str]:
    """A class's bases as they are written, `Generic[T]` as `Generic`."""
    return {ast.unparse(b.value if isinstance(b, ast.Subscript) else b) for b in node.bases}


def names_of(tree: ast.AST, package: str) -> dict[str, str]:
    """How a module of ours calls what it takes -> `module:name`: names that it imports, and
    attributes of modules that it imports."""
    names: dict[str, str] = {}
    modules: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and f"{node.module}.".startswith(f"{package}."):
            for alias in node.names:
                names[alias.asname or alias.name] = f"{node.module}:{alias.name}"
                modules[alias.asname or alias.name] = f"{node.module}.{alias.name}"
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith(f"{package}.") and alias.asname:
                    modules[alias.asname] = alias.name
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            module = modules.get(node.value.id)
            if module is not None and isinstance(node.ctx, ast.Load):
                names[f"{node.value.id}.{node.attr}"] = f"{module}:{node.attr}"
    return names


@cache
def stand_in() -> dict[str, Definition]:
    """`module:name` of each class and function of the stand-in -> its definition."""
    folder = OURS[1]
    found: dict[str, Definition] = {}
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        module = ".".join(p for p in parts if p != "__init__")
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, Definition) and not node.name.startswith("_"):
                found[f"{module}:{node.name}"] = node
    return found


def table(name: str, folder: Path) -> Table:
    """What the sources in `folder` have of all that is taken; names that they have not are left
    out (one of two releases)."""
    sources, ours = Sources(folder), taken(PACKAGES[name])
    rows: Table = {}
    for key in ours.names:
        module, _, attribute = key.partition(":")
        # The stand-in has files of its own making: Megatron takes all of it of `pytorch`.
        places = [module, *(["transformer_engine.pytorch"] if key in stand_in() else [])]
        at = next(filter(None, (sources.find(place, attribute) for place in places)), None)
        if at is None:
            if (member := sources.member(module, attribute)) is not None:
                rows[key] = member
            continue
        rows[key] = sources.parameters(at)
        if key in ours.bases:
            own = stand_in()[key].body if key in stand_in() else None
            kept = None if own is None else {n.name for n in own if isinstance(n, ast.FunctionDef)}
            rows |= {
                f"{key}.{method}": args
                for method, args in sources.methods(at)
                if (not method.startswith("_") if kept is None else method in kept)
            }
    return dict(sorted(rows.items()))


def file_of(name: str, version: str) -> Path:
    """The committed table of a release."""
    return CONTRACTS / f"{name}-{version}.json"


def read(name: str, version: str) -> Table:
    """The same, read."""
    found: Table = json.loads(file_of(name, version).read_text(encoding="utf-8"))
    return found


def main(arguments: Iterable[str]) -> None:
    """Write the table of a release."""
    name, version, folder = arguments
    rows = table(name, Path(folder))
    file_of(name, version).write_text(as_text(rows), encoding="utf-8")


def as_text(rows: Table) -> str:
    """One row a line: what a release changes is read in its diff."""
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in rows.items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


if __name__ == "__main__":
    main(sys.argv[1:])
