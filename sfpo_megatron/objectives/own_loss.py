"""A user's own policy loss: `objective.loss: package.module:function`.

    from sfpo_megatron.objectives.surrogate import PolicyTokens

    def my_loss(tokens: PolicyTokens, config: ObjectiveConfig) -> Tensor:  # [T]
        return -tokens.ratio.clamp(max=2.0) * tokens.advantages

It gives one loss a token, differentiable; mask, aggregation, entropy bonus, KL and statistics are
applied to it as to the built-in ones.
"""

from __future__ import annotations

import importlib
import inspect

from sfpo_megatron.objectives.surrogate import LOSSES, PolicyLoss

_FORM = "def function(tokens: PolicyTokens, config: ObjectiveConfig) -> Tensor"


def policy_loss(name: str) -> PolicyLoss:
    """The built-in loss or the function of this name; ValueError says what is wrong with it."""
    if name in LOSSES:
        return LOSSES[name]
    module_name, _, function_name = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(
            f"objective.loss: found {name!r}, but {module_name} does not import ({error}); put its "
            "folder on PYTHONPATH or correct the name"
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ValueError(
            f"objective.loss: found no function {function_name!r} in {module_name} "
            f"({module.__file__}), expected {_FORM}; correct the name"
        )
    try:
        inspect.signature(function).bind("tokens", "config")
    except TypeError as error:
        raise ValueError(
            f"objective.loss: {name} cannot be called with (tokens, config) ({error}), expected "
            f"{_FORM}; change its parameters"
        ) from error
    return function  # type: ignore[no-any-return]
