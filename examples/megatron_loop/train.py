"""SFPO in a bare Megatron-Core loop: the lines that end in `# SFPO` are all that it takes.

    torchrun --nproc-per-node 2 examples/megatron_loop/train.py               # DP=2
    torchrun --nproc-per-node 2 examples/megatron_loop/train.py --tensor 2    # TP=2

A small GPT learns a noisy counting language from a fresh batch each step, on CPU or on GPU.
"""

import argparse
import os
from functools import partial

import torch
import torch.distributed as dist

if not torch.cuda.is_available():
    from sfpo_megatron.mcore.cpu import install

    install()  # answers Megatron's CUDA calls on the CPU; before any import of megatron

from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel as DDP
from megatron.core.distributed import DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import Float16Module

from sfpo_megatron import EntropyGate, SlowSnapshot, sfpo_step  # SFPO
from sfpo_megatron.mcore.shards import MainParamShards  # SFPO

VOCAB, LENGTH, ROWS = 64, 32, 8
MINIBATCHES, MICROBATCHES = 2, 2  # a batch is cut into them; one optimizer step a minibatch


def build(tensor, overlap):
    """(model, optimizer): bf16 params under Megatron's DDP and DistributedOptimizer."""
    config = TransformerConfig(
        num_layers=2, hidden_size=64, num_attention_heads=4, ffn_hidden_size=128,
        tensor_model_parallel_size=tensor, bf16=True, params_dtype=torch.bfloat16,
        attention_dropout=0.0, hidden_dropout=0.0, gradient_accumulation_fusion=False,
        use_cpu_initialization=True, finalize_model_grads_func=finalize_model_grads,
    )  # fmt: skip
    gpt = GPTModel(config, get_gpt_layer_local_spec(), VOCAB, LENGTH,
                   position_embedding_type="rope", parallel_output=False)  # fmt: skip
    ddp_config = DistributedDataParallelConfig(
        use_distributed_optimizer=True, grad_reduce_in_fp32=True,
        overlap_grad_reduce=overlap, overlap_param_gather=overlap,
    )  # fmt: skip
    model = DDP(config, ddp_config, Float16Module(config, gpt.cuda()))
    optimizer_config = OptimizerConfig(
        lr=2e-3, weight_decay=0.0, clip_grad=1.0, bf16=True, params_dtype=torch.bfloat16,
        use_distributed_optimizer=True, overlap_param_gather=overlap,
    )  # fmt: skip
    optimizer = get_megatron_optimizer(optimizer_config, [model])
    config.grad_scale_func = optimizer.scale_loss
    config.no_sync_func = model.no_sync if overlap else None
    return model, optimizer


def make_batch(step):
    """[MINIBATCHES, MICROBATCHES, ROWS, LENGTH + 1] tokens: next = 5 x + (3 or 4), mod VOCAB."""
    generator = torch.Generator().manual_seed(1000 * step + parallel_state.get_data_parallel_rank())
    shape = (MINIBATCHES, MICROBATCHES, ROWS, LENGTH + 1)
    tokens = torch.randint(0, VOCAB, shape, generator=generator)
    noise = torch.randint(3, 5, shape, generator=generator)
    for t in range(LENGTH):
        tokens[..., t + 1] = (5 * tokens[..., t] + noise[..., t]) % VOCAB
    return tokens.cuda()


def forward_step(microbatches, model):
    """Logits of the next microbatch, and what makes (loss, [loss, entropy] to report) of them."""
    tokens = next(microbatches)
    positions = torch.arange(LENGTH, device=tokens.device).expand(ROWS, LENGTH)

    def loss_func(logits):  # [ROWS, LENGTH, VOCAB]
        logprobs = logits.log_softmax(-1)
        loss = -logprobs.gather(-1, tokens[:, 1:, None]).mean()
        entropy = -(logprobs.exp() * logprobs).sum(-1).mean()
        return loss, torch.stack([loss, entropy]).detach()

    return model(tokens[:, :-1], positions, None), loss_func


def one_pass(model, optimizer, batch, train=True):
    """One optimizer step a minibatch; returns the mean [loss, entropy] of all ranks."""
    stats = []
    for minibatch in batch:
        model.zero_grad_buffer()
        optimizer.zero_grad()
        stats += get_forward_backward_func()(
            forward_step_func=forward_step, data_iterator=iter(minibatch), model=model,
            num_microbatches=MICROBATCHES, seq_length=LENGTH, micro_batch_size=ROWS,
            forward_only=not train,
        )  # fmt: skip
        if train:
            optimizer.step()
    mean = torch.stack(stats).mean(0) / dist.get_world_size()
    dist.all_reduce(mean)
    return mean


def main(arguments=None):
    parser = argparse.ArgumentParser()
    parser.add_argument("--tensor", type=int, default=1, help="tensor parallel ranks; rest is data")
    parser.add_argument("--overlap", action="store_true", help="overlap gradient and param comms")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--num-fast-passes", type=int, default=3)
    parser.add_argument("--alpha", type=float, default=0.8)
    args = parser.parse_args(arguments)

    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=args.tensor)
    tensor_parallel.model_parallel_cuda_manual_seed(0)
    torch.manual_seed(0)
    model, optimizer = build(args.tensor, args.overlap)

    shards = MainParamShards(optimizer)  # SFPO  this rank's fp32 main params, not copies
    snapshot = SlowSnapshot(shards)  # SFPO  one preallocated copy of them
    gate = EntropyGate(window=10)  # SFPO
    for step in range(1, args.steps + 1):
        run_pass = partial(one_pass, model, optimizer, make_batch(step))
        # without SFPO: results = [run_pass()]
        num_fast = args.num_fast_passes if gate.is_open(step) else 0  # SFPO
        results = sfpo_step(run_pass, snapshot, num_fast_passes=num_fast, alpha=args.alpha)  # SFPO
        dist.broadcast(results[-1], src=0)  # SFPO  so that every rank decides alike
        gate.observe(results[-1][1].item())  # SFPO  entropy of the slow correction
        if dist.get_rank() == 0:
            (unseen, _), (loss, entropy) = results[0].tolist(), results[-1].tolist()
            print(f"step {step:2d}: {len(results)} passes, loss {unseen:.3f} -> {loss:.3f}, "
                  f"entropy {entropy:.3f}", flush=True)  # fmt: skip
    shards.params_ready()  # SFPO  with --overlap the last gather is due; before eval, save, refit
    loss, _ = one_pass(model, optimizer, make_batch(0), train=False).tolist()
    if dist.get_rank() == 0:
        print(f"held-out loss {loss:.4f}")
    return model


if __name__ == "__main__":
    main()
    dist.destroy_process_group()
