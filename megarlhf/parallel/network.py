"""The network interface that gloo, NCCL and the stores at which ranks of several nodes meet use."""

import fcntl
import os
import socket
from ipaddress import ip_address

_SIOCGIFADDR = 0x8915  # Linux: an interface's address


def use_interface(name: str | None, *, address: str) -> None:
    """Have this process's groups use an interface; call it before it makes the first.

    Args:
        name: None: that of GLOO_SOCKET_IFNAME where it is set, else the one that has `address`.
        address: of this node, for Ray.
    Raises:
        ValueError: this node has no such interface.
    """
    found = name or os.environ.get("GLOO_SOCKET_IFNAME") or _interface_of(address)
    address_of(found)
    os.environ["GLOO_SOCKET_IFNAME"] = found
    if name is not None or "NCCL_SOCKET_IFNAME" not in os.environ:
        os.environ["NCCL_SOCKET_IFNAME"] = f"={found}"  # the name itself, not names that begin with it


def address_of(interface: str) -> str:
    """IPv4 address of one of this host's interfaces.

    Raises:
        ValueError: it has none of that name, or no address there.
    """
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
            request = interface.encode()[:15].ljust(256, b"\0")
            return socket.inet_ntoa(fcntl.ioctl(asked.fileno(), _SIOCGIFADDR, request)[20:24])
    except OSError as error:
        raise ValueError(
            f"network_interface={interface}: {socket.gethostname()} has no such interface with an IPv4 address "
            f"({error.strerror}); it has {', '.join(_names())}"
        ) from error


def use_interface_towards(host: str) -> None:
    """Have this process's groups use the interface that leads to the first rank's host, or GLOO_SOCKET_IFNAME.

    Raises:
        ValueError: that host is a loopback address here, which the other nodes do not reach.
        OSError: its name is unknown, or no network leads there.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        asked.connect((host, 9))  # nothing is sent
        address = str(asked.getsockname()[0])
    if ip_address(address).is_loopback and "GLOO_SOCKET_IFNAME" not in os.environ:
        raise ValueError(
            f"MASTER_ADDR={host} is {address} on {socket.gethostname()}, which other nodes cannot reach: give torchrun "
            "an address (--master-addr), or set GLOO_SOCKET_IFNAME to the interface between the nodes"
        )
    use_interface(None, address=address)


def _interface_of(address: str) -> str:
    if ip_address(address).is_loopback:
        return "lo"
    for name in _names():
        try:
            if address_of(name) == address:
                return name
        except ValueError:  # it is down
            continue
    raise ValueError(
        f"no interface of {socket.gethostname()} has {address}, its address for Ray, as its first: set "
        f"network_interface to one of {', '.join(_names())}"
    )


def _names() -> list[str]:
    return [name for _, name in socket.if_nameindex()]
