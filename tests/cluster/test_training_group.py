"""A training role of several replicas: each gets its partition, and what they compute comes back in the samples' order.

Real workers over an engine that computes from token ids (plain_workers.py), so that a mix-up changes a number.
"""

from collections.abc import Sequence
from dataclasses import asdict, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megarlhf.cluster.roles import TrainingGroup
from megarlhf.cluster.workers import RolloutWorker
from megarlhf.data.types import Floats, GeneratedGroup, GroupTokens, Rollout, Sample
from megarlhf.parallel import device
from megarlhf.trainers.roles import LogProbDifference
from tests.cluster.plain_workers import (
    PACKING,
    PlainStore,
    PlainWorkers,
    Ref,
    advantage,
    engines,
    make_rollout,
    own,
    places_of,
    reference,
    response,
    store,
    targets,
    value,
    weight,
)

__all__ = ["store"]

LENGTHS = [[3, 1, 4], [1, 5, 9], [2, 6, 5], [3, 5, 8], [9, 7, 9]]
WITHOUT = [(0, 1), (3, 2)]
MINI_BATCHES = [[12, 0, 3, 4, 7, 9], [2, 1, 5, 6, 8, 10, 11]]
# Three replicas of three processes, in an order in which ranks, replicas and who counts have nothing to do together.
KINDS = [
    *[(2, "first stage"), (1, "counts"), (0, "first stage"), (1, "computes along"), (2, "counts")],
    *[(0, "computes along"), (0, "counts"), (1, "first stage"), (2, "computes along")],
]


def begun(
    role: str, store: PlainStore, *, share_prefix: bool, **options: Any
) -> tuple[TrainingGroup, PlainWorkers, Rollout]:
    packing = replace(PACKING, share_prefix=share_prefix)
    workers = PlainWorkers(role, store, KINDS, packing, **options)
    group = TrainingGroup(workers, places_of(KINDS, packing))
    rollout = make_rollout(LENGTHS, without=WITHOUT)
    assert len(rollout.samples) == sum(map(len, MINI_BATCHES))
    group.begin(rollout, MINI_BATCHES)
    return group, workers, rollout


