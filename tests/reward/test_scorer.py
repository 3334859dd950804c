"""Reward code that raises, hangs, dies or answers nonsense costs its own samples a result, and nothing else.

Each test starts Python processes, about 0.1 s each.
"""

import os
import select
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from megarlhf.reward import pool as pool_module
from megarlhf.reward import process as process_module
from megarlhf.reward import scorer as scorer_module
from megarlhf.reward.scorer import RewardScorer
from tests.reward.samples import MakeScorer, samples, scored_by

ROOT = Path(__file__).resolve().parents[2]


def rewards(scorer: RewardScorer, *responses: str) -> list[float | None]:
    return [sample.reward for sample in scored_by(scorer, samples(*responses))]


# A reward function whose verdict is in the response: it runs `exec` on it, or gives its length.
PER_SAMPLE = """
import os, time
calls = []
def reward_func(queries, prompts, labels):
    calls.append(len(queries))
    out = []
    for query, prompt in zip(queries, prompts):
        response = query[len(prompt):]
        if response.startswith("!"):
            exec(response[1:])
        out.append(len(response))
    return out
"""

# A reward function that answers in place of the worker: responses that begin with "!" are written, as Latin-1, into
# the socket that it finds, with the number of the call in them.
INTRUDER = """
import os, stat, time
def is_socket(fd):
    try:
        return stat.S_ISSOCK(os.fstat(fd).st_mode)
    except OSError:
        return False
calls = 0
def reward_func(queries, prompts, labels):
    global calls
    calls += 1
    for query, prompt in zip(queries, prompts):
        if query[len(prompt):].startswith("!"):
            text = query[len(prompt) + 1:].replace("NUMBER", str(calls + 1)).encode("latin-1")
            fd = next(filter(is_socket, range(3, 32)))
            os.write(fd, text)
    return [len(query) - len(prompt) for query, prompt in zip(queries, prompts)]
"""

TRAINER = """
import sys
from megarlhf.reward.process import RewardProcess
process = RewardProcess()
process.start()
load = {"function_path": sys.argv[1], "rule": None, "rule_pattern": None}
process.request(load, timeout_seconds=60)
call = {"responses": [""], "stop_texts": [""], "prompt_places": [0], "prompts": [""], "labels": [""]}
process.request(call, timeout_seconds=60)
"""


def test_scores_and_leaves_the_rest_of_the_sample_alone(make_scorer: MakeScorer) -> None:
    scorer = make_scorer(
        "def reward_func(queries, prompts, labels):\n"
        "    return {'rewards': [len(q) + 10 * len(p) + 100 * int(l) for q, p, l in zip(queries, prompts, labels)]}"
    )
    before = samples("a", "bc")
    after = scored_by(scorer, before)
    assert [sample.reward for sample in after] == [734.0, 735.0]
    assert [sample.response_text for sample in after] == ["a", "bc"]
    assert before[0].reward is None
    assert scorer.last_failures == []
    assert scored_by(scorer, []) == []
    other = replace(before[1].prompt, text="a longer prompt", label="9")  # each sample with its own prompt and label
    mixed = [before[0], replace(before[1], prompt=other)]
    assert [sample.reward for sample in scored_by(scorer, mixed)] == [734.0, 17 + 10 * 15 + 900.0]


@pytest.mark.parametrize(
    "expression",
    ["numpy.array([1.0, 2.0])", "[numpy.float32(1), True + 1]", "(1, 2)", "{'rewards': numpy.arange(1, 3)}"],
)
def test_other_kinds_of_numbers(make_scorer: MakeScorer, expression: str) -> None:
    scorer = make_scorer(f"import numpy\ndef reward_func(queries, prompts, labels): return {expression}")
    assert rewards(scorer, "a", "b") == [1.0, 2.0]


def test_tensors(make_scorer: MakeScorer) -> None:
    """Importing torch in the reward process takes seconds."""
    scorer = make_scorer("import torch\ndef reward_func(q, p, l): return torch.tensor([0.5] * len(q))")
    assert rewards(scorer, "a", "b") == [0.5, 0.5]


