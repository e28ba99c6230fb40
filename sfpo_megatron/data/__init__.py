"""Prompts with a resumable cursor, from reasoning-gym generators and jsonl files."""

from sfpo_megatron.data.errors import DataError
from sfpo_megatron.data.prompts import PromptStream, eval_prompts
from sfpo_megatron.data.sft import SFTExample, sft_examples

__all__ = ["DataError", "PromptStream", "SFTExample", "eval_prompts", "sft_examples"]
