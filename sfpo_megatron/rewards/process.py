"""A scoring process with the reward functions that it loads, or why it cannot have them."""

from __future__ import annotations

import json
from collections.abc import Sequence

from sfpo_megatron.config.reward import RewardConfig, WeightedReward
from sfpo_megatron.rewards import VerifierError, WrongReward
from sfpo_megatron.rewards.code import CHECKS_S
from sfpo_megatron.rewards.wire import Reply
from sfpo_megatron.sandbox.interpreter import START_S
from sfpo_megatron.sandbox.output import OutputLog
from sfpo_megatron.sandbox.process import CannotServe, DidNotStart, LimitedProcess, WrongFunction

SCRATCH = "sfpo-scoring-"
"""How the names of scratch directories begin."""
KEEPS_THE_LIMIT = {"code": 5 * START_S + 4 * CHECKS_S + 4.0}
"""Built-in functions that run programs, and end those themselves when reward.timeout_s is over ->
seconds that all else of them may take: interpreters are started and ended."""


def start_scoring(
    config: RewardConfig, functions: Sequence[WeightedReward], output: OutputLog
) -> LimitedProcess[Reply]:
    """A process that has loaded the functions; VerifierError if one cannot be."""
    named = [[one.name, one.batched] for one in functions]
    arguments = (config.thinking, str(config.timeout_s), json.dumps(named))
    try:
        return LimitedProcess(
            "sfpo_megatron.rewards.worker", arguments, scratch=SCRATCH, output=output
        )
    except DidNotStart as error:
        names = ", ".join(one.name for one in functions)
        raise VerifierError(f"reward.function {names}: its scoring process {error}") from error
    except WrongFunction as error:
        raise WrongReward(str(error)) from error
    except CannotServe as error:
        raise VerifierError(str(error)) from error