def test_one_sample_that_raises_costs_only_itself(make_scorer: MakeScorer) -> None:
    scorer = make_scorer(PER_SAMPLE)
    assert rewards(scorer, "a", "!raise KeyError('boom')", "!raise SystemExit(2)", "abc") == [1.0, None, None, 3.0]
    batch, first, second = scorer.last_failures
    assert batch == "samples 0 to 3 in one call: the reward raised KeyError: 'boom'"
    assert first == "sample 1: the reward raised KeyError: 'boom'"
    assert second == "sample 2: the reward raised SystemExit: 2"
    assert rewards(scorer, "a") == [1.0]
    assert scorer.last_failures == []


def test_hang_costs_its_sample_after_the_limit(make_scorer: MakeScorer) -> None:
    """Waits for the limit of 1 s twice: once for the batch, once for the sample."""
    scorer = make_scorer(PER_SAMPLE, timeout_seconds=1.0)
    start = time.monotonic()
    assert rewards(scorer, "a", "!time.sleep(60)", "abc") == [1.0, None, 3.0]
    assert 2.0 <= time.monotonic() - start < 10.0
    assert "limit of 1 seconds" in scorer.last_failures[-1]


def test_dead_process_costs_its_sample_and_is_replaced(make_scorer: MakeScorer) -> None:
    scorer = make_scorer(PER_SAMPLE)
    assert rewards(scorer, "a", "!os._exit(3)", "!os.kill(os.getpid(), 11)", "abc") == [1.0, None, None, 3.0]
    assert "exit status 3" in scorer.last_failures[1]
    assert "SIGSEGV" in scorer.last_failures[2]


def test_process_that_dies_between_calls_is_replaced(make_scorer: MakeScorer) -> None:
    others = set(psutil.Process().children())  # another test's ranks
    scorer = make_scorer("calls = []\ndef reward_func(q, p, l): calls.append(1); return [len(calls)] * len(q)")
    assert rewards(scorer, "a") + rewards(scorer, "a") == [1.0, 2.0]
    (outermost,) = set(psutil.Process().children()) - others
    (outermost.children(recursive=True) or [outermost])[-1].kill()  # the last one started runs the reward code
    os.waitid(os.P_PID, outermost.pid, os.WEXITED | os.WNOWAIT)
    assert rewards(scorer, "a") == [1.0]
    assert scorer.last_failures == []


@pytest.mark.parametrize(
    "garbage",
    [
        "no JSON\n",
        "unfinished",
        "\xff\xfe\n",
        "[1.0]\n",
        "3\n",
        "[" * 20_000 + "\n",
        "x" * 60_000,
        '{"rewards": [1.0], "reasons": [null]}\n',
        '{"id": 1, "ready": true}\n',
        '{"id": NUMBER}\n',
        '{"id": NUMBER, "error": 3}\n',
        '{"id": NUMBER, "rewards": [], "reasons": []}\n',
        '{"id": NUMBER, "rewards": {"0": 1.0}, "reasons": [null]}\n',
        '{"id": NUMBER, "rewards": [1.0, 2.0, 3.0], "reasons": [null]}\n',
        '{"id": NUMBER, "rewards": ["1.0"], "reasons": [null]}\n',
        '{"id": NUMBER, "rewards": [NaN], "reasons": [null]}\n',
        '{"id": NUMBER, "rewards": [null], "reasons": [null]}\n',
        '{"id": NUMBER, "rewards": [true], "reasons": [null]}\n',
    ],
    ids=lambda garbage: garbage[:30].strip(),
)
def test_garbage_in_the_pipe_is_no_result(
    make_scorer: MakeScorer, monkeypatch: pytest.MonkeyPatch, garbage: str
) -> None:
    monkeypatch.setattr(process_module, "_MAX_ANSWER_BYTES", 50_000)
    scorer = make_scorer(INTRUDER)
    assert rewards(scorer, "a", "!" + garbage, "abc") == [1.0, None, 3.0]
    _, own = scorer.last_failures
    assert own.startswith("sample 1: the reward wrote into the pipe of its process's answers (")
    assert rewards(scorer, "ab") == [2.0]


