"""What one trainer rank does in a refit: send alone, follow the one that sends, or send with all.

vLLM's ipc and nccl_m2n have an end on every rank; with all other transports rank 0 sends alone and
the other ranks follow.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from sfpo_megatron.resharding.meeting import StockEnds
from sfpo_megatron.resharding.seams import Control, Driver, EngineClient, SendingEnd
from sfpo_megatron.resharding.source_pass import IntroductionFailed


class Part(Protocol):
    """One rank's part in refits."""

    def needs_new_end(self) -> bool:
        """Whether the next update needs a sending end that the engines do not know yet; the answer
        counts on the sender."""

    def send(self, weight_version: str, *, fresh: bool) -> int:
        """Take part in one update; the bytes sent (0 unless this is the sender). `fresh`: the
        sender needs a new end. Collective."""

    def close(self) -> None:
        """Give back what the sending end holds."""


class Follower:
    """A rank beside the sender: it fills, gathers and broadcasts as the driver says."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver

    def needs_new_end(self) -> bool:
        """The sender alone knows."""
        return False

    def send(self, weight_version: str, *, fresh: bool) -> int:
        """Take part to the end. Collective."""
        self._driver.follow()
        return 0

    def close(self) -> None:
        """There is nothing to give back."""


class _End:
    """The sending end of a rank, which is there from the first update on."""

    def __init__(self) -> None:
        self._end: SendingEnd | None = None

    def _needs_new_end(self, client: EngineClient) -> bool:
        lost = self._end is not None and self._end.lost
        if client.needs_introduction() or lost:
            self.close()  # what the others know is unlinked: engines that are new need a new one
        return self._end is None

    def close(self) -> None:
        """Give back what the sending end holds."""
        if self._end is not None:
            self._end.shutdown()
            self._end = None


class Sender(_End):
    """The one rank that sends. If it fails, it still takes its part in the driver to the end and
    then raises, so that no other rank hangs there."""

    def __init__(
        self, driver: Driver, client: EngineClient, connect: Callable[[], SendingEnd]
    ) -> None:
        """`connect()` makes a sending end that the engines know; IntroductionFailed where they were
        lost meanwhile."""
        super().__init__()
        self._driver, self._client, self._connect = driver, client, connect

    def needs_new_end(self) -> bool:
        """Whether some engine does not know the end, or it is lost."""
        return self._needs_new_end(self._client)

    def send(self, weight_version: str, *, fresh: bool) -> int:
        """Send one update. Collective."""
        try:
            if self._end is None:
                self._end = self._connect()
            return self._end.send_weights(weight_version)
        except IntroductionFailed as error:
            failed = error
        except Exception:
            self._driver.follow()
            raise
        self._client.skip_update(failed.reason)
        self._driver.follow()
        return 0


class EveryRank(_End):
    """A rank of a transport that has an end on all of them: all have one, or none."""

    def __init__(self, ends: StockEnds, control: Control, client: EngineClient | None) -> None:
        """`client`: None but on the sender."""
        super().__init__()
        self._ends, self._control, self._client = ends, control, client
        self._failure: IntroductionFailed | None = None

    def needs_new_end(self) -> bool:
        """Whether some engine does not know the ends, or they are lost; False but on the sender."""
        return self._client is not None and self._needs_new_end(self._client)

    def send(self, weight_version: str, *, fresh: bool) -> int:
        """Send this rank's share of one update. Collective."""
        if fresh:
            self._meet()
        if self._end is None:
            if self._client is not None:
                self._client.skip_update(self._failure.reason if self._failure else None)
            return 0
        num_bytes = self._end.send_weights(weight_version)
        self._end.lost = self._any(self._end.lost)
        return num_bytes if self._client is not None else 0

    def _meet(self) -> None:
        """Make an end on every rank, or on none. Collective."""
        self.close()
        own = self._ends.place(self._client) if self._client is not None else None
        place = self._control.broadcast_json(own)
        self._failure = None
        raised: Exception | None = None
        try:
            self._end = self._ends.meet(place, self._client)
        except IntroductionFailed as error:
            self._failure = error
        except Exception as error:  # all ranks hear of it before this one raises
            raised = error
        if self._any(self._end is None):
            self.close()
        if raised is not None:
            raise raised

    def _any(self, mine: bool) -> bool:
        return bool(self._control.max(torch.tensor([float(mine)])).item())
