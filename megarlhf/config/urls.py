"""Addresses of reward servers: what can be wrong with one before it is asked."""

import ipaddress
from urllib.parse import urlsplit

TOKEN_VARIABLE = "MEGARLHF_RM_TOKEN"  # of the environment, for clients and server; never on a command line


def is_loopback(host: str) -> bool:
    """Whether a host, as it stands in a URL, is this machine and no other can listen."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def url_errors(option: str, url: str, *, has_token: bool, allow_http: bool) -> list[str]:
    """What is wrong with the address of a reward server.

    Args:
        has_token: requests will carry one.
        allow_http: it may cross a network unencrypted.
    """
    said = f"{option}={url}"
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        return [f"{said} is no address ({error}): set http://HOST:PORT/get_reward"]
    if parts.scheme not in ("http", "https") or not host:
        return [f"{said} is no http or https address: set http://HOST:PORT/get_reward, or the path of a .py file"]
    if parts.username is not None or parts.password is not None:
        return [f"{option}: an address of {host} holds a password (other users can read it): set {TOKEN_VARIABLE}"]
    if not parts.path:
        return [f"{said} names no path: set {url}/get_reward, or {url}/ if that is meant"]
    if parts.scheme == "http" and has_token and not allow_http and not is_loopback(host):
        return [
            f"{said} would carry the token of {TOKEN_VARIABLE} unencrypted to another machine: use https, or set "
            "remote_rm_allow_http where nobody can listen"
        ]
    return []
