"""The server of rewards as a program: OpenRLHF's clients, ours, its limits, and its end."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from examples.demo.make_assets import make_tokenizer
from megarlhf.cli.main import main
from megarlhf.reward.remote import NULL_HEADER, RemoteReward
from tests.reward.servers import write_certificate
from tests.reward.test_remote import OPTIONS, rollout
from tests.tiny_models import make_reward_model

ROOT = Path(__file__).resolve().parents[2]
# Rewards are lengths; the number of the call and of its queries is kept beside, and what responses say is done.
REWARD = """
import json, pathlib, time
def reward_func(queries, prompts, labels):
    with open(pathlib.Path(__file__).with_name("calls.jsonl"), "a") as calls:
        print(json.dumps([queries, prompts, labels]), file=calls)
    for query in queries:
        if "sleep" in query:
            time.sleep(float(query.split("sleep")[1].split()[0]))
    return [None if "lost" in query else len(query) + 0.25 for query in queries]
"""


def wait_until(happens: Callable[[], bool]) -> None:
    """Raises AssertionError where it does not within 20 seconds."""
    end = time.monotonic() + 20
    while not happens():
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.01)


class Server:
    """A server in a process of its own."""

    def __init__(self, directory: Path, *flags: str, token: str = "", reward: str = REWARD) -> None:
        (directory / "reward.py").write_text(reward)
        self.directory = directory
        has_scorer = {"--reward_rule", "--reward_pretrain"} & {*flags}
        code = [] if has_scorer else ["--reward_function", str(directory / "reward.py")]
        command = [sys.executable, "-m", "megarlhf.cli.serve_rm", "--port", "0", *code, *flags]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "MEGARLHF_RM_TOKEN": token}
        self.process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.said = next((line for line in self.process.stdout if "ready" in line), "")
        self.url = self.said.rpartition(" ")[2].strip()
        headers = {"authorization": f"Bearer {token}"} if token else {}
        self.client = httpx.Client(trust_env=False, timeout=20, headers=headers)

    def ask(self, body: Any, **headers: str) -> httpx.Response:
        return self.client.post(self.url, json=body, headers=headers)

    def calls(self) -> list[Any]:
        """Arguments of each call of the reward function."""
        path = self.directory / "calls.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.client.close()
        self.process.send_signal(number)
        try:
            return self.process.wait(20)
        finally:
            self.process.kill()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Small limits, and a token."""
    flags = ("--max_queries=6", "--max_len=20", "--max_body_mib=1", "--max_batch_tokens=30", "--max_waiting_queries=8")
    made = Server(tmp_path_factory.mktemp("server"), *flags, token="s3cret")
    yield made
    assert made.stop() == 0


def openrlhf(server: Server, data: dict[str, Any]) -> dict[str, Any]:
    """What OpenRLHF's clients do with an answer."""
    response = server.ask(data)
    response.raise_for_status()
    answer: dict[str, Any] = response.json()
    assert all(type(reward) is float for reward in answer["rewards"])
    return answer


def test_clients_of_openrlhf_05(server: Server) -> None:
    assert openrlhf(server, {"query": ["ab", "abcd"]}) == {"rewards": [2.25, 4.25]}
    assert server.calls()[-1] == [["ab", "abcd"], ["", ""], [None, None]]


def test_clients_of_openrlhf_056(server: Server) -> None:
    asked = {"query": ["ab", "<s>abcd"], "prompts": ["a", "ab"]}
    assert openrlhf(server, asked) == {"rewards": [2.25, 7.25]}
    assert server.calls()[-1] == [["ab", "<s>abcd"], ["a", "<s>ab"], [None, None]]


def test_clients_of_openrlhf_today(server: Server) -> None:
    labels = ["x", {"y": [1, None]}, 7]
    asked = {"query": ["ab", "abcd", "abcde"], "prompts": ["a", "a", "abc"], "labels": labels}
    rewards = [2.25, 4.25, 5.25]
    assert openrlhf(server, asked) == {"rewards": rewards, "scores": rewards, "extra_logs": {}}
    assert server.calls()[-1] == [asked["query"], asked["prompts"], labels]
    # Its client divides the queries of a batch among its servers, some of which get none.
    empty: dict[str, list[str]] = {"query": [], "prompts": [], "labels": []}
    assert openrlhf(server, empty) == {"rewards": [], "scores": [], "extra_logs": {}}


def test_our_client(server: Server) -> None:
    remote = RemoteReward("remote", [server.url], replace(OPTIONS, token="s3cret"))
    try:
        remote.check()
        samples = rollout(prompts=3)
        lost = replace(samples.samples[3], response_text="lost")
        samples = replace(samples, samples=[*samples.samples[:3], lost, *samples.samples[4:]])
        result = remote.score(samples)
    finally:
        remote.close()
    expected = [len(s.prompt.text + s.response_text) + 0.25 for s in samples.samples]
    assert [r for r, _ in result.outcomes] == [*expected[:3], None, *expected[4:]]
    assert result.outcomes[3][1] == "reward_func returned None, not a finite number"
    assert result.logs["scores"][4:] == expected[4:] and result.logs["scores"][3] is None


