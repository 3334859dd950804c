"""What a step costs besides models: seconds and bytes per token of the driver, the object store and the ranks.

    python benchmarks/control_path.py [--smoke]

A PPO step of ragged responses with Ray's real object store and without any model: the engines' tokens are put there,
the driver partitions rows over the actor's and the critic's ranks, each rank (one after the other, in this process)
takes its rows, packs them and keeps what its passes would compute, KL and values come back, the driver estimates
advantages and sends them out, and each rank packs its fields. The baseline is one copy of the same tokens in memory.
Then a call without work to every process of a group: what the driver spends on each, whatever it does.
"""

import argparse
import logging
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import ray
import torch

from megarlhf.algos.advantages import compute_advantages
from megarlhf.data.packing import pack_rows
from megarlhf.data.partition import DataParallelSplit, Partition, RankRows
from megarlhf.data.planning import PackingOptions
from megarlhf.data.types import Floats, GroupTokens, MicroBatch, Prompt, Sample, TrainingRows

N_SAMPLES, PROMPT_LENGTH, RESPONSE_LENGTH = 16, 256, 1024
PACKING = PackingOptions(max_tokens=16384, share_prefix=False)


class Costs:
    """Seconds and bytes by who spends them."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.driver_bytes = 0

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        """Count the seconds of the block."""
        started = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - started

    def put(self, value: object, num_bytes: int) -> ray.ObjectRef:
        """Store something as the driver does."""
        self.driver_bytes += num_bytes
        with self.of("store"):
            return ray.put(value)

    def receive(self, values: Floats) -> Floats:
        """A rank's answer, as it reaches the driver."""
        with self.of("store"):
            found: Floats = ray.get(ray.put(values))
        self.driver_bytes += found.nbytes
        return found


