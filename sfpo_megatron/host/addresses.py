"""The address by which other processes of the run reach this host. Standard library only.

A host's own name will not do: many systems write it into /etc/hosts as 127.0.1.1.
"""

from __future__ import annotations

import fcntl
import ipaddress
import os
import socket
import struct
from collections.abc import Mapping, MutableMapping

_SIOCGIFADDR = 0x8915
_ELSEWHERE = "192.0.2.1"  # reserved for documentation: only the default route leads there
_PORT = 9


def own_address(environ: Mapping[str, str] = os.environ, *, peer: str | None = None) -> str:
    """IPv4 address of, in this order: the interface that GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME
    names; the one by which `peer`, MASTER_ADDR or Ray's head (RAY_ADDRESS) is reached, loopback
    only where such a one is given as loopback itself; the default route; loopback if there is none.
    """
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        if address := _of_interface(environ.get(variable, "")):
            return address
    ray_head = environ.get("RAY_ADDRESS", "").rpartition(":")[0]
    peers = [name for name in (peer, environ.get("MASTER_ADDR"), ray_head) if name]
    found = [(name, address) for name in peers if (address := _towards(name)) is not None]
    for _, address in found:
        if not is_loopback(address):
            return address
    if any(is_loopback(name) for name, _ in found):
        return "127.0.0.1"
    return _towards(_ELSEWHERE) or "127.0.0.1"


def leaves_machine(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether a run with this environment has ranks, or may have engines, on other machines."""
    ray_head = environ.get("RAY_ADDRESS", "").rpartition(":")[0]
    has_ray = bool(ray_head) and ray_head != "localhost" and not is_loopback(ray_head)
    return has_ray or environ.get("WORLD_SIZE", "1") != environ.get("LOCAL_WORLD_SIZE", "1")


def choose_gloo_interface(
    environ: MutableMapping[str, str] = os.environ, *, peer: str | None = None
) -> None:
    """Have gloo bind to the interface of `own_address`, in a process of a run of several machines
    whose environment does not name one. By itself it takes what the host's own name resolves to:
    where that is 127.0.1.1, ranks on other machines are told to connect to themselves. `peer`: who
    is to be reached by it, be it on this machine."""
    if environ.get("GLOO_SOCKET_IFNAME") or (peer is None and not leaves_machine(environ)):
        return
    address = own_address(environ, peer=peer)
    if is_loopback(address) and peer is None:
        return
    if (name := _interface_with(address)) is not None:
        environ["GLOO_SOCKET_IFNAME"] = name


def gloo_fault(environ: Mapping[str, str] = os.environ, *, peer: str | None = None) -> str | None:
    """Why gloo cannot bind on this host, as `found ..., expected ...; fix`; None where it can."""
    here = [name for _, name in socket.if_nameindex()]
    for wish in filter(None, environ.get("GLOO_SOCKET_IFNAME", "").split(",")):
        if wish not in here:
            return (
                f"found no interface {wish}, which GLOO_SOCKET_IFNAME names, expected some of "
                f"{', '.join(here)}; gloo takes whole names, not beginnings, = or ^"
            )
    address = own_address(environ, peer=peer)
    try:
        socket.create_server((address, 0)).close()
    except OSError as error:
        return (
            f"found that nothing can listen on {address} ({error.strerror}), expected an address "
            "of its own; set GLOO_SOCKET_IFNAME to its network interface"
        )
    return None


def is_loopback(host: str) -> bool:
    """Whether a name or an address means this very machine, on every host another one."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return False


def _of_interface(wish: str) -> str | None:
    """A list as NCCL reads it: names or beginnings of names, `=` before whole ones, `^` before
    those to leave out (which names none)."""
    if wish.startswith("^"):
        return None
    exact = wish.startswith("=")
    for name in filter(None, wish.removeprefix("=").split(",")):
        for _, interface in socket.if_nameindex():
            fits = interface == name if exact else interface.startswith(name)
            if fits and (address := _address_of(interface)) is not None:
                return address
    return None


def _interface_with(address: str) -> str | None:
    names = (name for _, name in socket.if_nameindex())
    return next((name for name in names if _address_of(name) == address), None)


def _address_of(interface: str) -> str | None:
    request = struct.pack("256s", interface.encode()[:15])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            return socket.inet_ntoa(fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)[20:24])
        except OSError:  # it has no IPv4 address
            return None


def _towards(host: str) -> str | None:
    """The address that packets to `host` would come from; none is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, _PORT))
            return str(probe.getsockname()[0])
        except OSError:
            return None
