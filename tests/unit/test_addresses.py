"""Which of a host's addresses others are told. Not exercised: several networks on one host."""

from __future__ import annotations

import socket

import pytest

from sfpo_megatron.host import addresses
from sfpo_megatron.host.addresses import is_loopback, own_address

HOSTS = {
    "10.1.0.1": "10.1.0.7",
    "head": "10.1.0.7",
    "ray-head": "10.2.0.7",
    "this-host": "127.0.0.1",  # as Debian's /etc/hosts has it: 127.0.1.1
    "127.0.0.1": "127.0.0.1",
    "localhost": "127.0.0.1",
    addresses._ELSEWHERE: "172.16.0.7",
}
INTERFACES = {"lo": "127.0.0.1", "eth0": "172.16.0.7", "ib0": "10.1.0.7", "ib1": None}


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host with an Ethernet and an InfiniBand interface."""
    monkeypatch.setattr(addresses, "_towards", HOSTS.get)
    monkeypatch.setattr(addresses, "_address_of", INTERFACES.get)
    monkeypatch.setattr(socket, "if_nameindex", lambda: list(enumerate(INTERFACES)))


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"GLOO_SOCKET_IFNAME": "ib0", "MASTER_ADDR": "127.0.0.1"}, "10.1.0.7"),
        ({"GLOO_SOCKET_IFNAME": "lo", "MASTER_ADDR": "10.1.0.1"}, "127.0.0.1"),
        ({"NCCL_SOCKET_IFNAME": "ib,eth"}, "10.1.0.7"),
        ({"NCCL_SOCKET_IFNAME": "=eth0"}, "172.16.0.7"),
        ({"NCCL_SOCKET_IFNAME": "=eth", "MASTER_ADDR": "head"}, "10.1.0.7"),
        ({"NCCL_SOCKET_IFNAME": "^eth0", "MASTER_ADDR": "head"}, "10.1.0.7"),
        ({"NCCL_SOCKET_IFNAME": "ib1", "MASTER_ADDR": "head"}, "10.1.0.7"),
        ({"GLOO_SOCKET_IFNAME": "eth0", "NCCL_SOCKET_IFNAME": "ib0"}, "172.16.0.7"),
        ({"MASTER_ADDR": "10.1.0.1"}, "10.1.0.7"),
        ({"MASTER_ADDR": "127.0.0.1"}, "127.0.0.1"),
        ({"MASTER_ADDR": "localhost"}, "127.0.0.1"),
        ({"MASTER_ADDR": "127.0.0.1", "RAY_ADDRESS": "ray-head:6379"}, "10.2.0.7"),
        ({"RAY_ADDRESS": "127.0.0.1:6379"}, "127.0.0.1"),
        ({"RAY_ADDRESS": "ray-head:6379"}, "10.2.0.7"),
        ({"MASTER_ADDR": "this-host"}, "172.16.0.7"),  # others do not mean loopback by that name
        ({"MASTER_ADDR": "unheard-of"}, "172.16.0.7"),
        ({}, "172.16.0.7"),
    ],
)
def test_the_address_that_others_reach(host: None, environ: dict[str, str], expected: str) -> None:
    assert own_address(environ) == expected


def test_the_peer_comes_first(host: None) -> None:
    assert own_address({"MASTER_ADDR": "ray-head"}, peer="head") == "10.1.0.7"


def test_loopback_where_there_is_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(addresses, "_towards", lambda host: None)
    assert own_address({}) == "127.0.0.1"


def test_this_machine() -> None:
    """The real probes."""
    assert own_address({"GLOO_SOCKET_IFNAME": "lo"}) == "127.0.0.1"
    assert own_address({"MASTER_ADDR": "127.0.0.1"}) == "127.0.0.1"
    assert addresses._towards("127.0.0.1") == "127.0.0.1"
    assert addresses._towards("no.such.host.invalid") is None
    for _, name in socket.if_nameindex():
        address = addresses._address_of(name)
        if address is not None and not is_loopback(address):
            assert own_address({"NCCL_SOCKET_IFNAME": f"={name}"}) == address
            socket.create_server((address, 0)).close()  # it is ours: one can listen there
