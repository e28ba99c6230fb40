"""Stage `te`: training, logits and an optimizer that TransformerEngine alone has.

(a) SFPO steps equal those of the plain trainer of stage `training`, with TE's layers and Adam.
(b) The same with Megatron's precision-aware optimizer, whose main params are a bf16 param and the
    int16 by which it falls short (`store_param_remainders`); a reposition with alpha 0 afterwards
    puts back every bit.
(c) Logits of sequences, each alone and all in one pack, equal those of transformers in fp32. Left
    out where transformers is not.

On a CPU over tests/te_standin, by PYTHONPATH: torch classes with TE's names, not its kernels.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from benchmarks.device_stages import tiny, training
from sfpo_megatron.sfpo import SlowSnapshot

if TYPE_CHECKING:
    from sfpo_megatron.config.tree import RunConfig
    from sfpo_megatron.mcore.setup import Policy

LENGTHS = (5, 64, 1, 33, 17)
LOGITS_BOUND = 0.03
"""Share of the largest logit: several roundings to bf16, each 2**-9, in each of four layers."""


def run(device: torch.device) -> dict[str, Any]:
    return {
        **training.run(device, "te"),
        "remainders": training.run(
            device,
            "te",
            optimizer={"use_precision_aware_optimizer": True},
            then=puts_remainders_back,
        ),
        "logits": against_transformers(device),
    }


def puts_remainders_back(config: RunConfig, policy: Policy) -> dict[str, Any]:
    """(b): AssertionError if none are kept, or if a pass cannot be undone to the bit."""
    (member,) = policy.optimizer.chained_optimizers
    states = member.optimizer.state.items()
    kept = [state["master_param"] for p, state in states if p.dtype == torch.bfloat16]
    assert kept and all(t.dtype == torch.int16 for t in kept), "no remainders are kept"
    one_pass = training.one_pass_of(config, policy, 0)
    before = drawn(policy)
    snapshot = SlowSnapshot(policy.shards)
    snapshot.take()
    one_pass()
    assert not all(map(torch.equal, before, drawn(policy))), "the pass changed nothing"
    snapshot.reposition(0.0)
    assert all(map(torch.equal, before, drawn(policy))), "alpha 0 gave other bits"
    return {"params_with_remainders": sum(t.numel() for t in kept)}


def drawn(policy: Policy) -> list[Tensor]:
    """Copies of the main params, which are drawn one after another into one buffer."""
    return [tensor.clone() for tensor in policy.shards.tensors()]


def against_transformers(device: torch.device) -> dict[str, float] | str:
    """(c): the largest differences, as shares of the largest logit; or why there are none."""
    if find_spec("transformers") is None:
        return "left out: needs transformers"
    from sfpo_megatron.mcore import setup

    random = torch.Generator().manual_seed(0)
    rows = [
        torch.randint(0, tiny.MODEL["vocab_size"], (n,), generator=random).to(device)
        for n in LENGTHS
    ]
    with tiny.alone(device) as folder:
        expected = logits_of_transformers(folder, rows)  # before the CPU bridge is there
        policy, _ = tiny.build(tiny.run_config(folder, "te", "bfloat16"))
        alone = torch.cat([logits(policy, [row]) for row in rows])
        packed = logits(policy, rows)
        setup.shut_down()
    largest = expected.abs().max()
    figures = {
        "alone": float((alone - expected).abs().max() / largest),
        "packed": float((packed - expected).abs().max() / largest),
    }
    assert expected.std() > 0.5, "logits this flat would not show a fault"
    assert max(figures.values()) < LOGITS_BOUND, figures
    return figures


@torch.no_grad()
def logits(policy: Policy, rows: list[Tensor]) -> Tensor:
    """[T, V] fp32 of the rows in one pack."""
    from sfpo_megatron.mcore.model import unwrapped

    model = unwrapped(policy.chunks[0])
    tokens = torch.cat(rows)[None]
    positions = torch.cat([torch.arange(len(row), device=row.device) for row in rows])[None]
    packed = training.packed_params([len(row) for row in rows], tokens.device)
    return model(tokens, positions, None, packed_seq_params=packed)[0].float()[
        :, : tiny.MODEL["vocab_size"]
    ]


@torch.no_grad()
def logits_of_transformers(folder: Path, rows: list[Tensor]) -> Tensor:
    """The same of transformers, a row at a time, in fp32."""
    import transformers

    model = transformers.Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.to(rows[0].device)
    return torch.cat([model(row[None]).logits[0] for row in rows])
