"""What a case works with on its rank: policies, batches, and weights gathered independently."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import references
import torch
import torch.distributed as dist
from harness import Layout
from made.batches import make_batch
from made.bits import same_bits
from safetensors.torch import load_file, save_file
from torch import Tensor

from sfpo_megatron.batching import build_minibatches
from sfpo_megatron.config.tree import (
    DataConfig,
    DataSource,
    MegatronConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerSection,
    ParallelConfig,
    RolloutConfig,
    RunConfig,
    SFPOConfig,
    TrainConfig,
)
from sfpo_megatron.mcore import setup
from sfpo_megatron.objectives.advantage import grpo, in_loss
from sfpo_megatron.objectives.objective import PolicyObjective
from sfpo_megatron.types import Microbatch, Minibatch


class Workbench:
    """Megatron's parallel state is set up as `layout` says; `policy()` may be called repeatedly."""

    def __init__(self, layout: Layout, directory: Path) -> None:
        self.layout = layout
        self.directory = directory
        self.rank = dist.get_rank()
        self._configs: dict[int, RunConfig] = {}
        self.figures: dict[str, float] = {}  # what the running case measured
        model = references.TRAINED_MOE if layout.expert > 1 else "qwen2_tied"
        self.capabilities = setup.init_distributed(self.config(model))

    def config(
        self,
        model: str,
        *,
        dtype: str = "float32",
        lr: float = references.LR,
        temperature: float = 1.0,
        transformer: dict[str, Any] | None = None,
        ddp: dict[str, Any] | None = None,
        optimizer: dict[str, Any] | None = None,
        objective: ObjectiveConfig | None = None,
        minibatches: int = references.MINIBATCHES,
        max_tokens: int = 40,  # several microbatches a minibatch
        eps: float = references.EPS,
    ) -> RunConfig:
        layout = self.layout
        return RunConfig(
            output_dir=str(self.directory / "run"),
            model=ModelConfig(
                path=str(self.directory / model),
                dtype=dtype,
                transformer_impl="te" if layout.te else "local",
            ),
            parallel=ParallelConfig(
                data=layout.data,
                tensor=layout.tensor,
                pipeline=layout.pipeline,
                virtual_pipeline=layout.virtual,
                sequence=layout.sequence,
                context=layout.context,
                expert=layout.expert,
                expert_tensor=layout.expert_tensor,
            ),
            megatron=MegatronConfig(
                transformer=transformer or {}, ddp=ddp or {}, optimizer=optimizer or {}
            ),
            train=TrainConfig(
                prompts_per_step=references.NUM_PROMPTS,
                group_size=references.GROUP_SIZE,
                minibatches_per_step=minibatches,
                max_tokens_per_microbatch=max_tokens,
                logprob_chunk_tokens=16,  # several chunks a microbatch
                control_timeout_s=60.0,
                optimizer=OptimizerSection(
                    lr=lr,
                    weight_decay=references.WEIGHT_DECAY,
                    clip_grad=references.CLIP_GRAD,
                    eps=eps,
                ),
            ),
            sfpo=SFPOConfig(num_fast_passes=references.K, alpha=references.ALPHA),
            objective=objective or ObjectiveConfig(),
            rollout=RolloutConfig(temperature=temperature),
            data=DataConfig(train=(DataSource(source="reasoning_gym", task="chain_sum", size=4),)),
        )

    def policy(self, model: str = "qwen2_tied", **settings: Any) -> setup.Policy:
        config = self.config(model, **settings)
        lr = config.train.optimizer.lr
        schedule = setup.LRSchedule(
            peak=lr, floor=0.0, warmup_ticks=0, total_ticks=10, style="constant"
        )
        policy = setup.build_policy(
            config, self.capabilities, schedule, model_path=config.model.path
        )
        self._configs[id(policy)] = config  # by id, so that it keeps no policy alive
        return policy

    def config_of(self, policy: setup.Policy) -> RunConfig:
        """The config that `policy` was built from."""
        return self._configs[id(policy)]

    def temperature(self, policy: setup.Policy) -> float:
        """The temperature of its rollouts."""
        return self.config_of(policy).rollout.temperature

    def minibatches(self, policy: setup.Policy, step: int = 0) -> list[Minibatch]:
        """This rank's part of saved batch `step`, cut as the trainer does; no old_logprobs yet."""
        from sfpo_megatron.mcore.batches import batch_layout

        saved = references.load_batch(self.directory, step)
        batch = make_batch(
            group_size=references.GROUP_SIZE,
            finished=saved["response_lengths"] < 11,  # the longest are as if cut
            weight_version=step,
            **saved,
        )
        config = self.config_of(policy)
        train = config.train
        minibatches = build_minibatches(
            batch,
            grpo(batch.rewards, batch.group_size, ObjectiveConfig()),
            in_loss=in_loss(batch, config.objective),
            # Over four ranks a minibatch has two rollouts a rank: one each.
            layout=dataclasses.replace(
                batch_layout(config, policy, train.minibatches_per_step),
                microbatch_size=1 if policy.layout.data_size == 4 else None,
            ),
        )
        few = min(len(m.microbatches) for m in minibatches) < 2
        assert not few or train.max_tokens_per_microbatch > 40, "the case is too small to bite"
        return minibatches

    def prepared(self, policy: setup.Policy, step: int = 0) -> list[Minibatch]:
        """`minibatches` with old_logprobs of the current weights."""
        from sfpo_megatron.mcore.passes import compute_logprobs, set_old_logprobs

        minibatches = self.minibatches(policy, step)
        old = compute_logprobs(policy, minibatches, temperature=self.temperature(policy))
        set_old_logprobs(minibatches, old)
        return minibatches

    def one_pass(self, policy: setup.Policy, minibatches: list[Minibatch]) -> Any:
        """`run_pass` bound to its arguments, as the trainer hands it to sfpo_step."""
        from sfpo_megatron.mcore.passes import run_pass

        objective = PolicyObjective.of(self.config_of(policy))
        return partial(run_pass, policy, minibatches, objective)

    def logits(self, policy: setup.Policy, microbatch: Microbatch) -> Tensor | None:
        """[T, padded V] fp32 on the last pipeline stage, None elsewhere. Collective."""
        from megatron.core import parallel_state

        from sfpo_megatron.mcore import passes

        def head(policy: setup.Policy, logits: Tensor, microbatch: Microbatch) -> Tensor:
            parts = [torch.empty_like(logits) for _ in range(policy.layout.tensor_size)]
            group = parallel_state.get_tensor_model_parallel_group()
            dist.all_gather(parts, logits.contiguous(), group=group)
            return torch.cat(parts, dim=1).float()

        policy.shards.params_ready()
        # The interleaved schedule wants a multiple of the pipeline size.
        copies = policy.layout.pipeline_size if len(policy.chunks) > 1 else 1
        minibatch = Minibatch(
            microbatches=(microbatch,) * copies,
            global_valid_tokens=1,
            global_num_sequences=1,
            global_tokens=1,
            global_padded_tokens=1,
        )
        with torch.no_grad():
            found = passes._schedule(policy, minibatch, head, forward_only=True)
        return found[0] if found else None

    def hf_weights(self, policy: setup.Policy) -> dict[str, Tensor]:
        """Full Hugging Face tensors on every rank, not by way of resharding. Collective."""
        policy.shards.params_ready()
        return self.hf_tensors(policy, lambda param: param.data)

    def hf_gradients(self, policy: setup.Policy) -> dict[str, Tensor]:
        """The same of the main grads that a forward-backward left. Collective."""
        from megatron.core import parallel_state

        everyone = parallel_state.get_data_parallel_group(with_context_parallel=True)
        experts = parallel_state.get_expert_data_parallel_group()
        for chunk in policy.chunks:
            if not chunk.ddp_config.use_distributed_optimizer:
                continue
            pairs = [(g, everyone) for g in chunk.bucket_groups]
            pairs += [(g, experts) for g in chunk.expert_parallel_bucket_groups]
            for bucket, group in ((b, group) for g, group in pairs for b in g.buckets):
                # The reduce-scatter left each rank its own part: put the parts together again.
                parts = list(bucket.grad_data.chunk(group.size()))
                dist.all_gather(parts, parts[group.rank()].clone(), group=group)
        return self.hf_tensors(policy, lambda param: param.main_grad, of_frozen=False)

    def hf_tensors(
        self, policy: setup.Policy, value: Callable[[Any], Tensor], *, of_frozen: bool = True
    ) -> dict[str, Tensor]:
        """Full Hugging Face tensors of what `value` has of each param. Collective."""
        from megatron.core import parallel_state

        from sfpo_megatron.families.operations import join, split
        from sfpo_megatron.families.table import rule_by_name
        from sfpo_megatron.mcore.model import named_params

        groups = {
            False: parallel_state.get_tensor_model_parallel_group(),
            True: parallel_state.get_expert_tensor_parallel_group(),
        }
        table = rule_by_name(policy.shape)
        mine: dict[str, Tensor] = {}
        for name, param in named_params(policy.chunks):
            rule = table[name]
            if rule.frozen and not of_frozen:
                continue
            tensor = value(param)
            shards = [torch.empty_like(tensor) for _ in range(groups[rule.expert].size())]
            dist.all_gather(shards, tensor.contiguous(), group=groups[rule.expert])
            if rule.tp_dim is None:
                same = all(same_bits(shard, shards[0]) for shard in shards)
                assert same, f"{name} differs over TP"
            parts = split(rule, join(rule, shards), policy.shape)
            mine.update(zip(rule.hf, (p.clone().contiguous() for p in parts), strict=True))
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
        whole: dict[str, Tensor] = {}
        for part in everyone:
            for name, tensor in part.items():
                # data-parallel ranks (experts: expert-data-parallel ones) and, with tied
                # embeddings, the first and last stage
                assert name not in whole or same_bits(whole[name], tensor), f"{name}: copies differ"
                whole[name] = tensor
        return whole

    def save(self, name: str, losses: Any, weights: dict[str, Tensor]) -> None:
        if self.rank == 0:
            save_file(weights, self.directory / f"{name}.safetensors")
            (self.directory / f"{name}.json").write_text(json.dumps(losses))

    def load(self, name: str) -> tuple[Any, dict[str, Tensor]]:
        losses = json.loads((self.directory / f"{name}.json").read_text())
        return losses, load_file(self.directory / f"{name}.safetensors")
