"""What is wrong with a server of rewards, as far as it can be told before PyTorch is imported."""

import os

from megarlhf.config.check_files import place_errors, read_model
from megarlhf.config.check_layout import broken
from megarlhf.config.check_loops import model_errors, unread_errors
from megarlhf.config.check_numbers import limit_errors
from megarlhf.config.check_rewards import code_errors
from megarlhf.config.command_line import to_dict
from megarlhf.config.serve_arguments import ServeConfig
from megarlhf.config.urls import TOKEN_VARIABLE, is_loopback


def serve_errors(config: ServeConfig) -> list[str]:
    """Every mistake found, none where the server may start."""
    serve, options = config.serve, to_dict(config)
    errors = broken(
        {
            f"host={serve.host} is open to other machines, and nothing keeps them out: set {TOKEN_VARIABLE} in the "
            "environment, or use host=127.0.0.1": not is_loopback(serve.host) and not os.environ.get(TOKEN_VARIABLE),
            f"ssl_keyfile={serve.ssl_keyfile} is ignored without ssl_certfile: set both": (
                serve.ssl_keyfile is not None and serve.ssl_certfile is None
            ),
            f"max_waiting_queries={serve.max_waiting_queries} is below max_queries={serve.max_queries} (a full request "
            "could never wait): raise it": serve.max_waiting_queries < serve.max_queries,
            f"max_batch_tokens={serve.max_batch_tokens} is below max_len={serve.max_len} (a query of full length must "
            "fit): raise it": serve.max_batch_tokens < serve.max_len,
        }
        | {
            f"{name}={path} is not a file: give one in PEM format": path is not None and not os.path.isfile(path)
            for name, path in (("ssl_certfile", serve.ssl_certfile), ("ssl_keyfile", serve.ssl_keyfile))
        }
    )
    return errors + limit_errors(options) + place_errors(options) + _source_errors(config) + code_errors(config.reward)


def _source_errors(config: ServeConfig) -> list[str]:
    """What scores: one of function, rule and model, and its options."""
    function, rule, model = config.reward.reward_function, config.reward.reward_rule, config.models.reward_pretrain
    stops = config.serve.stop_texts
    errors = broken(
        {
            f"reward_pretrain={model}, reward_function={function} and reward_rule={rule} (one of them scores): set "
            "reward_pretrain to a reward model, reward_function to a Python file, or reward_rule to math, exact_match "
            "or format": sum(source is not None for source in (function, rule, model)) != 1,
            f"reward_pretrain={model} names several models (a server has one): start a server for each, and give "
            "remote_rm_url their addresses with spaces between them": model is not None and "," in model,
            f"stop_texts={' '.join(stops)} is ignored without reward_rule (others read whole queries): leave it out": (
                stops and rule is None
            ),
        }
    )
    if model is None:
        return errors + unread_errors(config)
    if "," in model:
        return errors
    limit = read_model("reward_pretrain", model)[0].get("max_position_embeddings")
    errors += model_errors(config.as_ppo())
    return errors + broken(
        {
            f"max_len={config.serve.max_len} is above max_position_embeddings={limit} of reward_pretrain: use at most "
            f"{limit}": isinstance(limit, int) and config.serve.max_len > limit
        }
    )
