"""The sections of the config tree about engines: how they generate, and how they get new weights.

No torch, as in tree.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeAlias

from sfpo_megatron.config.fields import FieldError, at_least, known, positive, within
from sfpo_megatron.plugins import ENVIRONMENT


@dataclass(kw_only=True, frozen=True, slots=True)
class RolloutConfig:
    """Generation by vLLM engines."""

    num_engines: int = 1
    """vLLM engines (data parallel)."""
    tensor_parallel: int = 1
    """Tensor-parallel size of each engine; an engine stays on one node."""
    placement: Literal["dedicated", "colocated"] = "dedicated"
    """dedicated: engines have devices of their own. colocated: engine e shares those of the trainer
    ranks e*t ... e*t+t-1 (t = tensor_parallel): while engines generate, the trainer's params, grads
    and optimizer state are in host memory; while it trains, engines sleep."""
    environment: Annotated[str, ENVIRONMENT] = "single_turn"
    """How a prompt becomes a rollout. single_turn: the response is one generation; math_tool: the
    model may call tools, and its last turn is scored (docs/environments.md); agent: a program of
    your own plays the episode by chat completions; verifiers:NAME: an environment of that
    package does (both: docs/agents.md); or a class of your own."""
    environment_args: dict[str, Any] = field(default_factory=dict)
    """Settings of the environment (docs/environments.md has those of math_tool): keyword arguments
    of its class."""
    temperature: float = 1.0
    """Sampling temperature; the trainer's log-probs use the same."""
    top_p: float = 1.0
    """Nucleus sampling mass; 1 samples from the whole distribution."""
    max_prompt_tokens: int = 64
    """A longer prompt is an error (see data.on_bad_row)."""
    max_response_tokens: int = 32
    """Generation stops here if no end-of-sequence token came."""
    async_steps: int = 0
    """1: the next step's rollouts are generated during this step's passes, by weights that are one
    update old when they are trained on. 0: they wait for the refit."""
    oversample: float = 1.0
    """Prompts generated from in a round, as a multiple of train.prompts_per_step: what drop_groups
    leaves is cut to the batch."""
    drop_groups: tuple[Literal["zero_variance", "truncated"], ...] = ()
    """Groups that are not trained on but replaced by others: zero_variance, all rewards equal (the
    dynamic sampling of DAPO); truncated, no response ended by itself."""
    max_rounds: int = 4
    """Rounds of prompts to fill a batch under drop_groups; if they do not, dropped groups are taken
    back."""
    quantization: Literal["fp8_per_channel"] | None = None
    """fp8_per_channel: the engine quantizes what it is sent, online; the trainer keeps its dtype
    (set objective.importance_sampling against the mismatch)."""
    timeout_s: float = 600.0
    """An engine with work that makes no step for this long is ended and restarted; engines that
    are not ready after it end the run's start."""
    max_restarts: int = 3
    """Engines that one start of the run restarts before it stops, and as often the controller."""
    gpu_memory_utilization: float = 0.6
    """Share of a GPU's memory that an engine may take."""
    reproducible: bool = False
    """Each call to an engine is one batch that no other call joins, without a prefix cache: the
    same seed gives the same bits, a resumed run those of one without a break; slower. Episodes of
    several turns wait for one another (docs/environments.md)."""
    engine_args: dict[str, Any] = field(default_factory=dict)
    """More of vLLM's AsyncEngineArgs, as they are."""

    @property
    def num_engine_ranks(self) -> int:
        """Ranks of all engines together; on GPUs, the devices that they take."""
        return self.num_engines * self.tensor_parallel

    def __post_init__(self) -> None:
        at_least(
            self, 1, "num_engines", "tensor_parallel", "max_prompt_tokens", "max_response_tokens"
        )
        at_least(self, 1, "oversample", "max_rounds")
        known(self, ENVIRONMENT, "environment")
        at_least(self, 0, "max_restarts")
        positive(self, "temperature", "timeout_s", "top_p")
        within(self, 0.0, 2.0, "temperature")  # vLLM refuses more
        within(self, 0.0, 1.0, "top_p", "gpu_memory_utilization")
        if self.async_steps not in (0, 1):
            raise FieldError(
                "async_steps", self.async_steps, "0 or 1", "set rollout.async_steps to 0 or 1"
            )
        if self.oversample > 1 and not self.drop_groups:
            raise FieldError(
                "oversample",
                self.oversample,
                "1 without drop_groups",
                "set rollout.drop_groups: without it the surplus would only be thrown away",
            )


Transport: TypeAlias = Literal["auto", "shm", "gloo", "nccl_stages", "nccl", "ipc", "nccl_m2n"]


@dataclass(kw_only=True, frozen=True, slots=True)
class RefitConfig:
    """How the trainer's weights reach the engines."""

    transport: Transport = "auto"
    """shm: a shared-memory file, for engines on the node of the trainer's rank 0. gloo,
    nccl_stages: every pipeline stage and expert-parallel rank broadcasts to all engines. vLLM's
    own: nccl, rank 0 broadcasts everything; ipc, for colocated engines, which open the memory of
    their device's rank; nccl_m2n, every rank sends its shards, to one engine. auto: shm where all
    engines are on that node; else gloo without CUDA, nccl_stages for dedicated engines, ipc for
    colocated ones (gloo with verify_every)."""
    bucket_bytes: int = 536870912
    """Bytes sent at a time; a larger single tensor raises the buffer to its size."""
    timeout_s: float = 300.0
    """An engine that has not taken an update after this long is ended and restarted."""
    verify_every: int = 0
    """Train steps between refits whose checksums are compared, parameter by parameter, between
    the trainer's shards and what arrived in the engines; 0 for never."""

    def __post_init__(self) -> None:
        at_least(self, 4096, "bucket_bytes")
        at_least(self, 0, "verify_every")
        positive(self, "timeout_s")

    @property
    def is_vllms_own(self) -> bool:
        """Both ends are vLLM's; ours is what it reads the weights from."""
        return self.transport in ("nccl", "ipc", "nccl_m2n")

    @property
    def shares_communicator(self) -> bool:
        """All engine workers of an update are in one communicator: the end of one reaches all."""
        return self.transport in ("gloo", "nccl_stages", "nccl", "nccl_m2n")

    @property
    def survives_interruption(self) -> bool:
        """An engine whose update another one broke off can take it again: in our transports alone,
        vLLM's own wait in a broadcast without a time limit."""
        return self.transport in ("gloo", "nccl_stages")

    @property
    def transfer_timeout_s(self) -> float:
        """Limit of one broadcast: those who wait with an engine that hangs give up, and say so,
        before timeout_s is over, when the one that has said nothing is ended."""
        return self.timeout_s / 2

    @property
    def backend(self) -> str:
        """vLLM's name of the weight-transfer backend, which engines and trainer must agree on;
        there is none for auto, in whose place `transports.chosen` puts another."""
        return self.transport if self.is_vllms_own else f"sfpo_{self.transport}"
