"""The interface that ranks on several nodes use, in Ray and started by torchrun."""

import os
import socket

import pytest

from megarlhf.parallel.network import address_of, use_interface, use_interface_towards


def test_a_first_rank_at_a_loopback_address_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Debian's installer has each host name: only its own node would find it."""
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    with pytest.raises(ValueError, match="MASTER_ADDR=localhost is 127.0.0.1 on .*--master-addr"):
        use_interface_towards("localhost")
    assert "GLOO_SOCKET_IFNAME" not in os.environ


def test_an_interface_that_was_chosen_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    monkeypatch.delenv("NCCL_SOCKET_IFNAME", raising=False)
    use_interface_towards("localhost")
    assert (os.environ["GLOO_SOCKET_IFNAME"], os.environ["NCCL_SOCKET_IFNAME"]) == ("lo", "=lo")


OTHERS = [name for _, name in socket.if_nameindex() if name != "lo"]


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [(None, {}, ("lo", "=lo")), (None, {"NCCL_SOCKET_IFNAME": "ib0"}, ("lo", "ib0"))]
    + [("lo", {"GLOO_SOCKET_IFNAME": "eth9", "NCCL_SOCKET_IFNAME": "ib0"}, ("lo", "=lo"))],
)
def test_the_option_then_the_environment_then_the_address(
    monkeypatch: pytest.MonkeyPatch, name: str | None, given: dict[str, str], expected: tuple[str, str]
) -> None:
    for key in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(key, given.get(key, ""))
        if key not in given:
            monkeypatch.delenv(key)
    use_interface(name, address="127.0.0.3")
    assert (os.environ["GLOO_SOCKET_IFNAME"], os.environ["NCCL_SOCKET_IFNAME"]) == expected


@pytest.mark.skipif(not OTHERS, reason="this machine has no network")
def test_the_interface_with_an_address_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "kept")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        asked.connect(("192.0.2.1", 9))
        address = asked.getsockname()[0]
    use_interface(None, address=address)
    assert os.environ["GLOO_SOCKET_IFNAME"] in OTHERS
    assert address_of(os.environ["GLOO_SOCKET_IFNAME"]) == address


def test_what_a_node_has_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    with pytest.raises(ValueError, match=r"network_interface=nowhere0: .* no such interface .*; it has lo"):
        use_interface("nowhere0", address="127.0.0.1")
    with pytest.raises(ValueError, match="no interface of .* has 203.0.113.9, .*: set network_interface to one of lo"):
        use_interface(None, address="203.0.113.9")
    assert "GLOO_SOCKET_IFNAME" not in os.environ
