"""Which of a host's addresses others are told. Not exercised: several networks on one host."""

from __future__ import annotations

import socket

import pytest
from made.configs import run_config

from sfpo_megatron.host import addresses
from sfpo_megatron.host.addresses import (
    choose_gloo_interface,
    gloo_fault,
    is_loopback,
    leaves_machine,
    own_address,
)

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


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, False),
        ({"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}, False),
        ({"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}, True),
        ({"RAY_ADDRESS": "10.1.0.1:6379"}, True),
        ({"RAY_ADDRESS": "ray-head:6379"}, True),
        ({"RAY_ADDRESS": "127.0.0.1:6379"}, False),
        ({"RAY_ADDRESS": "localhost:6379"}, False),
        ({"RAY_ADDRESS": "auto"}, False),
    ],
)
def test_runs_with_ranks_or_engines_elsewhere(environ: dict[str, str], expected: bool) -> None:
    assert leaves_machine(environ) == expected


@pytest.mark.parametrize(
    ("environ", "peer", "expected"),
    [
        # An engine worker, which has none of the run's variables, is told the trainer's address.
        ({}, "10.1.0.1", "ib0"),
        ({}, "ray-head", None),  # by an address that no interface has for its first
        ({}, "127.0.0.1", "lo"),
        ({"GLOO_SOCKET_IFNAME": "eth0"}, "10.1.0.1", "eth0"),
        # Ranks of one machine, engines on others.
        ({"RAY_ADDRESS": "head:6379", "MASTER_ADDR": "127.0.0.1"}, None, "ib0"),
    ],
)
def test_refits_between_machines_have_an_interface_on_both_sides(
    host: None, environ: dict[str, str], peer: str | None, expected: str | None
) -> None:
    found = dict(environ)
    choose_gloo_interface(found, peer=peer)
    assert found.get("GLOO_SOCKET_IFNAME") == expected


TWO_NODES = {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        (TWO_NODES | {"MASTER_ADDR": "head"}, "ib0"),
        (TWO_NODES | {"MASTER_ADDR": "this-host"}, "eth0"),  # on rank 0's own node
        (TWO_NODES | {"MASTER_ADDR": "unheard-of"}, "eth0"),
        (TWO_NODES | {"MASTER_ADDR": "this-host", "NCCL_SOCKET_IFNAME": "ib"}, "ib0"),
        (TWO_NODES | {"MASTER_ADDR": "head", "GLOO_SOCKET_IFNAME": "eth0"}, "eth0"),
        (TWO_NODES | {"MASTER_ADDR": "head", "GLOO_SOCKET_IFNAME": ""}, "ib0"),
        (TWO_NODES | {"MASTER_ADDR": "127.0.0.1"}, None),  # several nodes on one host: the lab's
        ({"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "head"}, None),
        ({"WORLD_SIZE": "1", "MASTER_ADDR": "head"}, None),
    ],
)
def test_gloo_gets_the_interface_of_our_own_address(
    host: None, environ: dict[str, str], expected: str | None
) -> None:
    """By itself it would take what the host's name resolves to: 127.0.1.1 on many systems."""
    found = dict(environ)
    choose_gloo_interface(found)
    assert found.get("GLOO_SOCKET_IFNAME") == expected


def test_it_is_chosen_before_any_group_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """gloo reads the variable when it makes its first device, for every group of the process."""
    from sfpo_megatron.mcore import setup

    class Chosen(Exception):
        pass

    def choose() -> None:
        raise Chosen

    monkeypatch.setattr(setup, "choose_gloo_interface", choose)
    monkeypatch.setattr(setup, "probe", lambda implementation: pytest.fail("too late"))
    with pytest.raises(Chosen):
        setup.init_distributed(run_config())


def test_an_interface_without_a_name_is_left_to_gloo(
    host: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(addresses, "_address_of", lambda name: None)  # a second address of its own
    environ = TWO_NODES | {"MASTER_ADDR": "head"}
    choose_gloo_interface(environ)
    assert "GLOO_SOCKET_IFNAME" not in environ


@pytest.mark.parametrize(
    ("wish", "named"), [("ib7", "ib7"), ("lo,ib7", "ib7"), ("=lo", "=lo"), ("^lo", "^lo")]
)
def test_what_gloo_cannot_bind_to_is_said(wish: str, named: str) -> None:
    """Lists as NCCL reads them among it. The real interfaces of this machine."""
    fault = gloo_fault({"GLOO_SOCKET_IFNAME": wish})
    assert (
        fault is not None and f"found no interface {named}," in fault and "expected some" in fault
    )


def test_an_address_that_is_not_ours_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert gloo_fault({"GLOO_SOCKET_IFNAME": "lo"}) is None
    monkeypatch.setattr(addresses, "own_address", lambda environ, peer: "192.0.2.7")
    fault = gloo_fault({})
    assert fault is not None and "nothing can listen on 192.0.2.7" in fault


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


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost", "a.localhost"])
def test_loopback_is_known(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["10.0.0.1", "127.example.org", "localhost.example.org", ""])
def test_other_hosts_are_no_loopback(host: str) -> None:
    assert not is_loopback(host)
