"""FP8 and FP4 in the trainer, which are TransformerEngine's: without it Megatron-Core computes in
the model's dtype and says nothing (`get_fp8_context`, fp8_utils.py)."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

from sfpo_megatron.config.rules.problem import Problem
from sfpo_megatron.config.tree import RunConfig

FORMATS = ("fp8", "fp4")
"""Fields of TransformerConfig that choose one."""
INSTALL_TE = "install TransformerEngine by requirements/gpu.sh or `sfpo-megatron install gpu`"
"""By its name alone pip builds it against the newest torch, and it does not load (docs/gpu.md)."""


def low_precision(config: RunConfig, on_cpu: bool) -> Iterator[Problem]:
    """Refuse a format that nothing here would compute in."""
    for name in FORMATS:
        found = config.megatron.transformer.get(name)
        if not found:
            continue
        key, remove = f"megatron.transformer.{name}", "remove it: it would change nothing"
        if config.model.transformer_impl == "local":
            yield Problem(
                key,
                f"{found} with model.transformer_impl local",
                "null: TransformerEngine alone computes in it",
                f"{remove}, or set model.transformer_impl to te",
            )
        elif on_cpu:
            yield Problem(
                key,
                f"{found} without a CUDA device",
                "null: TransformerEngine alone computes in it, on a GPU",
                f"{remove} here",
                "error_when_training",
            )
        else:
            yield from without_te(
                key, found, "null without TransformerEngine, which alone computes in it", remove
            )


def without_te(key: str, found: str | int, expected: str, fix: str) -> Iterator[Problem]:
    """What to say of a setting that takes TransformerEngine, where it is not installed: a login
    node may have none where the job will have one."""
    if find_spec("transformer_engine") is None:
        yield Problem(
            key,
            f"{found}, and no TransformerEngine in this Python",
            expected,
            f"{fix}, or {INSTALL_TE}",
            "error_here",
        )