def test_a_query_without_a_result_fails_the_request_and_says_why(server: Server) -> None:
    response = server.ask({"query": ["ab", "lost", "lost"]})
    said = "2 of 3 have no reward, query[1] first: reward_func returned None, not a finite number"
    assert (response.status_code, response.json()) == (500, {"detail": said})


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ({"query": ["a"] * 7}, 413, "7 queries in a request are more than max_queries=6"),
        ({"query": ["a", "b" * 81, "c" * 90]}, 413, "query[1] has 21, query[2] has 23 tokens, more than max_len=20"),
        ({"query": ["a"], "prompts": []}, 422, "0 prompts for 1 queries"),
        ({"query": ["a"], "prompts": ["a"], "labels": [1, 2]}, 422, "2 labels for 1 queries"),
        ({"query": ["ab", "ab"], "prompts": ["a", "c"]}, 422, "prompts[1] is not in query[1]"),
        ({"query": "a"}, 422, "query: Input should be a valid array"),
        ({"query": ["a", 1]}, 422, "query.1: Input should be a valid string"),
        ({"prompts": ["a"]}, 422, "query: Field required"),
        (["a"], 422, "Input should be an object"),
    ],
)
def test_what_is_too_much_or_no_request(server: Server, body: Any, status: int, said: str) -> None:
    calls = len(server.calls())
    response = server.ask(body)
    assert response.status_code == status and said in response.json()["detail"], response.text
    assert len(server.calls()) == calls


def test_a_query_that_is_too_long_costs_no_other_where_null_is_accepted(server: Server) -> None:
    body = {"query": ["ab", "b" * 81, "abcd", "c" * 90], "labels": [1, 2, 3, 4]}
    response = server.client.post(server.url, json=body, headers={NULL_HEADER: "1"})
    answer = response.json()
    assert response.status_code == 200, response.text
    scored = server.client.post(server.url, json={"query": ["ab", "abcd"], "labels": [1, 3]}).json()["rewards"]
    assert answer["rewards"] == [scored[0], None, scored[1], None] and scored[0] != scored[1]
    assert answer["reasons"][1] == "it has 21 tokens, more than max_len=20" and answer["reasons"][2] is None
    assert [len(values) for values in answer["extra_logs"].values()] == [4] * len(answer["extra_logs"])
    response = server.client.post(server.url, json={"query": ["b" * 81]}, headers={NULL_HEADER: "1"})
    assert response.json()["rewards"] == [None]


def test_at_the_limits(server: Server) -> None:
    assert server.ask({"query": ["a" * 80] * 6}).status_code == 200


def test_no_json_and_long_bodies(server: Server) -> None:
    assert server.client.post(server.url, content=b'{"query": [').status_code == 422
    body = json.dumps({"query": ["a"], "more": "x" * (1 << 20)}).encode()
    response = server.client.post(server.url, content=body)
    assert response.status_code == 413 and "longer than 1048576 bytes" in response.text
    pieces = (body[i : i + 65536] for i in range(0, len(body), 65536))  # without a length in the header
    assert server.client.post(server.url, content=pieces).status_code == 413
    assert server.ask({"query": ["a"]}).status_code == 200


@pytest.mark.parametrize("given", [None, "", "Bearer", "Bearer wrong", "Bearer s3cret2", "Basic s3cret", "Bearer ü"])
def test_without_the_token_there_is_no_answer(server: Server, given: str | None) -> None:
    headers = {} if given is None else {"authorization": given.encode("latin-1")}
    response = httpx.post(server.url, json={"query": ["a"]}, headers=headers, trust_env=False)
    assert response.status_code == 401 and response.headers["www-authenticate"] == "Bearer"


def test_health_asks_for_no_token(server: Server) -> None:
    url = server.url.replace("get_reward", "health")
    assert httpx.get(url, trust_env=False).json() == {"status": "ready", "waiting": 0}
    assert httpx.get(url.replace("health", "docs"), trust_env=False).status_code == 404


def test_requests_that_wait_are_scored_together_as_one_by_one(server: Server) -> None:
    """Of 30 tokens a batch has three of four requests of 8 tokens each; values are those of each alone."""
    queries = [[letter * length] for letter, length in zip("abcd", (32, 31, 30, 29), strict=True)]
    alone = [openrlhf(server, {"query": query})["rewards"] for query in queries]
    calls = len(server.calls())
    with ThreadPoolExecutor(8) as pool:
        first = pool.submit(server.ask, {"query": ["sleep 0.5 "]})
        wait_until(lambda: len(server.calls()) > calls)
        together = list(pool.map(lambda query: openrlhf(server, {"query": query})["rewards"], queries))
        assert first.result().json() == {"rewards": [10.25]}
    assert together == alone
    assert [len(call[0]) for call in server.calls()[calls:]] == [1, 3, 1]


