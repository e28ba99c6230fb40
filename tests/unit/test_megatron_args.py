"""The arguments in a checkpoint for Megatron-LM: what it takes over is the model's."""

from __future__ import annotations

import pytest
from made.models import OF_EXPERTS, TINY

from sfpo_megatron.config.tree import ParallelConfig
from sfpo_megatron.families.known import SUPPORTED_ARCHITECTURES
from sfpo_megatron.families.megatron_args import megatron_lm_args
from sfpo_megatron.families.shape import model_shape


@pytest.mark.parametrize("architecture", SUPPORTED_ARCHITECTURES)
def test_no_dropout(architecture: str) -> None:
    """--use-checkpoint-args leaves the 0.1 of its command line where the checkpoint is silent."""
    of_experts = OF_EXPERTS.get(architecture, {})
    config = {**TINY, "tie_word_embeddings": False, "architectures": [architecture], **of_experts}
    arguments = megatron_lm_args(model_shape(config), ParallelConfig(), dtype="bfloat16")
    assert (arguments.attention_dropout, arguments.hidden_dropout) == (0.0, 0.0)
