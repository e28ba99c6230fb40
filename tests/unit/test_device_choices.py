"""What is chosen for a device, from what was found there: data, so that no GPU is needed.

Not exercised: what the choices save; TransformerEngine (tests/dist/test_te_spec.py has a stand-in).
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from made.configs import run_config

from sfpo_megatron.mcore.capabilities import Capabilities
from sfpo_megatron.mcore.device_choices import (
    fuse_weight_gradients,
    fuses_weight_gradients,
    groups_experts,
    pack_multiple,
    seqlen_bound,
)
from sfpo_megatron.rollout.vllm_arguments import sleep_arguments, usage_context


def found(*, cuda: bool, layers: Literal["te", "local"]) -> Capabilities:
    return Capabilities(
        cuda=cuda,
        transformer_engine="2.20.2" if layers == "te" else None,
        apex=False,
        layers=layers,
        adam="te" if layers == "te" else "torch",
    )


H100 = found(cuda=True, layers="te")
WITHOUT_TE = found(cuda=True, layers="local")
CPU = found(cuda=False, layers="local")


@pytest.mark.parametrize(
    ("capabilities", "longest", "bound"),
    [
        (H100, 1, 512), (H100, 512, 512), (H100, 513, 1024), (H100, 8191, 8192),
        (WITHOUT_TE, 513, 513), (CPU, 513, 513), (found(cuda=False, layers="te"), 7, 7),
    ],
)  # fmt: skip
def test_the_bound_of_lengths(capabilities: Capabilities, longest: int, bound: int) -> None:
    """A table of torch's own attention would grow with it: only TransformerEngine gets one."""
    assert seqlen_bound(longest, 8320, capabilities) == bound


@pytest.mark.parametrize(("longest", "num_tokens"), [(700, 1024), (1024, 1024), (400, 512)])
def test_the_bound_is_not_the_packs_length(longest: int, num_tokens: int) -> None:
    """Else Megatron would rotate the pack as one sequence."""
    bound = seqlen_bound(longest, num_tokens, H100)
    assert bound >= longest and bound != num_tokens


@pytest.mark.parametrize(("capabilities", "multiple"), [(H100, 128), (WITHOUT_TE, 128), (CPU, 1)])
def test_packs_are_whole_tiles_on_cuda(capabilities: Capabilities, multiple: int) -> None:
    assert pack_multiple(capabilities) == multiple


@pytest.mark.parametrize(
    ("given", "capabilities", "fused"),
    [
        ({}, H100, True),
        ({"gradient_accumulation_fusion": True}, H100, True),
        ({"gradient_accumulation_fusion": False}, H100, False),
        ({}, WITHOUT_TE, False),
        ({}, CPU, False),
    ],
)
def test_weight_gradients_are_fused_by_te(
    given: dict[str, Any], capabilities: Capabilities, fused: bool
) -> None:
    config = run_config(megatron={"transformer": given})
    assert fuses_weight_gradients(config, capabilities) == fused


def test_experts_are_grouped_by_te_on_cuda() -> None:
    found_there = [groups_experts(each) for each in (H100, WITHOUT_TE, CPU)]
    assert found_there == [True, False, False]


def test_other_layers_keep_their_gradients() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    model[0].fuse_wgrad_accumulation = False
    fuse_weight_gradients(model.modules())
    assert model[0].fuse_wgrad_accumulation is True
    assert not hasattr(model[1], "fuse_wgrad_accumulation")


@pytest.mark.parametrize(
    ("placement", "is_available", "sleeps"),
    [("colocated", True, True), ("colocated", False, False), ("dedicated", True, False)],
)
def test_graphs_leave_with_an_engine_that_sleeps(
    placement: str, is_available: bool, sleeps: bool
) -> None:
    config = run_config(rollout={"placement": placement})
    assert sleep_arguments(config, is_available) == {
        "enable_sleep_mode": sleeps,
        "sleep_mode_offload_cudagraph": sleeps,
    }


def test_an_engine_on_an_h100_runs_as_many_requests_as_vllm_has_it_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By vLLM's own table of defaults. On a CPU they stay those that AsyncLLM falls back to."""
    from vllm import platforms
    from vllm.engine import arg_utils

    on_cpu = usage_context()
    h100 = SimpleNamespace(
        get_device_total_memory=lambda: 80 * 2**30,
        get_device_name=lambda: "NVIDIA H100 80GB HBM3",
        is_tpu=lambda: False,
        is_cpu=lambda: False,
    )
    for module in (platforms, arg_utils):
        monkeypatch.setattr(module, "current_platform", h100)
    tokens, requests = arg_utils.EngineArgs.get_batch_defaults(1)
    on_gpu = usage_context()
    assert (requests[on_gpu], tokens[on_gpu]) == (1024, 16384)
    assert on_cpu not in requests and on_cpu not in tokens
