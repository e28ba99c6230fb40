"""What this machine offers Megatron-Core: TransformerEngine, then Apex, then torch.

Must run before anything imports `megatron`: Megatron guards its optional imports against
ImportError only, and a TransformerEngine without a driver raises RuntimeError. A package that
raises is hidden from Megatron (`sys.modules[name] = None` makes its import an ImportError).
"""

from __future__ import annotations

import importlib
import logging
import sys
from dataclasses import dataclass
from typing import Literal

import torch

log = logging.getLogger(__name__)


@dataclass(kw_only=True, frozen=True, slots=True)
class Capabilities:
    """What was found and what it decides."""

    cuda: bool
    transformer_engine: str | None
    """Its version; None if it cannot be used."""
    apex: bool
    layers: Literal["te", "local"]
    """The layer spec: Megatron's TransformerEngine classes or its own torch ones."""
    adam: Literal["te", "apex", "torch"]
    """The package whose Adam Megatron takes."""

    def describe(self) -> str:
        return (
            f"layers: {self.layers}, adam: {self.adam} "
            f"(transformer_engine {self.transformer_engine or 'absent'}, "
            f"apex {'present' if self.apex else 'absent'}, "
            f"{'CUDA' if self.cuda else 'CPU'})"
        )


def _probe(module: str) -> object | None:
    """Import `module`; hide its whole package from Megatron if it is there but does not work.

    The package, not the module: Megatron takes `import transformer_engine` for a sign that all of
    it works, and then imports the rest unguarded.
    """
    package = module.partition(".")[0]
    if sys.modules.get(package, package) is None:
        return None
    try:
        return importlib.import_module(module)
    except Exception as error:  # a broken install raises whatever its loader raises
        if isinstance(error, ImportError) and package not in sys.modules:
            return None  # not installed
        for name in [n for n in sys.modules if n == package or n.startswith(package + ".")]:
            del sys.modules[name]
        sys.modules[package] = None  # type: ignore[assignment]
        log.warning("%s is installed but does not load here (%s); not used", module, error)
        return None


def probe(transformer_impl: Literal["auto", "te", "local"] = "auto") -> Capabilities:
    """Find what works, choose, and log the choice. ValueError if `te` is asked for and missing."""
    engine = _probe("transformer_engine.pytorch") and sys.modules.get("transformer_engine")
    apex = _probe("apex.optimizers") is not None and _probe("amp_C") is not None
    if transformer_impl == "te" and not engine:
        raise ValueError(
            "model.transformer_impl: found te, but transformer_engine cannot be imported here; "
            "install transformer-engine[pytorch] or set model.transformer_impl=auto"
        )
    use_te = bool(engine) and transformer_impl != "local"
    found = Capabilities(
        cuda=torch.cuda.is_available(),
        transformer_engine=getattr(engine, "__version__", None) if engine else None,
        apex=apex,
        layers="te" if use_te else "local",
        adam="te" if engine else "apex" if apex else "torch",
    )
    log.info("%s", found.describe())
    return found
