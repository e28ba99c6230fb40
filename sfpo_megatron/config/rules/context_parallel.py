"""What context parallelism (parallel.context above 1) cannot go with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sfpo_megatron.config.rules.low_precision import without_te
from sfpo_megatron.config.rules.model import Problem
from sfpo_megatron.config.tree import RunConfig
from sfpo_megatron.families.shape import ModelShape


def context_parallel(config: RunConfig) -> Iterator[Problem]:
    """Only TransformerEngine's attention exchanges keys and values between ranks; a sequence is
    split over them, so what needs a whole sequence on one rank cannot be computed."""
    if config.parallel.context == 1:
        return
    found = str(config.parallel.context)
    objective = config.objective
    sampling = objective.importance_sampling
    for key, value, instead in (
        ("ratio", objective.ratio, "token"),
        ("aggregation", objective.aggregation, "token_mean"),
        ("importance_sampling.weight", sampling.weight, "token"),
        ("importance_sampling.reject", sampling.reject, "token"),
    ):
        if value in ("sequence", "seq_mean_token_mean"):
            yield Problem(
                f"objective.{key}",
                f"{value} with parallel.context {found}",
                "nothing that is averaged over a whole response: ranks hold parts of it",
                f"set it to {instead}, or parallel.context to 1",
            )
    if config.model.transformer_impl == "local":
        yield Problem(
            "parallel.context",
            f"{found} with model.transformer_impl local",
            "1 (the torch attention keeps a sequence on one rank)",
            "set it to 1, or model.transformer_impl to te",
        )
    else:
        yield from without_te(
            "parallel.context", found, "1 without TransformerEngine", "set it to 1"
        )


def auxiliary_losses(config: RunConfig, shape: ModelShape, on_cpu: bool) -> Iterator[Problem]:
    """Whether routers have auxiliary losses. A coefficient without its load balancing adds none;
    that of load balancing is the model's own where none is given."""
    given, size = config.megatron.transformer, config.parallel.context
    if size == 1:
        return
    expected = "no auxiliary loss: the padding inside of sequences would count"
    balancing = given.get("moe_router_load_balancing_type")
    own = shape.moe.aux_loss_coef if shape.moe else 0.0
    coefficient = given.get("moe_aux_loss_coeff")
    is_balanced = "aux_loss" in str(balancing)
    for name, has_loss in (
        ("moe_aux_loss_coeff", is_balanced and _is_positive(coefficient)),
        ("moe_z_loss_coeff", bool(given.get("moe_z_loss_coeff"))),
    ):
        if has_loss:
            yield Problem(
                f"megatron.transformer.{name}",
                f"{given[name]} with parallel.context {size}",
                expected,
                "set it to 0, or parallel.context to 1",
            )
    if is_balanced and coefficient is None and own > 0:
        yield Problem(
            "megatron.transformer.moe_router_load_balancing_type",
            f"{balancing} with parallel.context {size}",
            expected,
            "remove it, or set moe_aux_loss_coeff: 0 beside it (else the model's "
            "router_aux_loss_coef holds), or parallel.context to 1",
        )


def _is_positive(coefficient: Any) -> bool:
    """Whether it is above 0, or one of several is."""
    several = coefficient if isinstance(coefficient, list) else [coefficient]
    return any(float(one or 0) > 0 for one in several)
