"""Reward files of all the shapes that Python gives a function, loaded as the worker loads them."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megarlhf.reward.user_function import Scores, load_function

PLAIN = "def reward_func(queries, prompts, labels):\n    return [len(q) + 10 * x for q, x in zip(queries, labels)]\n"
CALL = {"queries": ["ab", "abc"], "prompts": ["a", "a"], "labels": [1, 2]}
EXPECTED = ([12.0, 23.0], [None, None])


@pytest.fixture(autouse=True)
def imports() -> Iterator[None]:
    """Modules and search path as before, after each test."""
    modules, path = set(sys.modules), list(sys.path)
    yield
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        del sys.modules[name]


def score(path: Path, text: str, call: dict[str, list[Any]] | None = None) -> Scores:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return load_function(str(path))(CALL if call is None else call)


@pytest.mark.parametrize(
    "text",
    [
        PLAIN,
        "import sys\nif sys.argv:\n    " + PLAIN.replace("\n", "\n    "),
        "try:\n    import no_such_module\nexcept ImportError:\n    " + PLAIN.replace("\n", "\n    "),
        "from plain import *\n",
        "from plain import reward_func as mine\nfrom typing import Callable\nreward_func: Callable = mine\n",
        "import plain\nfrom functools import partial\n"
        "reward_func = partial(lambda scale, q, p, l: plain.reward_func(q, p, l), 3)\n",
        "import plain\n"
        "class Judge:\n    def __call__(self, q, p, l): return plain.reward_func(q, p, l)\n"
        "reward_func = Judge()\n",
        "import functools, plain\n"
        "def traced(f):\n    @functools.wraps(f)\n    def call(*args): return f(*args)\n    return call\n"
        "reward_func = traced(plain.reward_func)\n",
        "import plain\nasync def reward_func(q, p, l): return plain.reward_func(q, p, l)\n",
        "import plain\n"
        "def reward_func(*, labels, prompts, queries): return plain.reward_func(queries, prompts, labels)\n",
        "import plain\ndef reward_func(*args): return plain.reward_func(*args)\n",
        "import plain\ndef reward_func(**kwargs): return plain.reward_func(**kwargs)\n",
        "import plain\n"
        "def reward_func(texts, asked, answers, scale=1): return plain.reward_func(texts, asked, answers)\n",
        "import dataclasses, plain\n"
        "@dataclasses.dataclass\nclass Row:\n    text: 'str'\n    label: int\n"
        "def reward_func(q, p, l): return [len(r.text) + 10 * r.label for r in map(Row, q, l)]\n",
        "import plain\nglobals()['reward_func'] = plain.reward_func\nif __name__ == '__main__':\n    1 / 0\n",
        "import plain\ndef __getattr__(name):\n    return plain.reward_func\n",
        "# -*- coding: latin-1 -*-\nimport plain\nreward_func = plain.reward_func\n",
    ],
    ids=lambda text: text.splitlines()[0][:40],
)
def test_any_way_to_define_it(tmp_path: Path, text: str) -> None:
    (tmp_path / "plain.py").write_text(PLAIN)
    assert score(tmp_path / "my_reward.py", text) == EXPECTED


@pytest.mark.parametrize("name", ["my-reward.py", "2nd.py", "reward.v2.py", "json.py", "worker.py"])
def test_any_name_of_the_file(tmp_path: Path, name: str) -> None:
    json = sys.modules["json"]
    assert score(tmp_path / name, PLAIN) == EXPECTED
    assert sys.modules["json"] is json


@pytest.mark.parametrize("name", ["score.py", "my-score.py"])
def test_relative_imports_of_a_package(tmp_path: Path, name: str) -> None:
    for folder in ("judges_of_mine", "judges_of_mine/text"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "__init__.py").write_text("")
    (tmp_path / "judges_of_mine/lengths.py").write_text("UNIT = 1\n")
    (tmp_path / "judges_of_mine/text/plain.py").write_text(PLAIN)
    text = "import plain\nfrom ..lengths import UNIT\nfrom .plain import reward_func as f\nreward_func = f\n"
    assert score(tmp_path / "judges_of_mine/text" / name, text) == EXPECTED


def test_another_process_finds_its_functions(tmp_path: Path) -> None:
    """multiprocessing's spawn imports the module by its name; starting Python takes 0.2 s."""
    text = (
        "import multiprocessing\ndef double(x): return 2 * x\n"
        "def reward_func(q, p, l):\n"
        "    with multiprocessing.get_context('spawn').Pool(1) as pool: return pool.map(double, l)\n"
    )
    assert score(tmp_path / "pooled_reward.py", text) == ([2.0, 4.0], [None, None])


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("def reward(queries): ...", AttributeError, "no function reward_func"),
        ("class Reward:\n    def reward_func(self): ...", AttributeError, "no function reward_func"),
        ("reward_func = 3", AttributeError, "no function reward_func"),
        ("def reward_func(queries, prompts): ...", TypeError, r"reward_func\(queries, prompts\) cannot be called with"),
        ("def reward_func(a, b, c, d): ...", TypeError, r"reward_func\(a, b, c, d\) cannot be called"),
        ("def reward_func(*, texts): ...", TypeError, r"cannot be called with \(queries, prompts, labels\)"),
    ],
)
def test_what_is_no_reward_function(tmp_path: Path, text: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        score(tmp_path / "my_reward.py", text)


def test_labels_keep_their_type(tmp_path: Path) -> None:
    labels = [7, 7.5, True, None, "7", [1, "a"], {"answer": {"x": 1}}]
    text = f"def reward_func(queries, prompts, labels): return [repr(labels) == {repr(labels)!r}] * len(labels)"
    call = {"queries": ["q"] * 7, "prompts": [""] * 7, "labels": labels}
    assert score(tmp_path / "my_reward.py", text, call) == ([1.0] * 7, [None] * 7)
