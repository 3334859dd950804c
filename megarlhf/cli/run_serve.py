"""The run of serve_rm.py, whose options are checked already: what scores, and where the server listens."""

import os
import socket

from megarlhf.cli.rewards import code_sources
from megarlhf.config.command_line import to_yaml
from megarlhf.config.serve_arguments import ServeConfig
from megarlhf.config.urls import TOKEN_VARIABLE
from megarlhf.reward.server import Limits, RewardServer
from megarlhf.reward.texts import CodeTextScorer, TextScorer


def run(config: ServeConfig, prog: str, *, dry_run: bool) -> int:
    """Serve until a signal; returns the exit status."""
    serve = config.serve
    if dry_run:
        print(to_yaml(config))
    if config.models.reward_pretrain is None:
        (source,) = code_sources(config.reward)
        scorer: TextScorer = CodeTextScorer(source, stop_texts=serve.stop_texts)
        if dry_run:
            source.check()
            source.close()
    else:
        from megarlhf.cli.serve_model import model_scorer  # Megatron-Core: code needs none of it

        scorer, models = model_scorer(config)
        print(models.text())
    if dry_run:
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
