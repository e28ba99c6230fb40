"""A tiny policy on one process, and a batch for it, from nothing but torch and Megatron-Core."""

from __future__ import annotations

import json
import os
import socket
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from benchmarks.common.provenance import ROOT
from sfpo_megatron.config.tree import (
    DataConfig,
    DataSource,
    MegatronConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerSection,
    RolloutConfig,
    RunConfig,
    TrainConfig,
)
from sfpo_megatron.families.hf_files import SafetensorsWriter, TensorMeta
from sfpo_megatron.families.shape import model_shape
from sfpo_megatron.families.table import hf_shapes, rules_of

if TYPE_CHECKING:
    from sfpo_megatron.mcore.capabilities import Capabilities
    from sfpo_megatron.mcore.setup import Policy
    from sfpo_megatron.types import RolloutBatch

sys.path += [str(ROOT / "tests"), str(ROOT / "tests/dist")]  # made.batches, plain_sfpo

K, ALPHA, GROUP = 2, 0.8, 4
MODEL: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_size": 384,
    "intermediate_size": 512,
    "num_attention_heads": 6,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
    "vocab_size": 1003,
}


def write_model(folder: Path) -> None:
    """A Hugging Face directory with random bf16 weights."""
    shape = model_shape(MODEL)
    random = torch.Generator().manual_seed(0)
    specs = [
        TensorMeta(name=name, shape=size, dtype=torch.bfloat16)
        for rule in rules_of(shape)
        for name, size in zip(rule.hf, hf_shapes(rule, shape), strict=True)
    ]
    (folder / "config.json").write_text(json.dumps(MODEL))
    SafetensorsWriter(folder, specs, 1 << 40).write(
        (
            s.name,
            torch.ones(s.shape, dtype=s.dtype)
            if s.name.endswith("norm.weight")
            else (0.05 * torch.randn(s.shape, generator=random)).to(s.dtype),
        )
        for s in specs
    )


def run_config(
    folder: Path,
    impl: Literal["te", "local"],
    dtype: Any,
    optimizer: Mapping[str, Any] | None = None,
) -> RunConfig:
    """`optimizer`: of `megatron.optimizer`."""
    return RunConfig(
        megatron=MegatronConfig(optimizer=dict(optimizer or {})),
        output_dir=str(folder / "run"),
        model=ModelConfig(path=str(folder), dtype=dtype, transformer_impl=impl),
        data=DataConfig(train=(DataSource(source="jsonl", path="-"),)),
        train=TrainConfig(
            prompts_per_step=4,
            group_size=GROUP,
            minibatches_per_step=2,
            max_tokens_per_microbatch=128,
            logprob_chunk_tokens=64,
            optimizer=OptimizerSection(lr=1e-5),
        ),
        objective=ObjectiveConfig(entropy_coef=0.001),
        rollout=RolloutConfig(max_prompt_tokens=24, max_response_tokens=64),
    )


def batch(step: int) -> RolloutBatch:
    """Ragged rollouts with random tokens and rewards."""
    from made.batches import make_batch

    random = torch.Generator().manual_seed(step)
    num = 4 * GROUP
    prompts = torch.randint(3, 24, (num,), generator=random)
    responses = torch.randint(1, 64, (num,), generator=random)
    tokens = torch.randint(
        1, MODEL["vocab_size"], (int((prompts + responses).sum()),), generator=random
    )
    rewards = torch.randint(0, 2, (num,), generator=random).float()
    return make_batch(prompts, responses, tokens, group_size=GROUP, rewards=rewards)


@contextmanager
def alone(device: torch.device) -> Iterator[Path]:
    """The environment of a world of one process; a folder with the model."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    if device.type == "cpu":
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder))
        yield Path(folder)


def build(config: RunConfig) -> tuple[Policy, Capabilities]:
    """The policy of a world of one."""
    from sfpo_megatron.mcore.setup import LRSchedule, build_policy, init_distributed

    capabilities = init_distributed(config)
    lr = config.train.optimizer.lr
    schedule = LRSchedule(peak=lr, floor=0.0, warmup_ticks=0, total_ticks=9, style="constant")
    return build_policy(config, capabilities, schedule, model_path=config.model.path), capabilities
