"""The interface that ranks started by torchrun on several nodes use."""

import os

import pytest

from megarlhf.parallel.network import use_interface_towards


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