def test_who_comes_when_too_many_wait_is_sent_away(server: Server) -> None:
    calls = len(server.calls())
    with ThreadPoolExecutor(8) as pool:
        first = pool.submit(server.ask, {"query": ["sleep 0.5 "]})
        wait_until(lambda: len(server.calls()) > calls)
        waiting = pool.submit(server.ask, {"query": ["a"] * 6})
        health = server.url.replace("get_reward", "health")
        wait_until(lambda: server.client.get(health).json()["waiting"] == 6)
        refused = server.ask({"query": ["b"] * 3})
        assert refused.status_code == 429 and refused.headers["retry-after"] == "1"
        assert "6 queries wait already" in refused.json()["detail"]
        fits = pool.submit(server.ask, {"query": ["b"] * 2})
        assert [f.result().status_code for f in (first, waiting, fits)] == [200, 200, 200]


def test_what_a_client_that_has_gone_wanted_is_not_scored(server: Server) -> None:
    calls = len(server.calls())
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(server.ask, {"query": ["sleep 0.5 "]})
        wait_until(lambda: len(server.calls()) > calls)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(
                server.url,
                json={"query": ["gone"]},
                headers={"authorization": "Bearer s3cret"},
                timeout=0.2,
                trust_env=False,
            )
        assert first.result().status_code == 200
    assert openrlhf(server, {"query": ["after"]}) == {"rewards": [5.25]}
    assert [call[0] for call in server.calls()[calls:]] == [["sleep 0.5 "], ["after"]]


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_it_stops_when_what_it_has_accepted_is_answered(tmp_path: Path, number: int) -> None:
    server = Server(tmp_path, "--max_batch_tokens=4", "--max_len=4")  # one query in a batch
    assert server.said.startswith("megarlhf serve-rm: ready at http://127.0.0.1:")
    with ThreadPoolExecutor(4) as pool:
        accepted = [pool.submit(server.ask, {"query": [f"sleep 0.6 {letter}"]}) for letter in "ab"]
        wait_until(lambda: bool(server.calls()))
        time.sleep(0.1)  # the second one waits
        server.process.send_signal(number)
        wait_until(lambda: not _listens(server.url))
        assert [one.result().json() for one in accepted] == [{"rewards": [11.25]}] * 2
    assert server.process.wait(10) == 0
    assert server.process.stdout is not None and "all that was accepted is answered" in server.process.stdout.read()
    server.client.close()


def test_until_the_code_is_loaded_it_is_not_ready_and_code_that_fails_ends_it(tmp_path: Path) -> None:
    port = _free_port()
    reward = f"import time; time.sleep(1.5)\n{REWARD}\nassert False, 'it is broken'"
    found: list[Any] = []

    def ask() -> None:
        """Until the server answers at all."""
        for path, method in (("health", "GET"), ("get_reward", "POST")):
            while True:
                try:
                    url = f"http://127.0.0.1:{port}/{path}"
                    found.append(httpx.request(method, url, json={"query": ["a"]}, trust_env=False))
                    break
                except httpx.ConnectError:
                    time.sleep(0.02)

    thread = threading.Thread(target=ask)
    thread.start()
    (tmp_path / "reward.py").write_text(reward)
    flags = [f"--port={port}", f"--reward_function={tmp_path}/reward.py"]
    command = [sys.executable, "-m", "megarlhf.cli.serve_rm", *flags]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    thread.join()
    assert [(one.status_code, one.json()) for one in found] == [
        (503, {"status": "loading"}),
        (503, {"detail": "the server is not ready yet"}),
    ]
    assert ended.returncode == 2 and "cannot be loaded" in ended.stderr and "it is broken" in ended.stderr
    assert ended.stdout == ""


