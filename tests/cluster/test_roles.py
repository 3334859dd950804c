"""Weight sync, which engine gets which prompts, and checkpoints over groups that note the order of calls."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megarlhf.cluster.roles import CheckpointGroup, RolloutGroup, cut_for_engines
from megarlhf.cluster.weight_sync import SharedMemorySync
from megarlhf.data.types import GeneratedGroup, Prompt, Sample
from megarlhf.formats.run_checkpoints import SaveFailedError
from megarlhf.formats.shared_memory import checksum
from tests.cluster.recorded_groups import RecordedGroup, TimedEngines, makes_directory
from tests.trainers.plain_roles import make_prompts

Log = list[tuple[str, str, tuple[Any, ...]]]


def calls(log: Log) -> list[str]:
    return [f"{role} {method}" for role, method, _ in log]


def syncing(log: Log, answer: Callable[[int, tuple[Any, ...]], dict[str, Any]]) -> SharedMemorySync:
    actor = RecordedGroup(
        "actor",
        log,
        ranks=2,
        share_weights=lambda rank, args: [SimpleNamespace(rank=rank, block=b, num_bytes=10 + rank) for b in range(2)],
        refresh_shared_weights=lambda rank, args: [f"{rank}{b}".encode() for b in range(2)],
    )
    rollout = RecordedGroup("rollout", log, ranks=3, update_weights=answer)
    return SharedMemorySync(actor, rollout)


def test_weights_are_shared_and_connected_once_and_refreshed_before_each_update() -> None:
    log: Log = []
    sync = syncing(log, lambda rank, args: {"version": args[0], "checksum": args[1]})
    assert sync.push(4) == {"sync/version": 4.0, "sync/bytes": 42.0}
    assert sync.push(5) == {"sync/version": 5.0, "sync/bytes": 42.0}
    each = ["actor refresh_shared_weights", "rollout update_weights"]
    assert calls(log) == ["actor share_weights", "rollout connect_weights", *each, *each]
    (blocks,) = log[1][2]
    assert [(block.rank, block.block) for block in blocks] == [(0, 0), (0, 1), (1, 0), (1, 1)], "in rank order"
    sent = checksum([b"00", b"01", b"10", b"11"])  # over all ranks' digests, in the order of the blocks
    assert [args for _, method, args in log if method == "update_weights"] == [(4, sent), (5, sent)]


@pytest.mark.parametrize("wrong", [{"version": 3}, {"checksum": "0" * 32}])
def test_an_engine_with_other_weights_is_named(wrong: dict[str, Any]) -> None:
    def answer(rank: int, args: tuple[Any, ...]) -> dict[str, Any]:
        return {"version": args[0], "checksum": args[1]} | (wrong if rank == 2 else {})

    (key, value) = next(iter(wrong.items()))
    with pytest.raises(RuntimeError, match=f"rollout engine 2 holds weights version .*{value}.*; version 4 with"):
        syncing([], answer).push(4)
    assert key in ("version", "checksum")


def answers_of(rank: int, args: tuple[Any, ...]) -> list[tuple[GeneratedGroup, str]]:
    """An engine's, which name group and sample."""
    prompts, groups, n_samples, step, temperature = args
    numbers = range(n_samples)
    return [
        (
            GeneratedGroup(
                tokens=None,
                lengths=np.array([100 * step + 10 * group + s for s in numbers]),
                texts=[f"{prompt.tolist()} {group} {s} {temperature}" for s in numbers],
                stop_texts=[f"stop {group} {s}" for s in numbers],
                finish_reasons=["stop" if (group + s) % 2 else "length" for s in numbers],
                weight_version=rank,
            ),
            f"tokens of {group}",
        )
        for prompt, group in zip(prompts, groups, strict=True)
    ]


def engines(log: Log, number: int, *, at_once: int = 999) -> RolloutGroup:
    group = RecordedGroup("rollout", log, ranks=number, generate=answers_of)
    return RolloutGroup(group, n_samples_per_prompt=3, at_once=at_once)


