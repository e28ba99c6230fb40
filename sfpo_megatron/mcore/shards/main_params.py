"""`MainParams`: what SFPO needs of one kind of optimizer that Megatron builds; one file a kind.

A kind says where its fp32 main params are, how an edit reaches the model params, and what of it a
checkpoint holds.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor

from sfpo_megatron.mcore.gathered_states import gathered_states
from sfpo_megatron.mcore.shards import steppers


class MainParams(ABC):
    """The binding of one optimizer (a member of a ChainedOptimizer)."""

    @classmethod
    @abstractmethod
    def fits(cls, optimizer: MegatronOptimizer) -> bool:
        """Whether `optimizer` is of this kind."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer

    @abstractmethod
    def tensors(self) -> Iterator[Tensor]:
        """fp32 main params of this rank; edits before the next is drawn count."""

    @abstractmethod
    def owners(self) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        """(model param, param group) of each of `tensors()`, in their order."""

    @abstractmethod
    def copy_to_model(self) -> None:
        """Main params into this rank's part of the model params. No communication."""

    def take_from_model(self) -> None:
        """Model params, which have been loaded, into the main params. No communication."""
        self._optimizer.reload_model_params()

    @abstractmethod
    def saved(self) -> AbstractContextManager[None]:
        """Inside, Megatron saves and loads fp32 main params and moments, nothing else of a param;
        `make_states` has made what was not there."""

    def make_states(self) -> None:
        """Make the state that the first step would make, where it has not been taken."""
        steppers.make_states(self._optimizer.optimizer)

    def after_load(self) -> None:
        """Give each param a step count of its own: Megatron loads ONE tensor for all, which the
        next Adam step counts up once a param, and the bias correction is silently wrong."""
        steppers.unshare_step_counts(self._optimizer.optimizer)


class ShardedMainParams(MainParams):
    """A DistributedOptimizer's: it asks itself, param by param, for what it saves and loads."""

    @abstractmethod
    def state_of(self, model_param: Tensor) -> dict[str, Tensor]:
        """fp32 `param` and moments of this rank's shard of `model_param`, for a checkpoint."""

    @abstractmethod
    def put_state(self, model_param: Tensor, tensors: dict[str, Tensor]) -> None:
        """Inverse of `state_of`, in place."""

    @contextmanager
    def saved(self) -> Iterator[None]:
        """It answers itself with `state_of` and `put_state`."""
        member = self._optimizer
        keys = ("param", *self._moments())
        member._get_main_param_and_optimizer_states = self.state_of
        member._set_main_param_and_optimizer_states = self.put_state
        member.get_parameter_state_dp_zero = partial(gathered_states, member, self.state_of, keys)
        try:
            yield
        finally:
            del member._get_main_param_and_optimizer_states
            del member._set_main_param_and_optimizer_states
            del member.get_parameter_state_dp_zero

    def _stepped(self, model_param: Tensor) -> Tensor:
        """What the optimizer holds of this rank's shard of `model_param`."""
        group, index = self._optimizer.model_param_group_index_map[model_param]
        shard: Tensor = self._optimizer.optimizer.param_groups[group]["params"][index]
        return shard

    def _owner_of(self) -> dict[int, tuple[Tensor, dict[str, Any]]]:
        """(model param, param group) by the id of what the optimizer steps."""
        groups = self._optimizer.optimizer.param_groups
        return {
            id(groups[group]["params"][index]): (model_param, groups[group])
            for model_param, (group, index) in self._optimizer.model_param_group_index_map.items()
        }

    def _moments(self) -> tuple[str, ...]:
        return steppers.moment_names(self._optimizer.optimizer)