def samples_of(workers: PlainWorkers, rank: int) -> list[tuple[int, int]]:
    """Group and number of each sample that a process has, from its first response token."""
    rows = workers.workers[rank].rows.rows
    first = np.cumsum(rows.lengths) - rows.num_targets
    return [(int(token) // 10_000 - 1, int(token) % 10_000 // 100) for token in rows.input_ids[first]]


def difference(samples: Sequence[Sample], *, steps: int = 0) -> LogProbDifference:
    """Of the trainer's log-probs to the engine's, over these samples."""
    tokens = targets(samples).astype(np.float64)
    apart = own(tokens, steps=steps) - engines(tokens)
    kl = float((np.exp(apart) - 1 - apart).sum())
    absolute = np.abs(apart)
    return LogProbDifference(
        num_tokens=len(tokens), absolute=float(absolute.sum()), largest=float(absolute.max()), kl=kl
    )


@pytest.mark.parametrize("share_prefix", [False, True])
def test_each_replica_gets_its_own_share_by_one_reference(store: PlainStore, share_prefix: bool) -> None:
    _, workers, rollout = begun("actor", store, share_prefix=share_prefix)
    assert len(store) == 3, "one object for each replica, however many processes it has"
    by_replica: dict[int, set[int]] = {}
    for method, rank, (given,) in workers.given:
        assert method == "begin" and isinstance(given, Ref)
        by_replica.setdefault(KINDS[rank][0], set()).add(id(given))
        partition, references = given.value
        assert all(isinstance(ref, Ref) for ref in references), "tokens are not in it"
        groups = {group for group, _ in samples_of(workers, rank)}
        assert [rollout.tokens.index(ref) for ref in references] == partition.groups.tolist() == sorted(groups)
    assert sorted(len(objects) for objects in by_replica.values()) == [1, 1, 1]
    assert len(set.union(*by_replica.values())) == 3
    partitions = [samples_of(workers, rank) for rank in (6, 1, 4)]  # of replicas 0, 1 and 2, where results count
    assert sorted(sum(partitions, [])) == [(s.group_id, s.sample_id) for s in rollout.samples]
    assert min(map(len, partitions)) > 1
    for rank, (replica, _) in enumerate(KINDS):
        rows = workers.workers[rank].rows.rows
        assert samples_of(workers, rank) == partitions[replica]
        whole = [
            [*range(10 * group, 11 * group + 1), *response(group, sample, LENGTHS[group][sample])]
            for group, sample in partitions[replica]
        ]
        assert rows.input_ids.tolist() == sum(whole, [])
        own_targets = [token for group, s in partitions[replica] for token in response(group, s, LENGTHS[group][s])]
        assert rows.fields["rollout_log_probs"].tolist() == [engines(token) for token in own_targets]


@pytest.mark.parametrize("use_tis", [False, True])
@pytest.mark.parametrize("share_prefix", [False, True])
def test_actor_from_log_probs_to_its_updates(store: PlainStore, share_prefix: bool, use_tis: bool) -> None:
    actor, workers, rollout = begun("actor", store, share_prefix=share_prefix, use_tis=use_tis)
    tokens = targets(rollout.samples)
    assert asdict(actor.log_probs()) == pytest.approx(asdict(difference(rollout.samples)), rel=1e-12)
    assert actor.ref_log_probs() is None
    kl = actor.kl("k1")
    assert kl.dtype == np.float32
    np.testing.assert_array_equal(kl, own(tokens) - reference(tokens))
    weights = np.array([weight(s.group_id, s.sample_id) for s in rollout.samples], dtype=np.float32)
    store.clear()
    actor.keep({"advantages": advantage(tokens)}, scalars={"weights": weights})
    assert len(store) == 6, "fields and scalars of each replica"
    assert sum(len(ref.value.get("advantages", [])) for ref in store) == len(tokens), "each number goes to one"
    assert sum(len(ref.value.get("weights", [])) for ref in store) == len(weights)
    for step, mini_batch in enumerate((1, 0, 1)):
        result = actor.update(mini_batch, denominator=7.0 + mini_batch)
        assert (result.loss, result.metrics, result.grad_norm, result.learning_rate) == (
            1.5 * (step + 1),
            {"m": 2.5},
            3.5 * (step + 1),
            4.5,
        )
        assert result.difference is None, "log_probs has measured it"
        computed = {"old_log_probs": own, "ref_log_probs": reference}
        chosen = [rollout.samples[i] for i in MINI_BATCHES[mini_batch]]
        check_lines(workers, chosen, denominator=7.0 + mini_batch, computed=computed)
        read = workers.workers[1].engine.lines[-1][0][0].fields
        assert ("rollout_log_probs" in read) == use_tis, "laid out where the loss reads them"


def test_an_update_measures_the_difference_where_no_pass_before_it_has(store: PlainStore) -> None:
    actor, workers, rollout = begun("actor", store, share_prefix=False)
    for mini_batch in (1, 0):
        found = actor.update(mini_batch, denominator=1.0).difference
        expected = difference([rollout.samples[i] for i in MINI_BATCHES[mini_batch]], steps=1 - mini_batch)
        assert found is not None and asdict(found) == pytest.approx(asdict(expected), rel=1e-12)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ["forward", "release", "step", "release"]),
        ({"colocate_all_models": False}, ["forward", "step"]),
        ({"advantage_estimator": "rloo"}, ["forward", "step"]),
    ],
)
def test_what_a_pass_has_freed_goes_back_where_another_model_is_on_the_device(
    store: PlainStore, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], expected: list[str]
) -> None:
    done: list[str] = []
    critic = PlainWorkers("critic", store, [(0, "counts")], PACKING, **options)
    group = TrainingGroup(critic, places_of([(0, "counts")]))
    group.begin(make_rollout([[2, 3]]), [[0, 1]])
    engine = critic.workers[0].engine
    forward, step = engine.forward, engine.step
    monkeypatch.setattr(device, "release_cache", lambda: done.append("release"))
    monkeypatch.setattr(engine, "forward", lambda batches: [forward(batches), done.append("forward")][0])
    group.values()
    monkeypatch.setattr(engine, "forward", forward)
    monkeypatch.setattr(engine, "step", lambda *a, **k: [step(*a, **k), done.append("step")][0])
    group.update(0, denominator=1.0)
    assert done == expected


def test_critic_from_values_to_its_updates(store: PlainStore) -> None:
    critic, workers, rollout = begun("critic", store, share_prefix=False)
    tokens = targets(rollout.samples)
    values = critic.values()
    assert values.dtype == np.float32
    np.testing.assert_array_equal(values, value(tokens))
    weights = np.array([weight(s.group_id, s.sample_id) for s in rollout.samples], dtype=np.float32)
    critic.keep({"advantages": advantage(tokens)}, scalars={"weights": weights})
    for mini_batch in (0, 1):
        assert critic.update(mini_batch, denominator=3.0).difference is None
        chosen = [rollout.samples[i] for i in MINI_BATCHES[mini_batch]]
        check_lines(workers, chosen, denominator=3.0, computed={"old_values": value})
        assert "rollout_log_probs" not in workers.workers[1].engine.lines[-1][0][0].fields