def check_samples(
    samples: Sequence[Sample], prompts: Sequence[Prompt], *, step: int, temperature: float | None
) -> None:
    """Every sample's record is its own; make_prompts numbers rows as groups are, plus what a test adds."""
    for sample in samples:
        group, number = sample.group_id, sample.sample_id
        place = group if step else prompts[group].index
        assert sample.prompt is prompts[group], "a group's baseline is of its own prompt"
        assert sample.response_length == 100 * step + 10 * place + number
        assert sample.response_text == f"{prompts[group].token_ids.tolist()} {place} {number} {temperature}"
        assert sample.stop_text == f"stop {place} {number}"
        assert sample.finish_reason == ("stop" if (place + number) % 2 else "length")
        assert sample.reward is None


@pytest.mark.parametrize("count", [1, 2, 3, 7, 8])
@pytest.mark.parametrize("number", [1, 2, 3])
def test_prompts_go_to_engines_evenly_and_samples_come_back_in_order(number: int, count: int) -> None:
    log: Log = []
    prompts = make_prompts(count)
    rollout = engines(log, number).generate(prompts, step=11)
    samples = rollout.samples
    assert [(s.group_id, s.sample_id) for s in samples] == [(g, s) for g in range(count) for s in range(3)]
    check_samples(samples, prompts, step=11, temperature=None)
    assert rollout.tokens == tuple(f"tokens of {group}" for group in range(count)), "where each group's tokens are"
    given = [len(args[0]) for _, _, args in log]
    assert sum(given) == count and max(given) - min(given) <= 1 and len(given) == min(number, count)
    for group in range(count):
        assert len({s.weight_version for s in samples if s.group_id == group}) == 1, "on one engine"
    for role, _, (given, groups, *_) in log:
        assert all(ids is prompts[group].token_ids for ids, group in zip(given, groups, strict=True))
        assert {s.weight_version for s in samples if s.group_id in groups} == {int(role.split()[1])}


@pytest.mark.parametrize("seconds", [(1.0, 1.0), (1.0, 4.0), (5.0, 1.0, 1.0), (2.0,)])
def test_a_fast_engine_gets_more_and_no_sample_tells_which_it_was(seconds: tuple[float, ...]) -> None:
    log: Log = []
    prompts, count = make_prompts(64), len(seconds)
    group = TimedEngines(log, seconds, generate=answers_of)
    rollout = RolloutGroup(group, n_samples_per_prompt=3, at_once=7).generate(prompts, step=11, first_place=5)
    check = engines([], 1).generate(prompts, step=11, first_place=5)
    assert [replace(s, weight_version=0) for s in rollout.samples] == check.samples  # it names the engine here
    assert rollout.tokens == check.tokens
    given = [sum(len(args[0]) for role, _, args in log if role == f"rollout {rank}") for rank in range(count)]
    ends = [max((end for rank, _, end in group.pieces if rank == engine)) for engine in range(count)]
    assert sum(given) == 64
    by_count = max(seconds) * 64 / count  # the end if each had the same number
    assert max(ends) <= by_count
    if len(set(seconds)) > 1:
        slowest = seconds.index(max(seconds))
        assert given[slowest] == min(given) < 64 / count and max(ends) < by_count
    alike = [len(args[0]) for role, _, args in sorted(log, key=lambda call: call[2][1][0])]
    cuts = cut_for_engines(64, num_engines=count, least=2)
    assert alike == [cut.stop - cut.start for cut in cuts], "and pieces do not depend on it"


@pytest.mark.parametrize(
    ("count", "num_engines", "least", "expected"),
    [
        (32, 2, 4, [8, 8, 4, 4, 4, 4]),
        (32, 1, 4, [32]),
        (31, 2, 4, [8, 8, 4, 4, 3, 4]),
        (7, 2, 4, [3, 4]),
        (1, 3, 4, [1]),
        (0, 3, 4, []),
        (4096, 64, 32, [32] * 128),  # 32,768 samples of 8 a prompt, 256 at once
    ],
)
def test_pieces_are_large_then_small_and_never_too_small(
    count: int, num_engines: int, least: int, expected: list[int]
) -> None:
    cuts = cut_for_engines(count, num_engines=num_engines, least=least)
    assert [cut.stop - cut.start for cut in cuts] == expected
    assert [place for cut in cuts for place in range(cut.start, cut.stop)] == list(range(count))


