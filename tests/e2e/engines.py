"""What a running engine answers, held to transformers; and one inside this process, refitted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import fleet
import tiny
import torch
from torch import Tensor

from sfpo_megatron.resharding import transports
from sfpo_megatron.resharding.filling import make_filler
from sfpo_megatron.resharding.refit import Refit
from sfpo_megatron.resharding.shm_update import Lockstep
from sfpo_megatron.rollout.client import RolloutClient
from sfpo_megatron.types import Rollout


def refit(client: RolloutClient, model: Path, version: int, tmp_path: Path) -> None:
    """Send the whole of `model`'s weights."""
    sender = Refit(
        fleet.make_config(model, tmp_path),
        source=fleet.StateSource(tiny.load_state(model)),
        client=client.sync_client,
    )
    sent = sender.send(version)
    sender.close()
    assert sent == sum(t.nbytes for t in tiny.load_state(model).values())


def rollouts(client: RolloutClient, **changes: Any) -> list[Rollout]:
    """Rollouts of fleet.PROMPTS, greedy by default."""
    client.submit(fleet.make_request("refit", **changes))
    return client.collect("refit")


def assert_is_model(made: list[Rollout], model: Path, temperature: float = 1.0) -> None:
    """Every token is transformers' greedy choice, every logprob its log-softmax."""
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    for rollout in made:
        num_prompt = len(rollout.prompt_token_ids)
        ids = torch.tensor([rollout.prompt_token_ids + rollout.token_ids])
        with torch.no_grad():
            logits = reference(ids).logits[0, num_prompt - 1 : -1]
        expected = torch.log_softmax(logits.float() / temperature, -1)
        tokens = torch.tensor(rollout.token_ids)
        assert torch.equal(expected.argmax(-1), tokens)
        found = torch.tensor(rollout.generator_logprobs)
        assert (expected.gather(-1, tokens[:, None])[:, 0] - found).abs().max() < 1e-4


def greedy(llm: Any, num_samples: int = 1) -> list[tuple[tuple[int, ...], list[float]]]:
    """Tokens and logprobs of the in-process engine for the requests' prompts."""
    from vllm import SamplingParams

    parameters = SamplingParams(
        temperature=0.0, max_tokens=16, logprobs=0, detokenize=False, stop_token_ids=[tiny.EOS]
    )
    prompts = [{"prompt_token_ids": list(p.token_ids)} for p in fleet.PROMPTS]
    outputs = llm.generate(
        [p for p in prompts for _ in range(num_samples)], parameters, use_tqdm=False
    )
    return [
        (
            tuple(o.outputs[0].token_ids),
            [
                at[token].logprob
                for at, token in zip(o.outputs[0].logprobs, o.outputs[0].token_ids, strict=True)
            ],
        )
        for o in outputs
    ]


class LocalClient:
    """`seams.UpdateClient` over the in-process engine."""

    def __init__(self, llm: Any) -> None:
        self._llm = llm

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._llm.init_weight_transfer_engine({"init_info": init_info})

    def start_weight_update(self) -> None:
        self._llm.start_weight_update()

    def begin_bucket(self, update_info: dict[str, Any]) -> Callable[[], None]:
        self._llm.update_weights({"update_info": update_info})
        return lambda: None

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._llm.finish_weight_update(weight_version)


def connected(
    llm: Any,
    source: fleet.StateSource,
    folder: Path,
    *,
    bucket_bytes: int = 50_000,
    verify: bool = False,
) -> tuple[Lockstep, Any]:
    """What fills the buckets of a first update, and the transport that sends them to `llm`."""
    filler = Lockstep(make_filler(source), bucket_bytes)
    filler.restart(fresh=True, verify=verify)
    transport = transports.sender(
        "sfpo_shm",
        driver=filler,
        client=LocalClient(llm),
        fallback_dir=folder,
        timeout_s=60.0,
        workers_per_engine=1,
    )
    return filler, transport


def send(llm: Any, state: dict[str, Tensor], tmp_path: Path, *, verify: bool = False) -> None:
    _, transport = connected(llm, fleet.StateSource(state), tmp_path, verify=verify)
    transport.send_weights()
    transport.shutdown()
