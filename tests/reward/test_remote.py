"""Servers of every protocol and in every state: what becomes of the samples, and when.

The servers are real ones, on the loopback interface.
"""

import json
import math
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megarlhf.data.types import Prompt, Rollout, Sample
from megarlhf.reward import remote as remote_module
from megarlhf.reward.remote import RemoteOptions, RemoteReward, read_answer
from tests.reward.servers import (
    answering,
    closing,
    plain,
    serving,
    slow,
    then_plain,
    today,
    with_prompts,
    write_certificate,
)

OPTIONS = RemoteOptions(
    token=None, timeout_seconds=20.0, batch_size=4, concurrency=2, max_retries=2, is_required=True
)
EXPECTED = [len("what is 0?ab") + 0.25, len("what is 0?abc") + 0.25, len("what is 17?ab") + 0.25]


def rollout(prompts: int = 2, each: int = 2) -> Rollout:
    """Samples of several prompts, of different lengths each."""
    found: list[Sample] = []
    for group in range(prompts):
        text = f"what is {17 * group}?"
        prompt = Prompt(index=group, text=text, token_ids=np.array([1], dtype=np.int32), label=str(group + 5))
        for place in range(each):
            one = Sample(
                prompt=prompt,
                group_id=group,
                sample_id=place,
                response_length=1,
                response_text="abc"[: 2 + place],
                finish_reason="stop",
                weight_version=0,
            )
            found.append(one)
    return Rollout(samples=found, tokens=())


@pytest.fixture
def make_remote(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., RemoteReward]]:
    monkeypatch.setattr(remote_module, "_BACK_OFF_SECONDS", 0.01)
    made = []

    def make(*urls: str, **options: Any) -> RemoteReward:
        made.append(RemoteReward("remote", urls, replace(OPTIONS, **options)))
        return made[-1]

    yield make
    for remote in made:
        remote.close()


def rewards(remote: RemoteReward, samples: Rollout) -> list[float | None]:
    return [reward for reward, _ in remote.score(samples).outcomes]


GOOD = {
    "OpenRLHF 0.5": plain,
    "OpenRLHF 0.5.6": with_prompts,
    "OpenRLHF today": today,
    "slow": slow(0.2),
    "500, then fine": then_plain(answering(500, b"oh"), times=2),
    "503, then fine": then_plain(answering(503, b"")),
    "429, then fine": then_plain(answering(429, b"busy")),
    "closed connection, then fine": then_plain(closing),
}
# What a server does, and of what samples have no reward then.
BAD: dict[str, tuple[Any, str]] = {
    "too slow": (slow(30.0), "no result within the 0.6 seconds of remote_rm_timeout_seconds"),
    "broken JSON": (answering(200, b'{"rewards": [1.0'), "answers what is no answer: no JSON"),
    "deep JSON": (answering(200, b"[" * 100_000), "answers what is no answer: no JSON"),
    "no rewards": (answering(200, {"scores": [1.0] * 4}), "no list of rewards"),
    "a list": (answering(200, [1.0] * 4), "no list of rewards"),
    "a number": (answering(200, {"rewards": 1.0}), "no list of rewards"),
    "too few": (answering(200, {"rewards": [1.0] * 3}), "3 rewards for 4 samples"),
    "too many": (answering(200, {"rewards": [1.0] * 5}), "5 rewards for 4 samples"),
    "NaN": (answering(200, {"rewards": [math.nan] * 4}), "the server answers nan, not a number"),
    "infinite": (answering(200, {"rewards": [-math.inf] * 4}), "the server answers -inf, not a number"),
    "huge": (answering(200, b'{"rewards": [1e999, 1e999, 1e999, 1e999]}'), "the server answers inf, not a number"),
    "a long integer": (answering(200, {"rewards": [10**400] * 4}), "the server answers 1000"),
    "text": (answering(200, {"rewards": ["1.0"] * 4}), "the server answers '1.0', not a number"),
    "yes or no": (answering(200, {"rewards": [True] * 4}), "the server answers True, not a number"),
    "lists": (answering(200, {"rewards": [[1.0]] * 4}), "the server answers [1.0], not a number"),
    "null": (answering(200, {"rewards": [None] * 4}), "the server answers None, not a number"),
    "null with a reason": (answering(200, {"rewards": [None] * 4, "reasons": ["odd"] * 4}), "odd"),
    "500": (answering(500, b"out of  memory\n"), "answers 500 Internal Server Error: out of memory"),
    "422": (answering(422, {"detail": "no"}), 'answers 422 Unprocessable Entity: {"detail": "no"}'),
    "wrong token": (answering(401, b""), "answers 401 Unauthorized"),
    "redirect": (answering(307, b"", location="http://127.0.0.1:1/x"), "answers 307 Temporary Redirect (redirects are"),
    "huge body": (answering(200, b" " * (1 << 21)), "answers more than 1048576 bytes"),
    "closed connection": (closing, "gives no answer (RemoteProtocolError"),
    "no HTTP": (lambda handler, asked: handler.wfile.write(b"hello\r\n\r\n"), "gives no answer (RemoteProtocolError"),
    "compressed": (answering(200, b"{}", **{"content-encoding": "gzip"}), "gives no answer (DecodingError"),
}
REPEATED = ("500", "closed connection", "no HTTP", "compressed")