def check_lines(
    workers: PlainWorkers, samples: Sequence[Sample], *, denominator: float, computed: dict[str, Any]
) -> None:
    """The last step's lines have the mini-batch's samples, once in each layer of processes, with their own numbers."""
    seen: dict[str, list[float]] = {kind: [] for _, kind in KINDS}
    counts = set()
    for rank, (_, kind) in enumerate(KINDS):
        batches, given = workers.workers[rank].engine.lines[-1]
        assert given == denominator
        counts.add(len(batches))
        for batch in batches:
            mask = batch.target_mask
            tokens = batch.targets[mask].numpy().astype(np.float32)
            fields = {name: field[mask].numpy() for name, field in batch.fields.items()}
            seen[kind] += tokens.tolist()
            group_and_sample = [(int(token) // 10_000 - 1, int(token) % 10_000 // 100) for token in tokens]
            expected: dict[str, Floats] = {
                "advantages": advantage(tokens),
                "weights": np.array([weight(*pair) for pair in group_and_sample], dtype=np.float32),
            }
            if kind == "counts":
                expected |= {name: of(tokens) for name, of in computed.items()}
            if "rollout_log_probs" in fields:
                expected["rollout_log_probs"] = engines(tokens)
            for name, numbers in expected.items():
                np.testing.assert_array_equal(fields[name], numbers, err_msg=name)
    assert len(counts) == 1, "as many micro-batches on every rank"
    assert all(sorted(tokens) == sorted(targets(samples).tolist()) for tokens in seen.values())


def test_a_new_step_forgets_the_last_one(store: PlainStore) -> None:
    actor, workers, _ = begun("actor", store, share_prefix=False)
    actor.log_probs()
    rollout = make_rollout([[2, 3], [4, 1]])
    actor.begin(rollout, [[0, 1, 2, 3]])
    assert set(workers.workers[1].rows.rows.fields) == {"rollout_log_probs"}
    assert asdict(actor.log_probs()) == pytest.approx(asdict(difference(rollout.samples)), rel=1e-12)


def test_a_replica_without_results_is_an_error(store: PlainStore) -> None:
    kinds = [(0, "counts"), (1, "first stage")]
    critic = TrainingGroup(PlainWorkers("critic", store, kinds, PACKING), places_of(kinds))
    critic.begin(make_rollout([[2, 3], [4, 1]]), [[0, 1, 2, 3]])
    with pytest.raises(KeyError):
        critic.values()


@pytest.mark.parametrize(("temperature", "used"), [(None, 0.7), (0.3, 0.3), (0.0, 0.0)])
def test_an_engines_tokens_stay_in_the_store(store: PlainStore, temperature: float | None, used: float) -> None:
    """The driver gets lengths and texts, and where the tokens are."""
    calls: list[dict[str, Any]] = []

    def generate(prompts: Sequence[Any], **options: Any) -> list[GeneratedGroup]:
        calls.append({"prompts": prompts, **options})
        return [
            GeneratedGroup(
                tokens=GroupTokens(
                    prompt_ids=prompt,
                    response_ids=np.array([7, 8, 9], dtype=np.int32) + group,
                    rollout_log_probs=np.zeros(3, dtype=np.float32),
                    lengths=np.array([2, 1]),
                ),
                lengths=np.array([2, 1]),
                texts=[f"a{group}", f"b{group}"],
                stop_texts=["", f"stop {group}"],
                finish_reasons=["length", "stop"],
                weight_version=6,
            )
            for prompt, group in zip(prompts, options["group_ids"], strict=True)
        ]

    worker = object.__new__(RolloutWorker)  # whose __init__ takes over the process's output
    worker._store = store
    worker.spec = SimpleNamespace(
        config=SimpleNamespace(
            rollout=SimpleNamespace(
                generate_max_len=12, temperature=0.7, top_p=0.9, top_k=40, min_p=0.05, repetition_penalty=1.1
            ),
            model=SimpleNamespace(seed=5),
        ),
        stop_token_ids=(2, 3),
    )
    worker.engine = SimpleNamespace(generate=generate)
    prompts = [np.array([10 + i], dtype=np.int32) for i in range(2)]
    found = worker.generate(prompts, [4, 1], 2, 9, temperature)
    assert calls == [
        {
            **{"prompts": prompts, "group_ids": [4, 1], "n_samples": 2, "max_tokens": 12, "temperature": used},
            **{"top_p": 0.9, "top_k": 40, "min_p": 0.05, "repetition_penalty": 1.1},
            **{"stop_token_ids": [2, 3], "run_seed": 5, "step": 9, "greedy": used == 0},
        }
    ]
    for (group, tokens), group_id, prompt in zip(found, (4, 1), prompts, strict=True):
        assert group.tokens is None and group.lengths.tolist() == [2, 1] and group.weight_version == 6
        assert (group.texts, group.stop_texts) == ([f"a{group_id}", f"b{group_id}"], ["", f"stop {group_id}"])
        assert group.finish_reasons == ["length", "stop"]
        [kept] = store.get([tokens])
        assert kept.prompt_ids is prompt and kept.response_ids.tolist() == [7 + group_id, 8 + group_id, 9 + group_id]
    assert len(store) == 2
