"""Rewards from a reward model: one number for each response, read at its last token."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy as np
from transformers import PreTrainedTokenizerBase

from megarlhf.config.check_rewards import moments
from megarlhf.data.answers import encode_segments, render_answer
from megarlhf.data.rows import Rows
from megarlhf.data.templates import Renderer, make_renderer
from megarlhf.data.tokenizer import load_tokenizer
from megarlhf.data.types import Floats, GroupTokens, Rollout, Sample, TokenIds
from megarlhf.formats.huggingface import read_config
from megarlhf.reward.sources import Outcome, SourceResult


class ScoringModel(Protocol):
    """A reward model that runs. On a cluster it is a group of processes; in a unit test, a plain object."""

    def scores(self, rollout: Rollout, *, eos: int | None) -> Floats:
        """[samples] the value of each response's last token.

        Args:
            rollout: tokens as the model's tokenizer has them.
            eos: the model's, which comes behind a response that another stop token has ended; None: none does.
        """

    def stop(self) -> None:
        """Make a `scores` that another thread waits for fail; the model is no use then. Without one nothing happens."""


class RewardModel:
    """A RewardSource. A model with the policy's tokenizer reads the policy's tokens, wherever they lie.

    One with another tokenizer reads text: the prompt under its own chat template, where prompts are chats, and the
    response, as `megarlhf rm` renders both. Responses that are stopped end with EOS, others where they were cut.
    """

    def __init__(
        self,
        name: str,
        role: str,
        directory: str,
        *,
        option: str,
        policy_tokenizer: str | None,
        apply_chat_template: bool,
        max_tokens: int,
        normalize: bool,
    ) -> None:
        """Nothing is loaded before `check`; `model` is set when the model runs.

        Args:
            role: name of its processes' role.
            option: what gave the directory, for messages.
            policy_tokenizer: directory of the policy's tokenizer; None: no policy's tokens are there, it reads text.
            apply_chat_template: prompts are chats.
            max_tokens: of a row, at most.
            normalize: a score s becomes the reward (s - mean) / std, by the numbers in config.json.
        """
        self.name, self.role, self.directory = name, role, directory
        self.model: ScoringModel | None = None
        self._source, self._policy_tokenizer = f"{option}={directory}", policy_tokenizer
        self._chats, self._max_tokens, self._normalize = apply_chat_template, max_tokens, normalize
        self._mean, self._std = 0.0, 1.0
        self._eos: int | None = None
        self._renderer: Renderer | None = None  # where text crosses

    def check(self) -> None:
        """Read its configuration and compare the tokenizers.

        Raises:
            ValueError: files that cannot be read; or a tokenizer of its own without EOS or a chat template that works.
        """
        config = read_config(self.directory, option=self._source.partition("=")[0])
        self._vocab_size = config.vocab_size
        self._max_tokens = min(self._max_tokens, config.max_position_embeddings)
        if self._normalize:
            self._mean, self._std = moments(vars(config)) or (0.0, 1.0)
        given = None if self._policy_tokenizer is None else load_tokenizer(self._policy_tokenizer, chat_template=None)
        has_own = any(Path(self.directory).glob("tokenizer*"))
        own = load_tokenizer(self.directory, chat_template=None) if given is None or has_own else given
        self._eos = own.eos_token_id
        if given is None or own.get_vocab() != given.get_vocab():
            try:
                self._renderer = self._own_renderer(own)
            except ValueError as error:
                said = f"{self._source} has another tokenizer than the policy, so it reads text: {error}"
                raise ValueError(said) from error

    def _own_renderer(self, tokenizer: PreTrainedTokenizerBase) -> Renderer:
        if tokenizer.eos_token_id is None:
            raise ValueError("its tokenizer has no EOS, which ends an answer: set eos_token in tokenizer_config.json")
        renderer = make_renderer(tokenizer, apply_chat_template=self._chats, input_template=None)
        if self._chats:
            render_answer(renderer, "a", "b", "a response", tools=None)
        return renderer

    def line(self) -> str:
        """For the start log, after `check`: what it reads, and what becomes of its scores."""
        read = "the policy's tokens" if self._renderer is None else "text, since its tokenizer is another; prompts "
        if self._renderer is not None:
            read += "are rendered with its own chat template" if self._chats else "are as the policy reads them"
        scores = f"; reward = (score - {self._mean:.6g}) / {self._std:.6g}" if self._normalize else ""
        return f"{self.name} ({self.directory}) reads {read}{scores}"

    def close(self) -> None:
        """Its processes end with the cluster; those that are computing, now."""
        if self.model is not None:
            self.model.stop()

    def score(self, rollout: Rollout) -> SourceResult:
        """Reward of each sample; None for one that the model cannot read, or whose score is no finite number."""
        assert self.model is not None, "the model runs before it scores"
        outcomes: list[Outcome] = [(None, None)] * len(rollout.samples)
        if self._renderer is None:
            places, readable, eos = list(range(len(rollout.samples))), rollout, self._eos
        else:
            places, readable = self._as_own_tokens(self._renderer, rollout, outcomes)
            eos = None  # it is among the tokens
        for place, score in zip(places, self.model.scores(readable, eos=eos) if places else [], strict=True):
            value = (float(score) - self._mean) / self._std
            outcomes[place] = (value, None) if math.isfinite(value) else (None, f"its score is {score}")
        return SourceResult(outcomes=outcomes)

    def _as_own_tokens(
        self, renderer: Renderer, rollout: Rollout, outcomes: list[Outcome]
    ) -> tuple[list[int], Rollout]:
        """Places of the samples that the model can read, and these with its own tokens; the others get a reason."""
        texts: dict[int, list[str]] = {}
        for place, sample in enumerate(rollout.samples):
            try:
                texts[place] = _rendered(renderer, sample)
            except ValueError as error:
                outcomes[place] = None, str(error)
        encoded = self._encoded(renderer, texts, outcomes)
        for place, (prompt, answer) in list(encoded.items()):
            stopped = rollout.samples[place].finish_reason == "stop"
            encoded[place] = [prompt, answer if stopped else answer[:-1]]
            reason = self._reason(prompt, encoded[place][1])
            if reason is not None:
                outcomes[place] = None, reason
                del encoded[place]
        samples, tokens = _regrouped(rollout.samples, encoded)
        return list(encoded), Rollout(samples=samples, tokens=tokens)

    def _encoded(
        self, renderer: Renderer, texts: dict[int, list[str]], outcomes: list[Outcome]
    ) -> dict[int, list[TokenIds]]:
        """Tokens of texts, by their places; one that has none gets a reason, and costs no other its own."""
        rows = Rows(path=self.name, rows=[{}] * len(texts))
        try:
            return dict(zip(texts, encode_segments(renderer, list(texts.values()), rows=rows), strict=True))
        except ValueError as error:
            if len(texts) == 1:
                outcomes[next(iter(texts))] = None, str(error)
                return {}
        alone = [self._encoded(renderer, {place: text}, outcomes) for place, text in texts.items()]
        return {place: tokens for found in alone for place, tokens in found.items()}

    def _reason(self, prompt: TokenIds, answer: TokenIds) -> str | None:
        """Why the model cannot read a row; None where it can."""
        length, limit = len(prompt) + len(answer), self._max_tokens
        if length > limit:
            return f"it has {length} tokens for the reward model, which takes {limit}"
        largest = int(max(prompt.max(), answer.max(initial=0)))
        return None if largest < self._vocab_size else f"it has the token {largest}, which the reward model lacks"


def _rendered(renderer: Renderer, sample: Sample) -> list[str]:
    """Text of the prompt and the response; that of a chat ends as its template ends a turn, unless it was cut.

    Raises:
        ValueError: an empty response, or one that the chat template refuses.
    """
    prompt, text = sample.prompt, sample.response_text.removesuffix(sample.stop_text)
    if not text:
        raise ValueError("the response has no text")
    if not renderer.apply_chat_template:
        return [prompt.text, text]
    if sample.finish_reason == "stop":
        return render_answer(renderer, prompt.chat, text, "response", tools=prompt.tools)
    return [renderer.prompt(prompt.chat, tools=prompt.tools), text]


def _regrouped(
    samples: Sequence[Sample], encoded: Mapping[int, Sequence[TokenIds]]
) -> tuple[list[Sample], tuple[GroupTokens | None, ...]]:
    """Samples, by their places, with other tokens, and these by group; a group's samples begin with one prompt."""
    found, members = [], dict[int, list[TokenIds]]()
    prompts: dict[int, TokenIds] = {}
    for place, (prompt, answer) in encoded.items():
        sample = samples[place]
        group = members.setdefault(sample.group_id, [])
        prompts[sample.group_id] = prompt
        found.append(
            replace(
                sample,
                prompt=replace(sample.prompt, token_ids=prompt),
                sample_id=len(group),
                response_length=len(answer),
            )
        )
        group.append(answer)
    tokens: list[GroupTokens | None] = [None] * (1 + max(members, default=-1))
    for group_id, answers in members.items():
        lengths = np.array([len(answer) for answer in answers], dtype=np.int64)
        tokens[group_id] = GroupTokens(
            prompt_ids=prompts[group_id],
            response_ids=np.concatenate(answers),
            rollout_log_probs=np.zeros(int(lengths.sum()), dtype=np.float32),
            lengths=lengths,
        )
    return found, tuple(tokens)
