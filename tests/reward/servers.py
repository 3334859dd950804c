"""Reward servers of this machine, whose answers are written down beforehand."""

import datetime
import ipaddress
import json
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

Asked = dict[str, Any]


def rewards_of(asked: Asked) -> list[float]:
    """What a server that works answers: the length of each query, and a quarter."""
    return [len(query) + 0.25 for query in asked["query"]]


@dataclass
class Server:
    """One server, and what it was asked for. Requests without samples are answered, but not counted."""

    reply: Callable[["Handler", Asked], None]
    url: str = ""
    asked: list[Asked] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    peers: set[Any] = field(default_factory=set)  # connections
    at_once: int = 0  # the most requests that were under way together
    under_way: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


class Handler(BaseHTTPRequestHandler):
    """Notes a request and has the server's function reply."""

    protocol_version = "HTTP/1.1"
    rewards: Server

    def do_POST(self) -> None:
        server, asked = self.rewards, json.loads(self.rfile.read(int(self.headers["content-length"])))
        with server.lock:
            if asked["query"]:
                server.asked.append(asked)
            server.headers.append({name.lower(): value for name, value in self.headers.items()})
            server.peers.add(self.client_address)
            server.under_way += 1
            server.at_once = max(server.at_once, server.under_way)
        try:
            server.reply(self, asked)
        finally:
            with server.lock:
                server.under_way -= 1

    def send(self, status: int, content: Any, **headers: str) -> None:
        """Send an answer: JSON, or bytes as they are."""
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        try:
            self.send_response(status)
            for name, value in ({"content-length": str(len(body))} | headers).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)
        except (BrokenPipeError, ConnectionResetError):  # the client waits no longer
            self.close_connection = True

    def log_message(self, *args: Any) -> None: ...


@contextmanager
def serving(reply: Callable[[Handler, Asked], None], certificate: Path | None = None) -> Iterator[Server]:
    """A server in threads of this process; over TLS with the file of a certificate and its key."""
    server = Server(reply)
    http = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"rewards": server}))
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        http.socket = context.wrap_socket(http.socket, server_side=True)
    http.daemon_threads = True
    http.block_on_close = False
    server.url = f"http{'s' if certificate else ''}://127.0.0.1:{http.server_address[1]}/get_reward"
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
        thread.join()


def write_certificate(path: Path) -> Path:
    """A certificate for 127.0.0.1 that nobody else vouches for, and its key."""
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.UTC)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "a test")])
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
        .sign(key, hashes.SHA256())
    )
    form = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    private = key.private_bytes(serialization.Encoding.PEM, *form)
    path.write_bytes(private + certificate.public_bytes(serialization.Encoding.PEM))
    return path


def plain(handler: Handler, asked: Asked) -> None:
    """OpenRLHF 0.5: query alone."""
    handler.send(200, {"rewards": rewards_of({"query": asked["query"]})})


def with_prompts(handler: Handler, asked: Asked) -> None:
    """0.5.6: a query begins with its prompt."""
    assert all(query.startswith(prompt) for query, prompt in zip(asked["query"], asked["prompts"], strict=True))
    handler.send(200, {"rewards": rewards_of(asked)})


def today(handler: Handler, asked: Asked) -> None:
    """Labels too, and more in the answer."""
    rewards = rewards_of(asked)
    extra = {"label": [float(label) for label in asked["labels"]], "broken": ["a"], "text": "b"}
    handler.send(200, {"rewards": rewards, "scores": [r / 2 for r in rewards], "extra_logs": extra})


def slow(seconds: float) -> Callable[[Handler, Asked], None]:
    """Answers late."""

    def reply(handler: Handler, asked: Asked) -> None:
        time.sleep(seconds if asked["query"] else 0)
        plain(handler, asked)

    return reply


def answering(status: int, content: Any, **headers: str) -> Callable[[Handler, Asked], None]:
    """The same whatever is asked for."""
    return lambda handler, asked: handler.send(status, content, **headers)


def closing(handler: Handler, asked: Asked) -> None:
    """No answer at all."""
    handler.close_connection = True


def then_plain(first: Callable[[Handler, Asked], None], times: int = 1) -> Callable[[Handler, Asked], None]:
    """Fails so many times, and works from then on."""
    left = iter(range(times))

    def reply(handler: Handler, asked: Asked) -> None:
        (first if asked["query"] and next(left, None) is not None else plain)(handler, asked)

    return reply
