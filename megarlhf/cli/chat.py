"""A chat on a terminal: lines from stdin, answers to stdout token by token, what else there is to say to stderr."""

import signal
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from megarlhf.cli.errors import all_or_errors, running
from megarlhf.config.chat_arguments import ChatConfig
from megarlhf.config.command_line import to_yaml
from megarlhf.data.templates import Message, Renderer, make_renderer, special_prefix
from megarlhf.data.tokenizer import load_tokenizer, stop_tokens
from megarlhf.formats.huggingface import read_config
from megarlhf.rollout.engine import RolloutEngine, request_seed

_INPUT_TEMPLATE = "User: {}\nAssistant: "
_ANSWER_PART = 4  # turns are left out of the prompt until an answer has a fourth of max_len
_UNFINISHED = "\ufffd"  # what a tokenizer makes of the first bytes of a character


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What the files say."""

    renderer: Renderer
    stop_token_ids: list[int]
    max_len: int
    before: str | None  # text of ta_prompt


def prepare(config: ChatConfig) -> Prepared:
    """Read all but the weights.

    Raises:
        ValueError: files that cannot be used, all of them.
    """
    model, text = config.model, config.text
    tokenizer, hf_config, before = all_or_errors(
        [
            lambda: load_tokenizer(model.pretrain, chat_template=text.tokenizer_chat_template),
            lambda: read_config(model.pretrain),
            lambda: None if text.ta_prompt is None else Path(text.ta_prompt).read_text(encoding="utf-8"),
        ]
    )
    template = None if text.apply_chat_template else text.input_template or _INPUT_TEMPLATE
    renderer, stops = all_or_errors(
        [
            lambda: make_renderer(tokenizer, apply_chat_template=text.apply_chat_template, input_template=template),
            lambda: stop_tokens(tokenizer, model.pretrain, hf_config),
        ]
    )
    max_len = min(model.max_len, hf_config.max_position_embeddings)
    if max_len < model.max_len:
        _note(f"max_len={max_len}: {model.pretrain} knows no later positions")
    return Prepared(
        renderer=renderer, stop_token_ids=[stop.token_id for stop in stops], max_len=max_len, before=before
    )


@dataclass
class Conversation:
    """Turns so far, each a message and its answer, and the tokens that the model continues."""

    renderer: Renderer
    before: str | None
    conditions: str  # what comes before each answer
    turns: list[tuple[str, str]] = field(default_factory=list)

    def prompt(self, message: str, max_len: int) -> list[int]:
        """Tokens of the chat with a new message, without the oldest turns where they leave too little room.

        Raises:
            ValueError: a message that the template refuses, or that is too long by itself; the turns stay.
        """
        for start in range(len(self.turns) + 1):
            ids = self._encoded(self._text(self.turns[start:], message))
            if len(ids) <= max_len - max_len // _ANSWER_PART:
                break
        if len(ids) >= max_len:
            raise ValueError(f"the message makes a prompt of {len(ids)} tokens, and max_len={max_len}: say less")
        if start:
            _note(f"the oldest {start} turn(s) are forgotten: max_len={max_len} has no room for them")
            del self.turns[:start]
        return ids

    def _text(self, turns: list[tuple[str, str]], message: str) -> str:
        if self.renderer.apply_chat_template:
            said: list[Message] = []
            for user, assistant in turns:
                said += [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
            return self.renderer.prompt([*said, {"role": "user", "content": message}]) + self.conditions
        parts = [] if self.before is None else [self.before]
        for user, assistant in (*turns, (message, "")):
            parts.append(self.renderer.prompt(user) + self.conditions + assistant)
        return "\n".join(parts)

    def _encoded(self, text: str) -> list[int]:
        tokenizer = self.renderer.tokenizer
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
        prefix = [] if self.renderer.apply_chat_template else special_prefix(tokenizer)
        return ids if ids[: len(prefix)] == prefix else prefix + ids


class _CtrlC:
    """What Ctrl-C does: a line that is being read begins anew, an answer ends, and vLLM finishes its step."""

    def __init__(self) -> None:
        self.came = self.reading = False

    def __call__(self, *_: object) -> None:
        if self.reading:
            raise KeyboardInterrupt
        self.came = True

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Inside the block."""
        before = signal.signal(signal.SIGINT, self)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def read_line(self) -> str | None:
        """A message without blanks around it; None at the end of the input."""
        while True:
            try:
                self.reading = True
                return input("> " if sys.stdin.isatty() and sys.stdout.isatty() else "").strip()
            except EOFError:
                return None
            except KeyboardInterrupt:
                print(file=sys.stderr)
            finally:
                self.came = self.reading = False


def run(config: ChatConfig, *, dry_run: bool) -> int:
    """Answer line after line until `exit` or the end of the input; returns the exit status."""
    prepared = prepare(config)
    if dry_run:
        print(to_yaml(config))
        return 0
    conditions = config.text.csft_prompt.strip() + " " if config.text.enable_csft else ""
    chat, ctrl_c = Conversation(prepared.renderer, prepared.before, conditions), _CtrlC()
    engine, number = _load(config, prepared.max_len), 0
    if sys.stdin.isatty():
        import readline  # noqa: F401 (input() edits lines with it)
    with running(), closing(engine), ctrl_c.handled():
        while (line := ctrl_c.read_line()) is not None and line.lower() != "exit":
            if line.lower() == "clear":
                chat.turns.clear()
            elif line:
                try:
                    prompt = chat.prompt(line, prepared.max_len)
                except ValueError as error:
                    _note(str(error))
                    continue
                chat.turns.append((line, _answer(engine, prompt, number, config, prepared, ctrl_c)))
                number += 1
    return 0


def _load(config: ChatConfig, max_len: int) -> RolloutEngine:
    model = config.model
    engine = RolloutEngine(
        model.pretrain,
        dtype="bfloat16" if model.bf16 else "float32",
        seed=config.sampling.seed,
        max_model_len=max_len,
        tensor_parallel_size=model.vllm_tensor_parallel_size,
        max_num_seqs=1,
        gpu_memory_utilization=model.vllm_gpu_memory_utilization,
        kv_cache_gib=model.vllm_kv_cache_gib,
    )
    engine.ignore_interrupts()
    return engine


def _answer(
    engine: RolloutEngine, prompt: list[int], number: int, config: ChatConfig, prepared: Prepared, ctrl_c: _CtrlC
) -> str:
    """Print an answer while it is generated; returns it as far as it came."""
    sampling, tokenizer = config.sampling, prepared.renderer.tokenizer
    ids: list[int] = []
    text, said, ended = "", 0, False
    tokens = engine.stream(
        np.asarray(prompt, dtype=np.int32),
        max_tokens=prepared.max_len - len(prompt),
        temperature=sampling.temperature,
        stop_token_ids=prepared.stop_token_ids,
        seed=request_seed(sampling.seed, number, 0, 0),
        greedy=sampling.greedy_sampling,
        top_p=sampling.top_p,
        repetition_penalty=sampling.repetition_penalty,
    )
    with closing(tokens):
        for token in tokens:
            if (ended := token in prepared.stop_token_ids) or ctrl_c.came:
                break
            ids.append(token)
            text = str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
            if not text.endswith(_UNFINISHED):
                print(text[said:], end="", flush=True)
                said = len(text)
    print(text[said:], flush=True)
    if not ended:
        _note("stopped" if ctrl_c.came else f"the answer ends at max_len={prepared.max_len}")
    return text


def _note(text: str) -> None:
    print(f"({text})", file=sys.stderr, flush=True)
