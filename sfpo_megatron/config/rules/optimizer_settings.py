"""Settings of Megatron's optimizer and of its data parallelism that contradict one another, most of
which it would say itself once engines have started and the model is loaded. No torch."""

from __future__ import annotations

from collections.abc import Iterator

from sfpo_megatron.config.rules.low_precision import without_te
from sfpo_megatron.config.rules.problem import Problem
from sfpo_megatron.config.tree import RunConfig

_AWARE, _OFFLOAD = "use_precision_aware_optimizer", "optimizer_cpu_offload"
_SHARDED = "use_distributed_optimizer"
_HIGHEST_LR = 0.1
_DTYPES = ("main_grads_dtype", "main_params_dtype", "exp_avg_dtype", "exp_avg_sq_dtype")


def optimizer_settings(config: RunConfig) -> Iterator[Problem]:
    """What OptimizerConfig and the optimizer that is built from it assert, and SFPO with them."""
    given = config.megatron.optimizer
    if given.get(_AWARE):
        yield from _precision_aware(config)
    else:
        yield from _lower_dtypes(config)
    if given.get(_OFFLOAD):
        yield from _offloaded(config)
    if _kind(config) == "sgd" and _is_sharded(config):
        yield Problem(
            f"megatron.ddp.{_SHARDED}",
            "true with megatron.optimizer.optimizer: sgd",
            "false",
            f"set megatron.ddp.{_SHARDED}=false: Megatron shards no SGD",
        )


def learning_rates(config: RunConfig) -> Iterator[Problem]:
    """Whether they can be meant for Adam, whose steps are about as long in every weight."""
    if _kind(config) != "adam":
        return
    rates = (
        ("train.optimizer.lr", config.train.optimizer.lr, "1.0e-6"),
        ("sft.lr", config.sft.lr, "1.0e-5"),
    )
    for key, lr, usual in rates:
        if lr > _HIGHEST_LR:
            yield Problem(
                key,
                f"{lr:g}",
                f"at most {_HIGHEST_LR:g} with Adam, which moves every weight by about as much",
                f"write a smaller one, such as {usual}",
                "warning",
            )


def _kind(config: RunConfig) -> str:
    """What it is called in megatron.optimizer: `optimizer_modes` says what that may be."""
    return str(config.megatron.optimizer.get("optimizer", "adam"))


def _is_sharded(config: RunConfig) -> bool:
    return bool(config.megatron.ddp.get(_SHARDED, True))


def _precision_aware(config: RunConfig) -> Iterator[Problem]:
    given, key = config.megatron.optimizer, f"megatron.optimizer.{_AWARE}"
    kind = _kind(config)
    if kind != "adam":
        yield Problem(
            key,
            f"true with megatron.optimizer.optimizer: {kind}",
            "false: only Adam can be",
            "remove one of the two",
        )
    if not _is_sharded(config):
        yield Problem(
            key,
            f"true with megatron.ddp.{_SHARDED}: false",
            "false: only the distributed optimizer can be",
            "remove one of the two",
        )
    if config.model.dtype == "float16":
        yield Problem(
            "model.dtype",
            f"float16 with {key}",
            "bfloat16 or float32: a loss scale would be in the main params",
            "change one of the two",
        )
    for name in ("exp_avg_dtype", "exp_avg_sq_dtype"):
        dtype = given.get(name, "float32")
        if config.sfpo.moments != "keep" and dtype != "float32":
            yield Problem(
                f"megatron.optimizer.{name}",
                f"{dtype} with sfpo.moments: {config.sfpo.moments}",
                "float32",
                "set sfpo.moments: keep: only fp32 moments are put back or zeroed",
            )
    expected = "false without TransformerEngine, whose FusedAdam alone can be"
    yield from without_te(key, "true", expected, "remove it")  # its version is asked in any case


def _lower_dtypes(config: RunConfig) -> Iterator[Problem]:
    for name in _DTYPES:
        dtype = config.megatron.optimizer.get(name, "float32")
        if dtype != "float32":
            yield Problem(
                f"megatron.optimizer.{name}",
                f"{dtype} without {_AWARE}",
                "float32",
                f"remove it, or set megatron.optimizer.{_AWARE}=true",
            )


def _offloaded(config: RunConfig) -> Iterator[Problem]:
    given, key = config.megatron.optimizer, f"megatron.optimizer.{_OFFLOAD}"
    if config.model.dtype == "float32":
        yield Problem(
            key,
            "true with model.dtype: float32",
            "bfloat16 params",
            "set model.dtype: bfloat16: Megatron-Core cannot offload fp32 params",
        )
    if _kind(config) == "sgd":
        yield Problem(
            key,
            "true with megatron.optimizer.optimizer: sgd",
            "false",
            "leave it out, or use adam: Megatron offloads only shards of the distributed "
            "optimizer, which takes no SGD",
        )
    elif not _is_sharded(config):
        yield Problem(
            key,
            f"true with megatron.ddp.{_SHARDED}: false",
            "the distributed optimizer",
            "remove one of the two: without it Megatron replaces params that it has copied",
        )
    if not given.get("decoupled_weight_decay", True):
        yield Problem(
            key,
            "true with megatron.optimizer.decoupled_weight_decay: false",
            "decoupled weight decay, as AdamW has it",
            "remove one of the two: Megatron offloads no other",
        )


def data_parallel_settings(config: RunConfig) -> Iterator[Problem]:
    """What DistributedDataParallel and its buckets assert."""
    given, parallel = config.megatron.ddp, config.parallel
    instances = given.get("num_distributed_optimizer_instances", 1)
    for name, is_set in (
        ("overlap_param_gather", given.get("overlap_param_gather")),
        ("num_distributed_optimizer_instances", instances != 1),
    ):
        if is_set and not _is_sharded(config):
            yield Problem(
                f"megatron.ddp.{name}",
                f"{given[name]} with megatron.ddp.{_SHARDED}: false",
                "the distributed optimizer, whose shards it is about",
                "remove one of the two",
            )
    ranks = (parallel.data or 0) * parallel.context
    if isinstance(instances, int) and (instances < 1 or ranks % max(instances, 1)):
        yield Problem(
            "megatron.ddp.num_distributed_optimizer_instances",
            str(instances),
            f"a divisor of data x context ({ranks})",
            "choose another number",
        )
    per_token = config.megatron.transformer.get("calculate_per_token_loss")
    if given.get("average_in_collective") and per_token:
        yield Problem(
            "megatron.ddp.average_in_collective",
            "true with megatron.transformer.calculate_per_token_loss",
            "one of the two",
            "remove it: gradients that are divided by tokens are summed up",
        )
