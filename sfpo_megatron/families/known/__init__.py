"""The families that are known: one module each beside this one, with its record `FAMILY`. No torch.

A new family is a new file here; nothing lists them.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable

from sfpo_megatron.families.family import Family


def families_of(package: str, path: Iterable[str]) -> dict[str, Family]:
    """Name -> record of every module of `package`, whose folders are `path`, in the order of their
    names. ValueError names a module without a record, and two records that claim the same."""
    found: dict[str, Family] = {}
    owner: dict[str, str] = {}
    for name in sorted(module.name for module in pkgutil.iter_modules(list(path))):
        file = f"{package}.{name}"
        family = getattr(importlib.import_module(file), "FAMILY", None)
        if not isinstance(family, Family):
            raise ValueError(f"{file}: found no FAMILY, expected a record; give it one or move it")
        for key in (family.name, *family.architectures):
            if key in owner:
                raise ValueError(
                    f"{file}: found {key!r}, which is {owner[key]}'s, expected a name of its own; "
                    "rename one or join the two"
                )
            owner[key] = file
        found[family.name] = family
    return found


FAMILIES: dict[str, Family] = families_of(__name__, __path__)
SUPPORTED_ARCHITECTURES: dict[str, str] = {
    architecture: family.name
    for family in FAMILIES.values()
    for architecture in family.architectures
}
"""`architectures[0]` of config.json -> name of the family."""
