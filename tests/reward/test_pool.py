"""Chunks of samples on several processes; each test starts some, about 0.1 s each."""

import json
import signal
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import psutil
import pytest

from megarlhf.data.types import Prompt, Sample
from megarlhf.reward.pool import chunks
from megarlhf.reward.process import RewardProcess
from megarlhf.reward.scorer import RewardScorer
from tests.reward.samples import MakeScorer, samples, scored_by

# Rewards are lengths of responses; every call is noted in the file "calls" as its process and its responses.
NOTES = """
import json, os, pathlib, time
ME, NOTES = os.urandom(4).hex(), pathlib.Path(__file__).parent / "calls"
def reward_func(queries, prompts, labels):
    responses = [query[len(prompt):] for query, prompt in zip(queries, prompts)]
    with NOTES.open("a") as file:
        file.write(json.dumps([ME, responses]) + chr(10))
    for response in responses:
        if response.startswith("!"):
            exec(response[1:])
    return [len(response) for response in responses]
"""


def groups(*responses: Sequence[str]) -> list[Sample]:
    """Samples of as many prompts."""
    found = []
    for index, texts in enumerate(responses):
        prompt = Prompt(index=index, text=f"{index}: ", token_ids=np.array([1], dtype=np.int32), label=[index])
        found += [replace(sample, prompt=prompt, group_id=index) for sample in samples(*texts)]
    return found


def rewards(scorer: RewardScorer, scored: Sequence[Sample]) -> list[float | None]:
    return [sample.reward for sample in scored_by(scorer, scored)]


def calls(tmp_path: Path) -> list[tuple[str, list[str]]]:
    return [tuple(json.loads(line)) for line in (tmp_path / "calls").read_text().splitlines()]


@pytest.mark.parametrize(
    ("counts", "size", "max_size", "expected"),
    [
        ([2, 2, 2], 4, 4, ["aabb", "cc"]),
        ([2, 2, 2], 3, 4, ["aa", "bb", "cc"]),
        ([2, 2, 2], 100, 100, ["aabbcc"]),
        ([3, 1, 1], 1, 4, ["aaa", "b", "c"]),
        ([5, 1, 2], 2, 2, ["aa", "aa", "ab", "cc"]),
        ([4], 2, 2, ["aa", "aa"]),
        ([], 2, 2, []),
    ],
)
def test_chunks_keep_the_samples_of_a_prompt_together(
    counts: list[int], size: int, max_size: int, expected: list[str]
) -> None:
    given = groups(*[letter * count for letter, count in zip("abc", counts, strict=False)])
    found = ["".join(s.response_text for s in chunk) for chunk in chunks(given, size=size, max_size=max_size)]
    assert found == expected


def test_a_call_has_at_most_so_many_samples_and_they_come_in_order(make_scorer: MakeScorer, tmp_path: Path) -> None:
    scorer = make_scorer(NOTES, chunk_size=4)
    assert rewards(scorer, groups(["a", "bb"], ["ccc", "dddd", "eeeee"], ["f"])) == [1.0, 2.0, 3.0, 4.0, 5.0, 1.0]
    assert [texts for _, texts in calls(tmp_path)] == [["a", "bb"], ["ccc", "dddd", "eeeee", "f"]]
    assert len({process for process, _ in calls(tmp_path)}) == 1


