"""Rewards over HTTP: `megarlhf serve-rm` or `python -m megarlhf.cli.serve_rm`."""

import os
import socket
import sys
from collections.abc import Sequence

from megarlhf.cli.errors import report_errors
from megarlhf.config.check_rewards import serve_errors
from megarlhf.config.checks import raise_if
from megarlhf.config.command_line import parse, to_yaml
from megarlhf.config.serve_arguments import ServeConfig
from megarlhf.config.urls import TOKEN_VARIABLE


def main(argv: Sequence[str] | None = None, prog: str = "megarlhf serve-rm") -> int:
    """Parse, check and serve until a signal; returns the exit status."""
    config, dry_run = parse(ServeConfig, list(sys.argv[1:] if argv is None else argv), prog=prog)
    return report_errors(prog, lambda: _run(config, prog, dry_run=dry_run))


def _run(config: ServeConfig, prog: str, *, dry_run: bool) -> int:
    raise_if(serve_errors(config))
    from megarlhf.cli.rewards import code_sources  # PyTorch takes seconds: mistakes in flags are told before
    from megarlhf.reward.server import Limits, RewardServer
    from megarlhf.reward.texts import CodeTextScorer

    serve = config.serve
    (source,) = code_sources(config.reward)
    scorer = CodeTextScorer(source, stop_texts=serve.stop_texts)
    if dry_run:
        try:
            scorer.open()
        finally:
            scorer.close()
        print(to_yaml(config))
        return 0
    limits = Limits(
        token=os.environ.get(TOKEN_VARIABLE) or None,
        max_body_bytes=serve.max_body_mib << 20,
        max_queries=serve.max_queries,
        max_len=serve.max_len,
        max_batch_tokens=serve.max_batch_tokens,
        max_waiting_queries=serve.max_waiting_queries,
    )
    with _listening(serve.host, serve.port) as listening:
        port = listening.getsockname()[1]
        host = f"[{serve.host}]" if ":" in serve.host else serve.host
        address = f"{'https' if serve.ssl_certfile else 'http'}://{host}:{port}/get_reward"
        server = RewardServer(scorer, limits, on_ready=lambda: print(f"{prog}: ready at {address}", flush=True))
        server.run(listening, ssl_certfile=serve.ssl_certfile, ssl_keyfile=serve.ssl_keyfile)
    print(f"{prog}: stopped, all that was accepted is answered", flush=True)
    return 0


def _listening(host: str, port: int) -> socket.socket:
    """Raises ValueError where nothing can listen there."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        raise ValueError(f"host={host} port={port} cannot be listened at ({error}): set others") from error


if __name__ == "__main__":
    sys.exit(main())
