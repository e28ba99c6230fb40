"""What vLLM is told of an engine and of a request, and what its answer means.

vllm is imported when these are called, in the engine's process.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sfpo_megatron.config.tree import RunConfig
from sfpo_megatron.families.shape import ModelShape, model_shape, read_hf_config
from sfpo_megatron.families.weight_files import LOAD_FORMAT
from sfpo_megatron.rollout.sampling import Completion, GenerationSettings

_WORKER_REPORTS = "sfpo_megatron.resharding.transports.receiving.WorkerReports"


def engine_args(config: RunConfig, model_path: str) -> Any:
    """vLLM's AsyncEngineArgs; `rollout.engine_args` goes before ours. RuntimeError in another
    version of vLLM than this package is for."""
    require_transports()
    from vllm import AsyncEngineArgs
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    rollout = config.rollout
    longest = config.engine_tokens
    ours: dict[str, Any] = {
        "model": model_path,
        # Not Mistral's params.json and consolidated.safetensors where they lie beside.
        "config_format": "hf",
        "load_format": LOAD_FORMAT,
        "dtype": config.model.dtype,
        "seed": config.seed,
        "tensor_parallel_size": rollout.tensor_parallel,
        "quantization": rollout.quantization,
        "gpu_memory_utilization": rollout.gpu_memory_utilization,
        **sleep_arguments(config, current_platform.is_sleep_mode_available()),
        "max_model_len": longest,
        # Not Ray's workers, which vLLM may choose inside an actor.
        "distributed_executor_backend": "mp" if rollout.tensor_parallel > 1 else "uni",
        "enforce_eager": current_platform.is_cpu(),
        # A seeded request whose prompt is cut rewinds its generator's offset, and CPU
        # generators have none: EngineCore dies (gpu_model_runner.py, _bookkeeping_sync).
        "enable_chunked_prefill": not current_platform.is_cpu(),
        # The prompts are token ids and the controller decodes.
        "skip_tokenizer_init": True,
        # Not the sampling defaults of the model's generation_config.json.
        "generation_config": "vllm",
        # What the trainer recomputes: after temperature and top_p.
        "logprobs_mode": "processed_logprobs",
        "weight_transfer_config": {"backend": config.refit.backend},
        "disable_log_stats": True,
    }
    if config.refit.survives_interruption:
        ours["worker_extension_cls"] = _WORKER_REPORTS
    if positions := named_positions(model_path, longest):
        ours["hf_overrides"] = positions
    shape = _shape_of(model_path)
    has_latents = shape is not None and shape.mla is not None
    if current_platform.is_cpu() and config.model.dtype == "float32" and has_latents:
        # Where the processor has AMX vLLM takes a backend that has no fp32 (amx_mla.py).
        ours["attention_backend"] = AttentionBackendEnum.CPU_MLA
    if rollout.reproducible:
        ours["enable_prefix_caching"] = False  # what it holds depends on the order of calls
    return AsyncEngineArgs(**(ours | rollout.engine_args))


def require_transports() -> None:
    """RuntimeError where vLLM has not what weights travel by: our plug-in only warns of it
    (`register` in resharding/transports)."""
    try:
        from vllm.distributed.weight_transfer.factory import (
            WeightTransferTrainerFactory,  # noqa: F401
        )
    except ImportError as error:
        raise RuntimeError(
            f"the installed vLLM cannot be an engine here ({error}): found another version than "
            "this package is for; install that by `sfpo-megatron install cpu` or `gpu`, in an "
            "environment of its own if something else needs the other"
        ) from error


def sleep_arguments(config: RunConfig, is_available: bool) -> dict[str, bool]:
    """How a colocated engine leaves its devices to the trainer: its CUDA graphs go to the host too
    and come back with the weights (`wake_up` in vllm/device_allocator/cumem.py); vLLM would keep
    them on the device."""
    sleeps = config.rollout.placement == "colocated" and is_available
    return {"enable_sleep_mode": sleeps, "sleep_mode_offload_cudagraph": sleeps}


def usage_context() -> Any:
    """The class of use whose defaults bound the requests that run at a time and the tokens of a
    step (`get_batch_defaults` in vllm/engine/arg_utils.py), where `rollout.engine_args`
    names no bound.

    On a GPU those of its offline class: 1024 requests and 16384 tokens on an H100. For what an
    AsyncLLM calls itself it has none, and takes 128 and 2048 whatever the device is.
    """
    from vllm.platforms import current_platform
    from vllm.usage.usage_lib import UsageContext

    return UsageContext.ENGINE_CONTEXT if current_platform.is_cpu() else UsageContext.LLM_CLASS


def _shape_of(model_path: str) -> ModelShape | None:
    """The shape that config.json names; None for a hub id."""
    if not (Path(model_path) / "config.json").is_file():
        return None
    return model_shape(read_hf_config(model_path))


def named_positions(model_path: str, num_tokens: int) -> dict[str, int]:
    """What to tell vLLM of the model's positions, so that it takes sequences of `num_tokens`.

    It expects yarn and llama3 to have config.json name the stretched length already; where that
    names the original one, its rotary embeddings are made for more than it admits (vllm/config/
    model.py, _get_and_verify_max_len).
    """
    shape = _shape_of(model_path)
    if shape is None:
        return {}
    scaling = shape.rope_scaling
    if scaling is None or scaling.kind == "linear" or num_tokens <= shape.max_position:
        return {}
    return {"max_position_embeddings": shape.max_context}


def sampling_params(seed: int, settings: GenerationSettings) -> Any:
    """vLLM's SamplingParams for one completion."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        temperature=settings.temperature,
        top_p=settings.top_p,
        max_tokens=settings.max_response_tokens,
        stop_token_ids=list(settings.stop_token_ids),
        seed=seed,
        logprobs=0,  # only the sampled token's
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def completion_of(final: Any) -> Completion:
    """The completion in a RequestOutput, vLLM's last word on a request."""
    output = final.outputs[0]
    if output.finish_reason not in ("stop", "length"):
        raise RuntimeError(f"vLLM ended a request with {output.finish_reason!r}")
    tokens = tuple(output.token_ids)
    return Completion(
        token_ids=tokens,
        logprobs=tuple(at[t].logprob for at, t in zip(output.logprobs, tokens, strict=True)),
        finished=output.finish_reason == "stop",
    )