def test_an_answer_left_over_is_not_that_of_the_next_call(make_scorer: MakeScorer) -> None:
    """A whole answer of the right shape, and the real one 0.3 s after it, which then waits in the pipe."""
    scorer = make_scorer(INTRUDER.replace("os.write(fd, text)", "os.write(fd, text); time.sleep(0.3)"))
    forged = '!{"id": NUMBER, "rewards": [9.0], "reasons": [null]}\n'
    assert rewards(scorer, forged) == [9.0]
    assert rewards(scorer, "ab") == [2.0]
    assert rewards(scorer, "abc") == [3.0]


def test_code_that_can_no_longer_be_loaded_gives_no_results_until_it_can(
    make_scorer: MakeScorer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    scorer = make_scorer(PER_SAMPLE)
    (tmp_path / "my_reward.py").write_text("import no_such_module")
    assert rewards(scorer, "a", "!os._exit(1)", "abc", "abc", "abc") == [None] * 5
    assert "the reward code cannot be loaded any more: ModuleNotFoundError" in scorer.last_failures[1]
    assert "5 of 5 samples have no reward from function: 3 x the reward code cannot be loaded any more" in caplog.text
    (tmp_path / "my_reward.py").write_text(PER_SAMPLE)
    assert rewards(scorer, "abc") == [3.0]


def test_the_whole_call_has_one_limit(make_scorer: MakeScorer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes its limit of 1.5 s: 1 to start, half a second for one chunk; what is scored one by one takes 0.4 each."""
    scorer = make_scorer(PER_SAMPLE, timeout_seconds=0.5)
    monkeypatch.setattr(scorer_module, "LOAD_TIMEOUT_SECONDS", 1.0)
    monkeypatch.setattr(scorer_module, "SINGLE_CALLS", 0)
    slow, start = "!time.sleep(0.4)", time.monotonic()
    found = rewards(scorer, "!raise KeyError", *[slow] * 5)
    assert found == [None, 16.0, 16.0, 16.0, None, None]
    assert 1.5 <= time.monotonic() - start < 3.0
    late = "no result within the 1.5 seconds for all samples: raise reward_timeout_seconds"
    assert scorer.last_failures[-2:] == [f"sample 4: {late}", f"sample 5: {late}"]


def test_the_limit_grows_with_the_chunks_of_one_process(
    make_scorer: MakeScorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Takes 1.6 s: four chunks of 0.4 s, where one chunk may take 1.5 s with the start."""
    scorer = make_scorer(PER_SAMPLE, timeout_seconds=0.5, chunk_size=1)
    monkeypatch.setattr(scorer_module, "LOAD_TIMEOUT_SECONDS", 1.0)
    monkeypatch.setattr(scorer_module, "SINGLE_CALLS", 0)
    slow = [replace(sample, group_id=i) for i, sample in enumerate(samples(*["!time.sleep(0.4)"] * 4))]
    assert [sample.reward for sample in scored_by(scorer, slow)] == [16.0] * 4


def test_gives_up_after_losses_in_a_row(make_scorer: MakeScorer) -> None:
    scorer = make_scorer(PER_SAMPLE)
    die = "!os._exit(1)"
    assert rewards(scorer, die, die, "a", die, die, die, "ab") == [None, None, 1.0, None, None, None, None]
    assert "not tried after 3 calls in a row" in scorer.last_failures[-1]
    assert rewards(scorer, "ab") == [2.0]


@pytest.mark.parametrize("value", ["float('nan')", "float('inf')", "None", "'1.0'", "[1.0]", "10 ** 400"])
def test_what_is_no_number_is_no_result(make_scorer: MakeScorer, value: str) -> None:
    scorer = make_scorer(f"def reward_func(queries, prompts, labels): return [1.0, {value}]")
    assert rewards(scorer, "a", "b") == [1.0, None]
    assert len(scorer.last_failures) == 1
    assert "not a finite number" in scorer.last_failures[0]


@pytest.mark.parametrize(
    ("value", "message"), [("[1.0]", "1 rewards for 2 samples"), ("0.5", "not a list"), ("{}", "not a list")]
)
def test_wrong_length_or_shape_leaves_the_batch_without_result(
    make_scorer: MakeScorer, value: str, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    scorer = make_scorer(f"def reward_func(queries, prompts, labels): return {value}")
    assert rewards(scorer, "a", "b") == [None, None]
    assert message in scorer.last_failures[0]
    assert len(caplog.records) == 1
    assert "2 of 2 samples have no reward from function: 2 x" in caplog.text


def test_prints_and_reads_do_not_reach_the_pipes(make_scorer: MakeScorer, capfd: pytest.CaptureFixture[str]) -> None:
    scorer = make_scorer(
        "import os, sys\n"
        "print('at import')\n"
        "def reward_func(queries, prompts, labels):\n"
        "    print('{}'); os.system('echo from a child'); os.write(1, b'raw\\n')\n"
        "    return [len(sys.stdin.read())] * len(queries)"
    )
    assert rewards(scorer, "a") == [0.0]
    captured = capfd.readouterr()
    assert captured.out == ""
    assert all(text in captured.err for text in ("at import", "from a child", "raw"))


def test_large_batches_and_odd_text_pass_the_pipes(make_scorer: MakeScorer) -> None:
    scorer = make_scorer(PER_SAMPLE)
    odd = "\u2028\n\ud800\0é"
    assert rewards(scorer, "x" * 1_000_000, odd) == [1_000_000.0, float(len(odd))]


def test_environment_is_what_is_allowed_and_what_is_named(
    make_scorer: MakeScorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MY_API_KEY", "WANDB_API_KEY", "HARMLESS", "JUDGE_KEY", "HF_HUB_OFFLINE", "TMPDIR", "LC_TIME"):
        monkeypatch.setenv(name, "seen")
    scorer = make_scorer(
        "import os, resource\n"
        "def reward_func(queries, prompts, labels):\n"
        "    names = sorted(n for n, v in os.environ.items() if v == 'seen')\n"
        "    own = [names == ['HF_HUB_OFFLINE', 'JUDGE_KEY', 'LC_TIME', 'TMPDIR'], 'PATH' in os.environ]\n"
        "    return [*own, resource.getrlimit(resource.RLIMIT_CORE)[0], os.getpgrp() == os.getpid()]",
        passed_variables=["JUDGE_KEY", "ABSENT"],
    )
    assert rewards(scorer, "a", "b", "c", "d") == [1.0, 1.0, 0.0, 1.0]


def test_memory_past_the_limit_costs_its_sample(make_scorer: MakeScorer) -> None:
    code = "def reward_func(queries, prompts, labels): return [len(bytearray(int(q[3:]) << 20)) >> 20 for q in queries]"
    scorer = make_scorer(code, memory_bytes=400 << 20)
    assert rewards(scorer, "100", "800", "150") == [100.0, None, 150.0]
    assert any("MemoryError" in said and "reward_memory_gib" in said for said in scorer.last_failures)
    assert rewards(make_scorer(code), "800") == [800.0]


def test_close_ends_the_process_and_its_children(make_scorer: MakeScorer) -> None:
    others = set(psutil.Process().children(recursive=True))  # another test's ranks
    scorer = make_scorer(
        "import subprocess\n"
        "child = subprocess.Popen(['sleep', '60'])\n"
        "def reward_func(queries, prompts, labels): return [2.0] * len(queries)"
    )
    processes = set(psutil.Process().children(recursive=True)) - others
    assert "sleep" in [process.name() for process in processes]
    ends = [os.pidfd_open(process.pid) for process in processes]
    scorer.close()
    scorer.close()
    for end in ends:
        assert select.select([end], [], [], 10.0)[0], "a process descriptor becomes readable when the process ends"
        os.close(end)
    assert rewards(scorer, "a", "b") == [2.0, 2.0]


def test_hung_worker_ends_when_its_trainer_is_killed(tmp_path: Path) -> None:
    """Waits up to 1 s, the worker's interval of looking for its parent."""
    (tmp_path / "hang.py").write_text("import time\ndef reward_func(q, p, l): print('called'); time.sleep(60)")
    trainer = subprocess.Popen(
        [sys.executable, "-c", TRAINER, str(tmp_path / "hang.py")], cwd=ROOT, stderr=subprocess.PIPE
    )
    assert trainer.stderr is not None
    while trainer.stderr.readline() != b"called\n":
        pass
    ends = [os.pidfd_open(process.pid) for process in psutil.Process(trainer.pid).children(recursive=True)]
    trainer.kill()
    for end in ends:
        assert select.select([end], [], [], 10.0)[0], "a process descriptor becomes readable when the process ends"
        os.close(end)
    trainer.wait()
    trainer.stderr.close()


def test_neighbouring_modules_can_be_imported(make_scorer: MakeScorer, tmp_path: Path) -> None:
    (tmp_path / "my_neighbour.py").write_text("VALUE = 3")
    scorer = make_scorer("import my_neighbour\ndef reward_func(q, p, l): return [my_neighbour.VALUE]")
    assert rewards(scorer, "a") == [3.0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("reward = 1", "no function reward_func"),
        ("def reward_func(:", "SyntaxError"),
        ("import no_such_module", "no_such_module"),
        ("import sys; sys.exit(4)", "SystemExit: 4"),
        ("import os; os._exit(5)", "exit status 5"),
    ],
)
def test_code_that_cannot_be_loaded_is_refused_at_once(make_scorer: MakeScorer, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=rf"reward_function=.*my_reward.py cannot be loaded: .*{message}"):
        make_scorer(text)


def test_loading_has_a_limit(make_scorer: MakeScorer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "LOAD_TIMEOUT_SECONDS", 0.5)
    with pytest.raises(ValueError, match="limit of 0.5 seconds"):
        make_scorer("import time; time.sleep(60)")


def test_rules_run_in_the_process() -> None:
    """Imports math-verify there, about a second each."""
    math = RewardScorer(function_path=None, rule="math", rule_pattern=None, timeout_seconds=20.0)
    scored = scored_by(math, [*samples("it is 7", "8"), *samples("7", label="some words"), *samples("7", label=None)])
    assert [sample.reward for sample in scored] == [1.0, 0.0, None, None]
    assert [failure.split(":")[0] for failure in math.last_failures] == ["sample 2", "sample 3"]
    math.close()
    form = RewardScorer(function_path=None, rule="format", rule_pattern="a+", timeout_seconds=20.0)
    assert rewards(form, "aa", "ab") == [1.0, 0.0]
    assert [sample.reward for sample in scored_by(form, samples("aa</s>", stop_text="</s>"))] == [1.0]
    form.close()


def test_rules_do_not_judge_the_stop_token() -> None:
    exact = RewardScorer(function_path=None, rule="exact_match", rule_pattern=None, timeout_seconds=20.0)
    ended, labels = samples("<ans>7</s>", "7</s>", stop_text="</s>"), ("<ans>7", "<ans>7</s>", [8, "<ans>7"])
    for label in labels:
        scored = scored_by(exact, [replace(s, prompt=replace(s.prompt, label=label)) for s in ended])
        assert [sample.reward for sample in scored] == [1.0, 0.0]
    exact.close()


def test_queries_are_the_prompt_and_all_of_the_response(make_scorer: MakeScorer) -> None:
    scorer = make_scorer(
        "def reward_func(queries, prompts, labels):\n"
        "    return [(q, p) == ('Q: <ans>7</s>', 'Q: ') for q, p in zip(queries, prompts)]"
    )
    assert [sample.reward for sample in scored_by(scorer, samples("<ans>7</s>", stop_text="</s>"))] == [1.0]


def test_rule_that_hangs_is_stopped() -> None:
    """A pattern with exponential backtracking holds the interpreter's lock until the limit."""
    scorer = RewardScorer(function_path=None, rule="format", rule_pattern="(a+)+b", timeout_seconds=0.5)
    assert rewards(scorer, "ab", "a" * 40, "aab") == [1.0, None, 1.0]
    scorer.close()