@pytest.mark.parametrize(("number", "temperature"), [(1, 0.0), (4, 0.7), (2, None)])
def test_seeds_of_an_evaluation_follow_from_the_row_alone(number: int, temperature: float | None) -> None:
    log: Log = []
    prompts = [*make_prompts(7)[4:], *make_prompts(2)]  # rows 4, 5, 6 of a set, and 0, 1 of another
    samples = engines(log, 2).answer(prompts, n_samples=number, temperature=temperature).samples
    assert [(s.group_id, s.sample_id) for s in samples] == [(g, s) for g in range(5) for s in range(number)]
    check_samples(samples, prompts, step=0, temperature=temperature)


def test_engines_are_timed_in_a_step_and_not_in_an_evaluation() -> None:
    rollout = engines([], 2, at_once=3)
    rollout.answer(make_prompts(4), n_samples=3, temperature=None)
    assert rollout.workers.seconds.take() == {}
    rollout.generate(make_prompts(8), step=1)
    own = {0: (0, 1, 4, 6), 1: (2, 3, 5, 7)}  # prompts, of pieces of 2 and then 1
    lengths = {e: sum(100 + 10 * group + n for group in groups for n in range(3)) for e, groups in own.items()}
    assert {engine: tokens for engine, (_, tokens) in rollout.workers.seconds.take()["rollout"].items()} == lengths


def checkpoints(root: Path, log: Log, **options: Any) -> CheckpointGroup:
    identity = options.pop("identity", {"seed": 5})
    save = options.pop("save", makes_directory)
    roles = {role: RecordedGroup(role, log, ranks=2, save=save) for role in ("actor", "critic")}
    return CheckpointGroup(root, roles, keep=2, identity=identity, with_optimizer=True)


def test_a_checkpoint_appears_when_all_roles_have_saved(tmp_path: Path) -> None:
    log: Log = []
    final, pointer = tmp_path / "iter_0000003", tmp_path / "latest_checkpointed_iteration.txt"

    def save(rank: int, args: tuple[Any, ...]) -> None:
        assert not final.exists() and not pointer.exists(), "not before the last role has saved"
        makes_directory(rank, args)

    group = checkpoints(tmp_path, log, save=save)
    group.save(3, {"step": 3, "extra": "kept"})
    assert log == [(role, "save", (f"{final}.partial/{role}",)) for role in ("actor", "critic")]
    assert pointer.read_text() == "3" and group.last_saved == 3
    assert json.loads((final / "run_state.json").read_text()) == {"step": 3, "extra": "kept", "identity": {"seed": 5}}
    assert sorted(path.name for path in final.iterdir()) == ["actor", "critic", "run_state.json"]


@pytest.mark.parametrize(
    ("error", "found"),
    [
        (OSError("no space left"), SaveFailedError),
        (SaveFailedError("critic: rank 1: no space left"), SaveFailedError),
        (ValueError("no space left"), ValueError),
        (None, RuntimeError),
    ],
)
def test_a_failed_save_leaves_the_last_good_one(
    tmp_path: Path, error: Exception | None, found: type[Exception]
) -> None:
    """Of a role that raises, or saves nothing."""
    log: Log = []
    checkpoints(tmp_path, log).save(3, {"step": 3})

    def save(rank: int, args: tuple[Any, ...]) -> None:
        if not args[0].endswith("critic"):
            makes_directory(rank, args)
        elif error is not None:
            raise error

    group = checkpoints(tmp_path, log, save=save)
    with pytest.raises(found, match="no space left|the critic saved nothing") as failure:
        group.save(4, {"step": 4})
    assert type(failure.value) is found and group.last_saved is None
    assert found is not SaveFailedError or str(failure.value).endswith(": the last complete one is that of step 3")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["iter_0000003", "latest_checkpointed_iteration.txt"]
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "3"


def test_loading_brings_every_role_to_the_latest_checkpoint_of_the_same_run(tmp_path: Path) -> None:
    log: Log = []
    group = checkpoints(tmp_path, log)
    for step in (3, 5):
        group.save(step, {"step": step})
    log.clear()
    assert checkpoints(tmp_path / "elsewhere", log).load(tmp_path)["step"] == 5
    assert log == [(role, "load", (str(tmp_path / "iter_0000005" / role),)) for role in ("actor", "critic")]
    log.clear()
    with pytest.raises(ValueError, match="seed: saved 5, now 6"):
        checkpoints(tmp_path, log, identity={"seed": 6}).load(tmp_path)
    assert log == [], "no role takes anything of another run"
