"""Prompts with a resumable cursor, and examples for a warm start, from the sources of a config."""

from sfpo_megatron.data.errors import DataError
from sfpo_megatron.data.prompts import PromptStream, eval_prompts
from sfpo_megatron.data.sft import SFTExample, SFTExamples

__all__ = ["DataError", "PromptStream", "SFTExample", "SFTExamples", "eval_prompts"]
