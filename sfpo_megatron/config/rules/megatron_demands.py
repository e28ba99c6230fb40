"""What Megatron-Core demands of its settings, said before it is imported: it would itself, but only
once the ranks have started (`__post_init__` of its configs, mcore/settings.py). No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from sfpo_megatron.config.rules.low_precision import without_te
from sfpo_megatron.config.rules.problem import Problem
from sfpo_megatron.config.tree import RunConfig

_TRANSFORMER, _OPTIMIZER = "megatron.transformer", "megatron.optimizer"
_WITHOUT_OUTPUT = ("layernorm", "moe_act", "mla_up_proj")
"""Modules whose recompute asks TransformerEngine about FP8 (CheckpointWithoutOutput, random.py)."""
_LOSS_SCALE = {
    "min_loss_scale": 1.0,
    "initial_loss_scale": 2.0**16,
    "loss_scale_window": 1,
    "hysteresis": 1,
}
"""Fields of OptimizerConfig about a scale that moves; the two scales with their defaults here."""


_OF_ANOTHER_LOOP = {
    f"{_TRANSFORMER}.overlap_moe_expert_parallel_comm": "its schedule wants a forward step that "
    "plans the layers one by one (combined_1f1b.py)",
    f"{_TRANSFORMER}.tp_comm_overlap": "its buffers are of one size, and packs have all lengths",
    f"{_TRANSFORMER}.hybrid_context_parallel": "its schedule wants Megatron-LM's own data loader",
    f"{_TRANSFORMER}.hierarchical_context_parallel_sizes": "its groups of ranks are not made here",
    f"{_TRANSFORMER}.fused_single_qkv_rope": "its kernel takes no packs, as all microbatches are",
    f"{_TRANSFORMER}.init_model_with_meta_device": "only Megatron-FSDP gives such weights memory",
    f"{_OPTIMIZER}.optimizer_cuda_graph": "Megatron-LM's training script captures the step",
}
"""Setting -> what it asks of the loop around the model, which this one does not do."""


def _number(settings: Mapping[str, Any], name: str, otherwise: float) -> float:
    """A setting whose type `passed_through` has looked at, where Megatron-Core is installed."""
    value = settings.get(name, otherwise)
    return value if isinstance(value, int | float) else otherwise


def transformer_engine(config: RunConfig) -> Iterator[Problem]:
    """Whether it is here, where layers are to be its own."""
    megatron = config.megatron
    modules = megatron.transformer.get("recompute_modules") or ()
    kept = [name for name in _WITHOUT_OUTPUT if name in modules]
    is_selective = megatron.transformer.get("recompute_granularity") == "selective"
    asked = {
        "model.transformer_impl": ("te", config.model.transformer_impl == "te"),
        f"{_TRANSFORMER}.cpu_offloading": ("true", megatron.transformer.get("cpu_offloading")),
        f"{_TRANSFORMER}.recompute_modules": (", ".join(kept), is_selective and kept),
    }
    for key, (found, is_asked) in asked.items():
        if is_asked:
            yield from without_te(
                key, found, "nothing that TransformerEngine alone has", "remove it"
            )


def offload(config: RunConfig, on_cpu: bool) -> Iterator[Problem]:
    """Whether there is a device that the optimizer could leave."""
    if on_cpu and config.megatron.optimizer.get("optimizer_cpu_offload"):
        yield Problem(
            f"{_OPTIMIZER}.optimizer_cpu_offload",
            "true without a CUDA device",
            "false: the optimizer is in host memory",
            "remove it here",
            "error_when_training",
        )


def loss_scale(config: RunConfig) -> Iterator[Problem]:
    """Whether the scale of float16's loss is one, and moves."""
    given = config.megatron.optimizer
    names = ["loss_scale"] if given.get("loss_scale") else []
    if config.model.dtype == "float16" and not names:
        names = [*_LOSS_SCALE]
    for name in names:
        if _number(given, name, 1) <= 0:
            yield Problem(
                f"{_OPTIMIZER}.{name}", f"{given[name]}", "a number > 0", "raise or remove it"
            )
    if len(names) > 1 and config.megatron.ddp.get("check_for_nan_in_grad"):
        yield Problem(
            "megatron.ddp.check_for_nan_in_grad",
            "true with model.dtype float16 and a loss scale that moves",
            "false: the scale is found by steps that overflow, and this would end the run at one",
            "remove it (such steps are skipped), or set a constant megatron.optimizer.loss_scale",
        )
    lowest, first = (_number(given, n, _LOSS_SCALE[n]) for n in list(_LOSS_SCALE)[:2])
    if len(names) > 1 and lowest > first > 0:
        yield Problem(
            f"{_OPTIMIZER}.min_loss_scale",
            f"{lowest:g}",
            f"at most initial_loss_scale ({first:g})",
            "lower it, or raise initial_loss_scale",
        )


def graphs(config: RunConfig) -> Iterator[Problem]:
    """Whether packs, each of another length, are to be captured."""
    given = config.megatron.transformer
    for name in ("enable_cuda_graph", "cuda_graph_impl"):
        if given.get(name) in (True, "local"):
            yield Problem(
                f"{_TRANSFORMER}.{name}",
                f"{given[name]}",
                "no CUDA graphs: packed microbatches have all lengths",
                "remove it",
            )


def loop(config: RunConfig) -> Iterator[Problem]:
    """Whether a setting is one that Megatron-LM's training script has to do something for."""
    sections = {_TRANSFORMER: config.megatron.transformer, _OPTIMIZER: config.megatron.optimizer}
    for key, why in _OF_ANOTHER_LOOP.items():
        section, _, name = key.rpartition(".")
        if found := sections[section].get(name):
            off = "null" if name.endswith("sizes") else "false"
            yield Problem(key, f"{found}", f"{off}: {why}", "remove it")


def stages(config: RunConfig) -> Iterator[Problem]:
    """Whether the first or the last of several stages is meant."""
    for name in ("num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage"):
        found = config.megatron.transformer.get(name)
        if found is not None and config.parallel.pipeline == 1:
            yield Problem(
                f"{_TRANSFORMER}.{name}",
                f"{found} with parallel.pipeline 1",
                "null with one stage, which has all layers",
                "remove it",
            )
    size, name = config.parallel.pipeline, "microbatch_group_size_per_vp_stage"
    group = config.megatron.transformer.get(name)
    if config.parallel.virtual_pipeline and isinstance(group, int) and group < size:
        yield Problem(
            f"{_TRANSFORMER}.{name}",
            f"{group} with parallel.pipeline {size}",
            f"{size} or more: the interleaved schedule works on a microbatch a stage at a time",
            "raise or remove it",
        )


def megatron_demands(config: RunConfig, on_cpu: bool) -> Iterator[Problem]:
    """All of these."""
    for rule in (transformer_engine, loop, stages, graphs, loss_scale):
        yield from rule(config)
    yield from offload(config, on_cpu)