@pytest.mark.parametrize("case", GOOD)
def test_samples_of_a_server_that_answers_have_its_rewards(make_remote: Any, case: str) -> None:
    with serving(GOOD[case]) as server:
        remote = make_remote(server.url)
        remote.check()
        assert rewards(remote, rollout())[:3] == EXPECTED
    asked = server.asked[-1]
    assert asked["prompts"] == ["what is 0?"] * 2 + ["what is 17?"] * 2
    assert asked["labels"] == ["5", "5", "6", "6"]
    assert asked["query"][1] == "what is 0?abc"


@pytest.mark.parametrize("case", BAD)
def test_samples_of_a_server_that_does_not_have_no_result_and_why(
    make_remote: Any, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    monkeypatch.setattr(remote_module, "MAX_ANSWER_BYTES", 1 << 20)
    reply, reason = BAD[case]
    with serving(reply) as server:
        remote = make_remote(server.url, timeout_seconds=0.6 if case == "too slow" else 20.0)
        started = time.monotonic()
        result = remote.score(rollout())
        assert time.monotonic() - started < 5
    assert [reward for reward, _ in result.outcomes] == [None] * 4
    assert all(reason in str(why) for _, why in result.outcomes), result.outcomes
    assert len(server.asked) == (3 if case in REPEATED else 1)


def test_a_reward_that_is_none_costs_its_own_sample_alone() -> None:
    answer = read_answer(b'{"rewards": [1, null, NaN, -2.5], "reasons": [null, "odd", null, null]}', 4)
    assert [reward for reward, _ in answer.outcomes] == [1.0, None, None, -2.5]
    assert [reason for _, reason in answer.outcomes][:2] == [None, "odd"]


def test_scores_and_further_numbers_come_along_for_every_sample(make_remote: Any) -> None:
    def reply(handler: Any, asked: Any) -> None:
        (answering(422, b"") if asked["labels"][0] in "57" else today)(handler, asked)

    with serving(reply) as server:
        result = make_remote(server.url, batch_size=2).score(rollout(prompts=4))
    lost = [True, True, False, False, True, True, False, False]
    assert [reward is None for reward, _ in result.outcomes] == lost
    assert set(result.logs) == {"scores", "label"}
    assert result.logs["scores"][2] == EXPECTED[2] / 2 and result.logs["scores"][7] == EXPECTED[2] / 2 + 0.5
    assert [score is None for score in result.logs["scores"]] == lost
    assert result.logs["label"] == [None, None, 6.0, 6.0, None, None, 8.0, 8.0]


def test_requests_go_to_all_servers_and_a_prompts_samples_stay_together(make_remote: Any) -> None:
    with serving(slow(0.05)) as one, serving(slow(0.05)) as two:
        samples = rollout(prompts=12)
        found = rewards(make_remote(one.url, two.url, batch_size=3), samples)
    assert found == [len(s.prompt.text + s.response_text) + 0.25 for s in samples.samples]
    asked = one.asked + two.asked
    assert len(asked) == 12 and all(len(set(request["prompts"])) == 1 for request in asked)
    assert min(len(one.asked), len(two.asked)) >= 3
    assert one.at_once == two.at_once == 2


def test_a_batch_of_one_prompt_is_cut_at_the_batch_size(make_remote: Any) -> None:
    with serving(plain) as server:
        assert None not in rewards(make_remote(server.url, batch_size=4), rollout(prompts=1, each=10))
    assert sorted(len(request["query"]) for request in server.asked) == [2, 4, 4]


def test_connections_are_used_again(make_remote: Any) -> None:
    with serving(plain) as server:
        remote = make_remote(server.url, batch_size=2, concurrency=1)
        for _ in range(3):
            remote.score(rollout(prompts=4))
    assert len(server.asked) == 12 and len(server.peers) == 1


def test_another_server_takes_over_where_one_fails(make_remote: Any) -> None:
    with serving(answering(500, b"")) as broken, serving(plain) as good:
        assert None not in rewards(make_remote(broken.url, good.url, batch_size=2), rollout(prompts=8))
    assert broken.asked and len(good.asked) == 8


def test_back_off_doubles_and_varies(make_remote: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    monkeypatch.setattr(remote_module.asyncio, "sleep", sleep)
    monkeypatch.setattr(remote_module, "_BACK_OFF_SECONDS", 0.5)
    with serving(answering(503, b"")) as server:
        remote = make_remote(server.url, max_retries=7)
        remote.score(rollout())
        remote.score(rollout())
    assert len(server.asked) == 16
    for place, base in enumerate([0.5, 1.0, 2.0, 4.0, 8.0, 10.0, 10.0]):
        assert base / 2 <= waits[place] <= base * 1.5
        assert waits[place] != waits[place + 7]


def test_a_server_killed_in_a_batch_ends_it_within_the_limit(make_remote: Any) -> None:
    """The connections break, then nobody listens; what was answered before stays."""
    stop = threading.Event()

    def reply(handler: Any, asked: Any) -> None:
        if not asked["labels"] or asked["labels"][0] == "5":
            return plain(handler, asked)
        stop.wait(10)
        handler.connection.shutdown(socket.SHUT_RDWR)
        handler.close_connection = True

    with serving(reply) as server:
        remote = make_remote(server.url, batch_size=2, concurrency=4, timeout_seconds=20.0)
        remote.check()
        found: list[Any] = []
        thread = threading.Thread(target=lambda: found.append(remote.score(rollout(prompts=4))))
        thread.start()
        while len(server.asked) < 4:
            time.sleep(0.01)
    stop.set()
    started = time.monotonic()
    thread.join(20)
    assert time.monotonic() - started < 5
    outcomes = found[0].outcomes
    assert [reward is None for reward, _ in outcomes] == [False] * 2 + [True] * 6
    assert all("gives no answer (" in reason for _, reason in outcomes[2:])


def test_another_threads_score_ends_when_the_source_is_closed(make_remote: Any) -> None:
    with serving(slow(30.0)) as server:
        remote = make_remote(server.url)
        ended: list[BaseException] = []

        def score() -> None:
            try:
                remote.score(rollout())
            except BaseException as error:
                ended.append(error)

        thread = threading.Thread(target=score)
        thread.start()
        while not server.asked:
            time.sleep(0.01)
        remote.close()
        thread.join(5)
        assert not thread.is_alive() and len(ended) == 1
    with serving(plain) as server:
        again = make_remote(server.url)
        again.score(rollout())
        again.close()
        assert None not in rewards(again, rollout())


def test_one_limit_holds_for_all_requests(make_remote: Any) -> None:
    """Two rounds of requests fit, the others have no time."""
    with serving(slow(0.3)) as server:
        remote = make_remote(server.url, batch_size=2, concurrency=1, timeout_seconds=0.75)
        started = time.monotonic()
        found = rewards(remote, rollout(prompts=6))
        assert time.monotonic() - started < 1.2
    assert [reward is None for reward in found] == [False] * 4 + [True] * 8


def test_the_token_is_sent_and_not_to_where_a_redirect_leads(make_remote: Any) -> None:
    with serving(plain) as other:
        with serving(answering(308, b"", location=other.url)) as server:
            remote = make_remote(server.url, token="s3cret")
            assert rewards(remote, rollout()) == [None] * 4
    assert server.headers[0]["authorization"] == "Bearer s3cret"
    assert not other.headers


def test_a_certificate_that_nobody_vouches_for_is_refused(
    make_remote: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    certificate = write_certificate(tmp_path / "certificate.pem")
    with serving(plain, certificate) as server:
        with pytest.raises(ValueError, match=f"={server.url} cannot be reached .*CERTIFICATE_VERIFY_FAILED"):
            make_remote(server.url).check()
        assert not server.headers
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        assert None not in rewards(make_remote(server.url), rollout())


def test_a_proxy_of_the_environment_is_not_asked_for_this_machine(
    make_remote: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.delenv("no_proxy", raising=False)
    with serving(plain) as server:
        assert None not in rewards(make_remote(server.url), rollout())


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        (answering(401, b""), "answers 401 Unauthorized: set the token that it asks for in MEGARLHF_RM_TOKEN"),
        (answering(404, b""), "answers 404 Not Found: correct the path"),
        (answering(503, {"detail": "loading"}), 'answers 503 Service Unavailable: {"detail": "loading"}: wait'),
        (answering(302, b"", location="/"), "answers 302 Found (redirects are not followed): set the address"),
        (closing, "cannot be reached ("),
    ],
)
def test_set_up_tells_of_servers_that_cannot_serve(make_remote: Any, reply: Any, said: str) -> None:
    with serving(reply) as server, serving(plain) as good:
        with pytest.raises(ValueError) as error:
            make_remote(good.url, server.url).check()
    assert str(error.value).startswith(f"remote_rm_url={server.url} {said}")
    assert good.url not in str(error.value)


@pytest.mark.parametrize("reply", [plain, answering(500, b"IndexError")])
def test_set_up_passes_servers_that_fail_at_nothing_to_score(make_remote: Any, reply: Any) -> None:
    with serving(reply) as server:
        make_remote(server.url).check()


def test_set_up_tells_of_a_server_that_is_not_there(make_remote: Any, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ValueError, match="=http://127.0.0.1:9/x cannot be reached .*ConnectError.*: start the server"):
        make_remote("http://127.0.0.1:9/x").check()
    make_remote("http://127.0.0.1:9/x", is_required=False).check()
    assert "remote_rm_url=http://127.0.0.1:9/x cannot be reached" in caplog.text


def test_labels_of_every_kind_arrive(make_remote: Any) -> None:
    labels: Sequence[Any] = [None, 7.5, ["a", {"b": [1]}], "ü\ud800"]
    samples = rollout(prompts=4, each=1).samples
    samples = [replace(s, prompt=replace(s.prompt, label=label)) for s, label in zip(samples, labels, strict=True)]
    with serving(plain) as server:
        assert None not in rewards(make_remote(server.url), Rollout(samples=samples, tokens=()))
    assert json.dumps(server.asked[0]["labels"]) == json.dumps(labels)
