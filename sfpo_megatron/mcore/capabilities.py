"""What this machine offers Megatron-Core: TransformerEngine, then Apex, then torch.

Must run before anything imports `megatron`: Megatron guards its optional imports against
ImportError only, and a TransformerEngine without a driver raises RuntimeError. On CPU a package
that raises is hidden from Megatron (`sys.modules[name] = None` makes its import an ImportError). On
CUDA it ends the run: without it the run would be several times slower, by a mistake of the install.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
from dataclasses import dataclass
from typing import Literal

import torch

from sfpo_megatron.config.rules.low_precision import INSTALL_TE
from sfpo_megatron.host.gpus import driver, unusable

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


class DoesNotLoad(RuntimeError):
    """A package or a device that is here and that nothing can use."""


def _probe(package: str, *modules: str, fix: str | None = None) -> bool:
    """Import `modules`; hide `package` from Megatron if it is there but one of them does not load.
    `fix`: raise DoesNotLoad then, with this for a way out.

    The package, not the module: Megatron takes `import transformer_engine` for a sign that all of
    it works, and then imports the rest unguarded.
    """
    if sys.modules.get(package, package) is None:
        return False
    if package not in sys.modules and importlib.util.find_spec(package) is None:
        return False
    module = package
    try:
        for module in modules:
            importlib.import_module(module)
    except Exception as error:  # a broken install raises whatever its loader raises
        if fix is not None:
            raise DoesNotLoad(
                f"model.transformer_impl: found {package}, of which {module} does not load "
                f"({type(error).__name__}: {error}), expected that all of it does; {fix}, or set "
                "model.transformer_impl: local, which goes without"
            ) from error
        for name in [n for n in sys.modules if n == package or n.startswith(package + ".")]:
            del sys.modules[name]
        sys.modules[package] = None  # type: ignore[assignment]
        log.warning("%s is installed but does not load here (%s); not used", package, error)
        return False
    return True


def expect_no_gpu() -> None:
    """Raise DoesNotLoad where a GPU is here and torch, which has no device, cannot use it."""
    if driver() is None:
        return
    try:
        torch.cuda.init()
        why = "it names no device"
    except (RuntimeError, AssertionError) as error:  # an assertion of a CPU build
        why = str(error).strip().partition("\n")[0]
    fault = unusable(
        driver(), torch_version=torch.__version__, torch_cuda=torch.version.cuda, why=why
    )
    if fault is not None:
        raise DoesNotLoad(fault)


_BUILD_ANEW = {
    "te": "build it for this torch by requirements/gpu.sh (docs/gpu.md)",
    "apex": "build it for this torch with its extensions (APEX_CPP_EXT=1 APEX_CUDA_EXT=1), or "
    "remove it",
}


def probe(
    transformer_impl: Literal["auto", "te", "local"] = "auto", *, cuda: bool | None = None
) -> Capabilities:
    """Find what works, choose, and log the choice. ValueError if `te` is asked for and missing;
    DoesNotLoad if, on CUDA, a package that the run would use is there and broken, unless `local`
    accepts it. `cuda`: whether there is a device; None asks torch."""
    cuda = torch.cuda.is_available() if cuda is None else cuda
    fix = _BUILD_ANEW if cuda and transformer_impl != "local" else {}
    te = _probe("transformer_engine", "transformer_engine.pytorch", fix=fix.get("te"))
    # TransformerEngine has all that Megatron would take of Apex. Apex without its extensions loads,
    # and ends the run where Megatron makes its Adam.
    apex = _probe("apex", "apex.optimizers", "amp_C", fix=None if te else fix.get("apex"))
    if transformer_impl == "te" and not te:
        raise ValueError(
            "model.transformer_impl: found te, but transformer_engine cannot be imported here; "
            f"{INSTALL_TE}, or set model.transformer_impl=auto"
        )
    use_te = te and transformer_impl != "local"
    found = Capabilities(
        cuda=cuda,
        transformer_engine=sys.modules["transformer_engine"].__version__ if te else None,
        apex=apex,
        layers="te" if use_te else "local",
        adam="te" if te else "apex" if apex else "torch",
    )
    log.info("%s", found.describe())
    return found