def test_a_message_has_each_prompt_and_label_once(make_scorer: MakeScorer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The user's function gets one of each for every response all the same, and labels of its own to change."""
    sent: list[dict[str, Any]] = []
    request = RewardProcess.request

    def record(self: RewardProcess, message: dict[str, Any], *, timeout_seconds: float) -> dict[str, Any]:
        sent.append(message)
        return request(self, message, timeout_seconds=timeout_seconds)

    scorer = make_scorer(
        "def reward_func(queries, prompts, labels):\n"
        "    for label in labels: label.append(9)\n"
        "    assert queries == ['0: a', '0: b', '1: c'] and prompts == ['0: ', '0: ', '1: '], (queries, prompts)\n"
        "    return [10 * label[0] + len(label) for label in labels]"
    )
    monkeypatch.setattr(RewardProcess, "request", record)
    assert rewards(scorer, groups(["a", "b"], ["c"])) == [2.0, 2.0, 12.0]
    assert sent == [
        {
            "prompt_places": [0, 0, 1],
            "prompts": ["0: ", "1: "],
            "labels": [[0], [1]],
            "responses": ["a", "b", "c"],
            "stop_texts": ["", "", ""],
        }
    ]


def test_processes_score_side_by_side(make_scorer: MakeScorer, tmp_path: Path) -> None:
    """Each of three waits for the other two to have been called."""
    scorer = make_scorer(NOTES, num_workers=3)
    wait = "!while NOTES.read_text().count(chr(10)) < 3: time.sleep(0.01)"
    length = float(len(wait))
    assert rewards(scorer, groups([wait, "a"], [wait, "bb"], [wait, "ccc"])) == [length, 1.0, length, 2.0, length, 3.0]
    assert len({process for process, _ in calls(tmp_path)}) == 3
    assert scorer.last_failures == []


def test_a_process_that_dies_costs_its_own_sample_while_the_others_go_on(
    make_scorer: MakeScorer, tmp_path: Path
) -> None:
    """The first dies once the second has begun, which ends once the first has died and begun again."""
    scorer = make_scorer(NOTES, num_workers=2)
    die = "!while NOTES.read_text().count(chr(10)) < 2: time.sleep(0.01)\nos._exit(3)"
    wait = "!while NOTES.read_text().count(chr(10)) < 3: time.sleep(0.01)"
    found = rewards(scorer, groups(["a", die, "bb"], [wait, "ccc", ""]))
    assert found == [1.0, None, 2.0, float(len(wait)), 3.0, 0.0]
    assert [failure.partition(" (")[0] for failure in scorer.last_failures] == [
        "samples 0 to 2 in one call: ended its process",
        "sample 1: the reward ended its process",
    ]
    assert len({process for process, _ in calls(tmp_path)}) == 4, "two at first, and two after the deaths"


def test_after_two_hopeless_chunks_a_process_takes_no_more(make_scorer: MakeScorer, tmp_path: Path) -> None:
    """Nine processes die: of each of two chunks the call and three samples; the third chunk would be scored."""
    scorer = make_scorer(NOTES, chunk_size=5)
    die = ["!os._exit(1)"] * 5
    assert rewards(scorer, groups(die, die, ["a"])) == [None] * 11
    assert len(calls(tmp_path)) == 2 * 4
    assert scorer.last_failures[-1] == "sample 10: not tried after 2 chunks in a row in which calls hung or died"
    assert rewards(scorer, groups(die, ["a"], die, ["bb"])) == [None] * 5 + [1.0] + [None] * 5 + [2.0]


def test_code_that_only_some_processes_can_load_is_refused(make_scorer: MakeScorer) -> None:
    text = "import pathlib\npathlib.Path(__file__).with_suffix('.lock').touch(exist_ok=False)\n" + NOTES
    with pytest.raises(ValueError, match="reward_num_workers=2: .* in 1 of them: FileExistsError.*; set fewer"):
        make_scorer(text, num_workers=2)


def test_an_interruption_ends_all_processes_at_once(make_scorer: MakeScorer) -> None:
    others = set(psutil.Process().children(recursive=True))  # another test's ranks
    scorer = make_scorer(NOTES, num_workers=2)
    started = set(psutil.Process().children(recursive=True)) - others
    assert len(started) >= 2

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before, start = signal.signal(signal.SIGALRM, interrupt), time.monotonic()
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    try:
        with pytest.raises(KeyboardInterrupt):
            scored_by(scorer, groups(["!time.sleep(60)"], ["!time.sleep(60)"]))
    finally:
        signal.signal(signal.SIGALRM, before)
    assert time.monotonic() - start < 5.0
    assert not set(psutil.Process().children(recursive=True)) - others
    assert rewards(scorer, groups(["a"])) == [1.0]


def test_forgotten_scorers_end_their_processes(tmp_path: Path) -> None:
    others = set(psutil.Process().children())
    (tmp_path / "reward.py").write_text(NOTES)
    scorer = RewardScorer(
        function_path=str(tmp_path / "reward.py"), rule=None, rule_pattern=None, timeout_seconds=9.0, num_workers=2
    )
    scorer.check()
    assert len(set(psutil.Process().children()) - others) == 2
    del scorer
    assert not set(psutil.Process().children()) - others
