"""The meeting point of one machine's ranks: a store that listens on the loopback interface only.

torchrun's own backends make a TCPStore that listens on every interface, and anyone who reaches it
can write into it. It takes a socket that is already bound, so we bind one.
"""

from __future__ import annotations

import os
import socket

from torch.distributed import TCPStore
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)

BACKEND = "sfpo-loopback"
_ADDRESS = "127.0.0.1"


class LoopbackRendezvous(RendezvousHandler):
    """One node, one round: this agent is rank 0 of 1 and its workers use its store."""

    def __init__(self, run_id: str) -> None:
        self._run_id = run_id
        listener = socket.create_server((_ADDRESS, 0))
        self._port = listener.getsockname()[1]
        self._store = TCPStore(
            _ADDRESS,
            self._port,
            is_master=True,
            wait_for_workers=False,
            # libuv closes the descriptor that it is given; Python must not close it as well.
            master_listen_fd=os.dup(listener.fileno()),
        )
        listener.close()

    @property
    def use_agent_store(self) -> bool:
        return True

    def get_backend(self) -> str:
        return BACKEND

    def next_rendezvous(self) -> RendezvousInfo:
        return RendezvousInfo(self._store, 0, 1, RendezvousStoreInfo(_ADDRESS, self._port))

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        """Nobody else could join: there is nothing to close."""

    def num_nodes_waiting(self) -> int:
        return 0

    def get_run_id(self) -> str:
        return self._run_id

    def shutdown(self) -> bool:
        return True


def register() -> None:
    """Make `rdzv_backend=BACKEND` known to torchrun."""

    def create(parameters: RendezvousParameters) -> RendezvousHandler:
        return LoopbackRendezvous(parameters.run_id)

    rendezvous_handler_registry.register(BACKEND, create)
