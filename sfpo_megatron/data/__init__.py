"""Prompts with a resumable cursor, from reasoning-gym generators and jsonl files."""

from sfpo_megatron.data.errors import DataError
from sfpo_megatron.data.prompts import PromptStream, eval_prompts
from sfpo_megatron.data.sft import SFTExample, SFTExamples

__all__ = ["DataError", "PromptStream", "SFTExample", "SFTExamples", "eval_prompts"]
