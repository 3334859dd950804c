"""`megarlhf chat` against Transformers' greedy answers to the same text."""

import io
import json
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE, WordLevel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from megarlhf.cli.chat import Conversation, Prepared, _answer, _CtrlC
from megarlhf.cli.main import main
from megarlhf.config.chat_arguments import ChatConfig
from megarlhf.config.command_line import from_dict, parse
from megarlhf.data.templates import make_renderer
from tests.rollout.models import make_engine_model
from tests.tiny_models import VOCAB_SIZE

PENALTY = 1.3
STOPS = [2, 3, 62, 84]  # what the model comes to say
TEMPLATE = (
    "{% for m in messages %}{{ {'user': 't50 ', 'assistant': 't51 '}[m['role']] }}{{ m['content'] }} t52 {% endfor %}"
    "{% if add_generation_prompt %}t51 {% endif %}"
)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = make_engine_model(tmp_path_factory.mktemp("chat") / "model")
    words = Tokenizer(WordLevel({f"t{i}": i for i in range(VOCAB_SIZE)}, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="t0", eos_token="t2").save_pretrained(directory)
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": STOPS}))
    return directory


class Oracle:
    """Greedy answers by Transformers."""

    def __init__(self, directory: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(directory)

    def __call__(self, text: str, max_len: int) -> str:
        ids = self.tokenizer(text, return_tensors="pt")["input_ids"]
        options = {"do_sample": False, "repetition_penalty": PENALTY, "max_length": max_len, "pad_token_id": 2}
        found = self.model.generate(ids, eos_token_id=STOPS, **options)[0, ids.shape[1] :].tolist()
        return str(self.tokenizer.decode([token for token in found if token not in STOPS]))


class Terminal(io.StringIO):
    """Stdout that keeps what is written piece by piece, and sends Ctrl-C after some of them."""

    def __init__(self, interrupt_at: int = -1) -> None:
        super().__init__()
        self.pieces: list[str] = []
        self.interrupt_at = interrupt_at

    def write(self, text: str) -> int:
        self.pieces += [text] if text else []
        if text and self.interrupt_at in (len(self.pieces), len(self.pieces) - 1):  # impatiently, once more
            signal.raise_signal(signal.SIGINT)
        return super().write(text)


def session(
    monkeypatch: pytest.MonkeyPatch, model_dir: Path, lines: list[str], *flags: str, out: Terminal | None = None
) -> list[str]:
    out = Terminal() if out is None else out
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdin", io.StringIO("\n".join(lines) + "\n"))
        patched.setattr(sys, "stdout", out)
        required = ("--pretrain", str(model_dir), "--greedy_sampling", "--repetition_penalty", str(PENALTY))
        assert main(["chat", *required, *flags]) == 0
    assert "\x1b" not in out.getvalue()
    return out.getvalue().splitlines()


@pytest.mark.slow
def test_a_piped_session_is_what_transformers_says(
    monkeypatch: pytest.MonkeyPatch, model_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """History, clear, the text before the chat, exit; an interrupted answer leaves the engine whole."""
    oracle, max_len = Oracle(model_dir), 60
    (tmp_path / "examples.txt").write_text("t20 t21")
    flags = ("--input_template", "{} t4 ", "--max_len", str(max_len), "--ta_prompt", str(tmp_path / "examples.txt"))
    first = oracle("t20 t21\nt5 t6 t7 t4", max_len)
    second = oracle(f"t20 t21\nt5 t6 t7 t4 {first}\nt9 t4", max_len)
    fresh = oracle("t20 t21\nt9 t4", max_len)
    assert len(first.split()) > 2 and len({first, second, fresh}) == 3
    lines = [" t5 t6 t7 ", "", "t9", "CLEAR", "t9", "clear", "t5 t6 t7", "Exit", "t8"]
    out = Terminal()
    assert session(monkeypatch, model_dir, lines, *flags, out=out) == [first, second, fresh, first]
    words = sum(len(answer.split()) for answer in (first, second, fresh, first))
    assert sum(bool(piece.strip()) for piece in out.pieces) == words  # each word is a token and was written by itself

    stopped = Terminal(interrupt_at=2)
    told = session(monkeypatch, model_dir, ["t5 t6 t7", "clear", "t9"], *flags, out=stopped)
    assert told == [" ".join(first.split()[:2]), fresh]  # and the end of the input ends the program
    assert "(stopped)" in capfd.readouterr().err


def test_chat_template_and_conditional_sft(monkeypatch: pytest.MonkeyPatch, model_dir: Path) -> None:
    oracle, max_len = Oracle(model_dir), 256  # the model's positions; the default is more
    flags = ("--apply_chat_template", "--tokenizer_chat_template", TEMPLATE, "--enable_csft", "--csft_prompt", "t60")
    first = oracle("t50 t5 t52 t51 t60", max_len)
    second = oracle(f"t50 t5 t52 t51 {first} t52 t50 t6 t52 t51 t60", max_len)
    assert session(monkeypatch, model_dir, ["t5", "t6"], *flags) == [first, second]


def conversation(model_dir: Path) -> Conversation:
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    renderer = make_renderer(tokenizer, apply_chat_template=False, input_template="{} t4 ")
    return Conversation(renderer, "t7", "", [("t10 t11", "t12"), ("t13", "t14"), ("t15", "t16 t17")])


def test_oldest_turns_are_left_out(model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """12 tokens and 3 of the new message; a fourth of max_len stays free for the answer."""
    chat = conversation(model_dir)
    assert chat.prompt("t18 t19", 20) == [7, 10, 11, 4, 12, 13, 4, 14, 15, 4, 16, 17, 18, 19, 4]
    assert len(chat.turns) == 3 and capsys.readouterr().err == ""
    assert chat.prompt("t18 t19", 18) == [7, 13, 4, 14, 15, 4, 16, 17, 18, 19, 4]
    assert chat.turns == [("t13", "t14"), ("t15", "t16 t17")]
    assert "oldest 1 turn(s)" in capsys.readouterr().err
    assert chat.prompt("t18 t19", 5) == [7, 18, 19, 4]  # leaves one token for the answer
    chat = conversation(model_dir)
    with pytest.raises(ValueError, match="prompt of 4 tokens, and max_len=4"):
        chat.prompt("t18 t19", 4)
    assert len(chat.turns) == 3


def test_characters_of_several_bytes_are_printed_whole(model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_ = Tokenizer(BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    bytes_.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytes_)
    said = tokenizer.encode("aé\N{GRINNING FACE}b") + tokenizer.encode("\N{GRINNING FACE}")[:2]

    class Engine:
        def stream(self, prompt: Any, **_: Any) -> Iterator[int]:
            yield from said

    renderer = make_renderer(tokenizer, apply_chat_template=False, input_template="{}")
    prepared = Prepared(renderer=renderer, stop_token_ids=[], max_len=30, before=None)
    config = from_dict(ChatConfig, {"pretrain": "m"})
    engine: Any = Engine()
    out = Terminal()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "stdout", out)
        answer = _answer(engine, [1, 2], 0, config, prepared, _CtrlC())
    assert out.pieces == ["a", "é", "\N{GRINNING FACE}", "b", "\ufffd", "\n"]
    assert answer == "aé\N{GRINNING FACE}b\ufffd"
    assert "ends at max_len=30" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--ta_prompt", "nowhere"], "ta_prompt=nowhere is not a file"),
        (["--ta_prompt", __file__, "--apply_chat_template"], "leave one out"),
        (["--csft_prompt", "x"], "csft_prompt=x is ignored"),
        (["--input_template", "x"], "input_template='x' must hold one {}"),
        (["--top_p", "0", "--temperature", "0", "--repetition_penalty", "0"], "top_p=0.0 must be above 0"),
        (["--load_in_4bit"], "--load_in_4bit is not an option here"),
        (["--disable_fast_tokenizer"], "leave it out"),
        (["--vllm_tensor_parallel_size", "3"], "use 1 or 2"),
    ],
)
def test_mistakes(model_dir: Path, flags: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        assert main(["chat", "--pretrain", str(model_dir), *flags]) == 2
    except SystemExit as error:
        assert error.code == 2
    assert said in capsys.readouterr().err


def test_every_option_of_openrlhf() -> None:
    words = "--bf16 --flash_attn --pretrain m --max_len 77 --greedy_sampling --top_p 0.7 --temperature 0.3"
    more = "--repetition_penalty 1.1 --apply_chat_template --ta_prompt f --enable_csft --csft_prompt c"
    config, _ = parse(ChatConfig, [*words.split(), *more.split(), "--input_template", "Q {}"], "chat")
    assert (config.model.bf16, config.model.pretrain, config.model.max_len) == (True, "m", 77)
    sampling = config.sampling
    assert (sampling.greedy_sampling, sampling.top_p, sampling.temperature, sampling.repetition_penalty) == (
        *(True, 0.7, 0.3, 1.1),
    )
    text = config.text
    assert (text.apply_chat_template, text.ta_prompt, text.enable_csft, text.csft_prompt, text.input_template) == (
        *(True, "f", True, "c", "Q {}"),
    )
    default = from_dict(ChatConfig, {"pretrain": "m"})
    assert (default.model.max_len, default.sampling.top_p, default.sampling.temperature) == (4096, 0.9, 0.2)
    assert (default.sampling.repetition_penalty, default.text.csft_prompt) == (1.2, "<rm_score>: 5.00")
