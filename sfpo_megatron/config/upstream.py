"""Fields of a dataclass of an installed package, read from its source: nothing is imported.

`import vllm` takes seconds and `import megatron.core` brings torch; a source file is parsed in
0.03 s, once for each process, and only where a config names such a field.
"""

from __future__ import annotations

import ast
import os
import re
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.machinery import PathFinder
from pathlib import Path

from sfpo_megatron.types import Json

_ATOMS: Mapping[str, tuple[type, ...]] = {
    "bool": (bool, int),  # 0 and 1 too
    "int": (int,),
    "float": (float, int),
    "str": (str,),
    "dict": (dict,),
    "Dict": (dict,),
    "list": (list,),
    "List": (list,),
    "tuple": (list,),  # YAML has lists alone
    "Tuple": (list,),
    "set": (list,),
    "None": (type(None),),
}
_DTYPE = re.compile(r"(b?float|u?int)\d+(_\w+)?")
"""Names that torch has dtypes of."""


@cache
def fields_of(module: str, cls: str) -> Mapping[str, str] | None:
    """Name -> annotation of the fields of `cls`, those of its bases included; None where the
    package is not installed or its source does not tell."""
    tree = _parsed(module)
    if tree is None:
        return None
    node = next((n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == cls), None)
    if node is None:
        return None
    fields: dict[str, str] = {}
    for base in node.bases:
        home = _home(base, tree, module)
        if home is None:
            continue
        inherited = fields_of(*home)
        if inherited is None:
            return None
        fields |= inherited
    for item in node.body:
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            annotation = ast.unparse(item.annotation)
            if isinstance(item.value, ast.Constant) and item.value.value is None:
                annotation += "" if accepts(annotation, None) else " | None"  # as in x: int = None
            if not annotation.startswith(("ClassVar", "typing.ClassVar")):
                fields[item.target.id] = annotation
    return fields


def accepts(annotation: str, value: Json) -> bool:
    """Whether a field with this annotation may have the value; True where it cannot be told."""
    try:
        return _accepts(ast.parse(annotation, mode="eval").body, value)
    except SyntaxError:
        return True


def _accepts(node: ast.expr, value: Json) -> bool:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return accepts(node.value, value)
    if isinstance(node, ast.Constant):
        return value is None if node.value is None else True
    if isinstance(node, ast.BinOp):
        return _accepts(node.left, value) or _accepts(node.right, value)
    if isinstance(node, ast.Name):
        known = _ATOMS.get(node.id)
        if known is None:
            return True
        if isinstance(value, bool):
            return node.id == "bool"
        if node.id == "bool":
            return value in (0, 1) and isinstance(value, int)
        return isinstance(value, known)
    if isinstance(node, ast.Subscript):
        return _accepts_subscript(node, value)
    if ast.unparse(node) == "torch.dtype":
        return isinstance(value, str) and _DTYPE.fullmatch(value) is not None
    return True


def _accepts_subscript(node: ast.Subscript, value: Json) -> bool:
    name = ast.unparse(node.value).rpartition(".")[2]
    inner = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
    if name == "Literal":
        choices = [item.value for item in inner if isinstance(item, ast.Constant)]
        return value in choices or len(choices) < len(inner)
    if name == "Optional":
        return value is None or _accepts(inner[0], value)
    if name == "Union":
        return any(_accepts(item, value) for item in inner)
    return _accepts(ast.Name(id=name), value)


# ---- where a class is --------------------------------------------------------------------------


@cache
def _parsed(module: str) -> ast.Module | None:
    file = _file(module)
    if file is None:
        return None
    try:
        return ast.parse(file.read_bytes(), filename=str(file))
    except (OSError, SyntaxError, ValueError):
        return None


def _file(module: str) -> Path | None:
    """The module's source; `importlib.util.find_spec` would import the packages above it."""
    path: list[str] | None = [entry or os.getcwd() for entry in sys.path]
    origin = None
    for part in module.split("."):
        spec = PathFinder.find_spec(part, path)
        if spec is None:
            return None
        found = spec.submodule_search_locations
        path, origin = list(found) if found is not None else [], spec.origin
    return Path(origin) if origin and origin.endswith(".py") else None


def _home(base: ast.expr, tree: ast.Module, module: str) -> tuple[str, str] | None:
    """Module and name of a base class; None for one that is neither here nor imported by name,
    such as a builtin."""
    if not isinstance(base, ast.Name):
        return None
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == base.id:
            return module, base.id
    for origin, name, alias in _imports(tree, module):
        if alias == base.id and origin.partition(".")[0] == module.partition(".")[0]:
            return origin, name
    return None


def _imports(tree: ast.Module, module: str) -> Iterator[tuple[str, str, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            above = module.split(".")[: -node.level] if node.level else []
            origin = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                yield origin, alias.name, alias.asname or alias.name