def generated(num_tokens: int) -> tuple[list[Sample], list[ray.ObjectRef]]:
    """Samples of about so many response tokens, whose tokens are in the store as the engines put them there."""
    random = np.random.default_rng(3)
    samples, tokens = [], []
    for group in range(max(1, num_tokens // (N_SAMPLES * RESPONSE_LENGTH))):
        ids = random.integers(0, 30000, PROMPT_LENGTH, dtype=np.int32)
        prompt = Prompt(index=group, text="", token_ids=ids, label=None)
        lengths = random.integers(RESPONSE_LENGTH // 2, 3 * RESPONSE_LENGTH // 2, N_SAMPLES)
        total = int(lengths.sum())
        record = GroupTokens(
            prompt_ids=ids,
            response_ids=random.integers(0, 30000, total, dtype=np.int32),
            rollout_log_probs=random.standard_normal(total, dtype=np.float32),
            lengths=lengths,
        )
        tokens.append(ray.put(record))
        samples += [
            Sample(
                prompt=prompt,
                group_id=group,
                sample_id=number,
                response_length=int(length),
                response_text="",
                finish_reason="stop",
                weight_version=0,
                reward=float(number % 3),
            )
            for number, length in enumerate(lengths)
        ]
    return samples, tokens


def pack(rows: TrainingRows, indices: list[int], min_length: int) -> MicroBatch:
    """As MegatronEngine.pack without parallelism."""
    return pack_rows(rows, indices, share_prefix=False, min_length=min_length)


def take(costs: Costs, reference: ray.ObjectRef) -> RankRows:
    """A rank's part of MegatronWorker.begin."""
    partition: Partition
    partition, references = ray.get(reference)
    return RankRows(partition, ray.get(references), pack, one_length=False)


def step(samples: list[Sample], tokens: list[ray.ObjectRef], num_ranks: int) -> Costs:
    """One step of an actor and a critic on as many ranks each."""
    costs = Costs()
    mini_batches = [list(range(len(samples)))]
    roles: dict[str, tuple[DataParallelSplit, list[RankRows]]] = {}
    for role in ("actor", "critic"):
        with costs.of("driver"):
            split = DataParallelSplit(samples, mini_batches, num_ranks=num_ranks, packing=PACKING)
        given = [
            costs.put((own, [tokens[group] for group in own.groups.tolist()]), 24 * len(own.sample_ids))
            for own in split.partitions
        ]
        with costs.of(role):
            roles[role] = split, [take(costs, reference) for reference in given]
    (split, actor), (critic_split, critic) = roles["actor"], roles["critic"]
    kl_parts, value_parts = [], []
    with costs.of("actor"):
        for rank in actor:
            rank.batches()
            log_probs = rank.rows.fields["rollout_log_probs"]
            rank.keep({"old_log_probs": log_probs, "ref_log_probs": log_probs + 1.0})
            kl_parts.append(rank.rows.fields["old_log_probs"] - rank.rows.fields["ref_log_probs"])
    with costs.of("critic"):
        for rank in critic:
            rank.keep({"old_values": 0.5 * rank.rows.fields["rollout_log_probs"]})
            value_parts.append(rank.rows.fields["old_values"])
    kl_parts, value_parts = [costs.receive(p) for p in kl_parts], [costs.receive(p) for p in value_parts]
    with costs.of("driver"):
        kl, values = split.gather(kl_parts), critic_split.gather(value_parts)
        result = compute_advantages(
            "gae",
            rewards=torch.tensor([sample.reward for sample in samples]),
            group_ids=torch.tensor([sample.group_id for sample in samples]),
            kl=torch.from_numpy(kl),
            lengths=torch.tensor([sample.response_length for sample in samples]),
            values=torch.from_numpy(values),
            **{"kl_coef": 0.1, "gamma": 1.0, "lambd": 0.95, "clip_range": (-10.0, 10.0), "normalize": True},
        )
        sent = split.scatter(result.advantages.numpy()), critic_split.scatter(result.returns.numpy())
    for role, ranks, fields, name in (("actor", actor, sent[0], "advantages"), ("critic", critic, sent[1], "returns")):
        references = [costs.put(field, field.nbytes) for field in fields]
        with costs.of(role):
            for rank, reference in zip(ranks, references, strict=True):
                rank.keep({name: ray.get(reference)})
                rank.batches(0)
    return costs


@ray.remote(num_cpus=0)
class Idle:
    """A worker process that does nothing."""

    def nothing(self) -> None:
        """Answer."""


def calls(num_processes: int, rounds: int) -> float:
    """Seconds of a call to all of so many processes, the fastest of the rounds."""
    actors = [Idle.remote() for _ in range(num_processes)]
    ray.get([actor.nothing.remote() for actor in actors])
    fastest = float("inf")
    for _ in range(rounds):
        started = time.perf_counter()
        ray.get([actor.nothing.remote() for actor in actors])
        fastest = min(fastest, time.perf_counter() - started)
    for actor in actors:
        ray.kill(actor)
    return fastest


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="one small size, to see that it runs")
    smoke = parser.parse_args().smoke
    torch.set_num_threads(1)
    ray.init(
        address="local",
        num_cpus=1,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        _node_ip_address="127.0.0.1",
    )
    print(f"{'tokens':>10} {'ranks':>5} {'driver':>8} {'store':>8} {'rank':>8} {'bytes':>6} {'copies':>7}")
    for num_tokens in (10**5,) if smoke else (10**5, 10**6, 10**7):
        samples, tokens = generated(num_tokens)
        total = sum(sample.response_length for sample in samples)
        source = np.zeros(total, dtype=np.int64)
        started = time.perf_counter()
        source.copy()
        copy = (time.perf_counter() - started) / total
        for num_ranks in (2,) if smoke else (2, 8, 64, 1024):
            costs = min((step(samples, tokens, num_ranks) for _ in range(3)), key=lambda c: c.seconds["driver"])
            per_token = {name: 1e9 * seconds / total for name, seconds in costs.seconds.items()}
            rank = (per_token["actor"] + per_token["critic"]) / 2
            print(
                f"{total:>10} {num_ranks:>5} {per_token['driver']:>5.1f} ns {per_token['store']:>5.1f} ns "
                f"{rank:>5.1f} ns {costs.driver_bytes / total:>6.1f} {per_token['driver'] / (1e9 * copy):>7.1f}"
            )
        del tokens
    print("driver and store: per response token of the step; rank: per response token of its partition")
    for num_processes in (2,) if smoke else (4, 8, 16):
        seconds = calls(num_processes, 3 if smoke else 200)
        each = 1e6 * seconds / num_processes
        print(f"a call to {num_processes} processes: {1e3 * seconds:.2f} ms, {each:.0f} us each")
    print("bytes: through the driver, per token; copies: the driver's time over one copy of 8 bytes a token")
    ray.shutdown()


if __name__ == "__main__":
    main()
