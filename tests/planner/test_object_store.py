"""The object store's size, by hand."""

from dataclasses import replace
from pathlib import Path

from megarlhf.planner.object_store import object_store_bytes
from tests.trainers.plain_roles import make_config


def test_the_store_holds_a_step_of_the_longest_responses() -> None:
    config = make_config(Path("unused"), batch={"rollout_batch_size": 2048, "n_samples_per_prompt": 16})
    assert object_store_bytes(config) == 128 << 20  # 8 tokens a response
    rollout = replace(config.rollout, generate_max_len=8192, prompt_max_len=1000)
    expected = 1.25 * (24 * 2048 * 16 * 8192 + 4 * 2048 * 1000)
    assert object_store_bytes(replace(config, rollout=rollout)) == int(expected) > 8e9