def test_a_rule_over_https(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    certificate = write_certificate(tmp_path / "c.pem")
    flags = ("--reward_rule", "exact_match", "--stop_texts", "</s>", f"--ssl_certfile={certificate}")
    server = Server(tmp_path, *flags)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    remote = RemoteReward("remote", [server.url], OPTIONS)
    try:
        samples = rollout(prompts=1, each=2).samples  # the label is 5
        samples = [replace(s, response_text=text) for s, text in zip(samples, ("5</s>", "6</s>"), strict=True)]
        assert server.url.startswith("https://127.0.0.1:")
        assert remote.score(replace(rollout(), samples=samples)).outcomes == [(1.0, None), (0.0, None)]
    finally:
        remote.close()
        assert server.stop() == 0


@pytest.mark.slow  # it loads a model on two ranks
@pytest.mark.parametrize("flags", [(), ("--reward_num_gpus_per_node=2", "--reward_pipeline_model_parallel_size=2")])
def test_a_reward_model_gives_the_scores_of_transformers(tmp_path: Path, flags: tuple[str, ...]) -> None:
    tokenizer = make_tokenizer()
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 64, "eos_token_id": 2}
    directory = make_reward_model(tmp_path / "rm", entries={"mean": 0.25, "std": 0.5}, **sizes)
    tokenizer.save_pretrained(directory)
    model = AutoModelForSequenceClassification.from_pretrained(directory, dtype=torch.float32).eval()

    def expected(text: str) -> float:
        with torch.no_grad():
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            return (float(model(torch.tensor([ids])).logits) - 0.25) / 0.5

    queries = ["1+2=3</s>", "1+2=41", "1+2=4</s><pad>", "17-9", "1+2=3</s>"]
    whole = ["1+2=3</s>", "1+2=41</s>", "1+2=4</s>", "17-9</s>", "1+2=3</s>"]
    given = ("--reward_pretrain", str(directory), "--normalize_reward", "--max_len=64", *flags)
    server = Server(tmp_path, *given)
    try:
        answer = openrlhf(server, {"query": queries})
        assert answer["rewards"] == pytest.approx([expected(text) for text in whole], abs=1e-5)
        prompts = ["1+2=", "1+2=", "1+2=", "17", "1+2="]
        reasons = ["stop", "length", "stop", "length", "stop"]
        answer = openrlhf(server, {"query": queries, "prompts": prompts, "finish_reasons": reasons})
        cut = [whole[0], "1+2=41", whole[2], "17-9", whole[4]]
        assert answer["rewards"] == pytest.approx([expected(text) for text in cut], abs=1e-5)
        alone = [openrlhf(server, {"query": [text]})["rewards"][0] for text in whole]
        assert alone == pytest.approx([expected(text) for text in whole], abs=1e-5)
        long = server.ask({"query": ["1", "2" * 64]})
        assert long.status_code == 413 and "query[1] has 65 tokens, more than max_len=64" in long.text
        for worker in psutil.Process(server.process.pid).children(recursive=True):
            worker.kill()
        lost = server.ask({"query": ["1+2"]})
        assert lost.status_code == 500 and "scoring failed: reward rank 0 died" in lost.json()["detail"]
        assert server.process.wait(20) == 1
    finally:
        server.stop()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ((), "reward_pretrain=None, reward_function=None and reward_rule=None (one of them scores)"),
        (("--reward_rule=math", "--reward_pretrain=/none"), "reward_pretrain=/none is not a local directory"),
        (("--reward_pretrain=a,b",), "reward_pretrain=a,b names several models (a server has one)"),
        (("--reward_rule=math", "--reward_pipeline_model_parallel_size=2"), "reward_pipeline_model_parallel_size=(2,)"),
        (("--reward_rule=math", "--max_batch_tokens=9"), "max_batch_tokens=9 is below max_len=2048"),
        (("--reward_rule=math", "--host=0.0.0.0"), "host=0.0.0.0 is open to other machines, and nothing"),
        (("--reward_rule=math", "--port=70000"), "port=70000 must be from 0 to 65535"),
        (("--reward_rule=math", "--max_body_mib=0"), "max_body_mib=0 must be at least 1"),
        (("--reward_rule=format",), "reward_format=None with reward_rule=format"),
        (("--reward_rule=math", "--ssl_keyfile=/none"), "ssl_keyfile=/none is ignored without ssl_certfile"),
        (("--reward_rule=math", "--ssl_certfile=/none"), "ssl_certfile=/none is not a file"),
        (("--reward_rule=math", "--max_waiting_queries=5"), "max_waiting_queries=5 is below max_queries=1024"),
        (("--reward_function=/none.py", "--stop_texts", "x"), "stop_texts=x is ignored without reward_rule"),
        (("--reward_function=/none.py",), "reward_function=/none.py is not a Python file"),
    ],
)
def test_bad_flags(
    flags: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MEGARLHF_RM_TOKEN", raising=False)
    assert main(["serve-rm", *flags]) == 2
    assert f"megarlhf serve-rm: error: {said}" in capsys.readouterr().err.replace("\n", "\nmegarlhf serve-rm: error: ")


def test_a_port_that_is_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve_rm", "--reward_rule=math", f"--port={port}"]) == 2
    assert f"host=127.0.0.1 port={port} cannot be listened at" in capsys.readouterr().err


def _listens(url: str) -> bool:
    try:
        socket.create_connection(("127.0.0.1", httpx.URL(url).port or 0)).close()
    except ConnectionRefusedError:
        return False
    return True


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])
