"""A tokenizer and a model that do not fit are named by `check`, which reads JSON only.

Not exercised: an embedding with other rows than vocab_size (the weight files' own tests).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sfpo_megatron.config.rules.model import Problem, read_model
from sfpo_megatron.config.rules.tokenizer import tokenizer_fits
from sfpo_megatron.config.tree import RunConfig
from sfpo_megatron.families.shape import ModelShape

from .configs import config  # noqa: TID252
