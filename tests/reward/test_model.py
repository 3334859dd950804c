"""What a reward model reads: the policy's tokens, or text as `megarlhf rm` renders it; and what its scores become."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, PreTrainedTokenizerFast

from examples.demo.make_assets import make_tokenizer
from megarlhf.data.preferences import load_preference_rows
from megarlhf.data.row_options import RowOptions
from megarlhf.data.tokenizer import load_tokenizer
from megarlhf.data.types import Floats, Prompt, Rollout, Sample
from megarlhf.reward.model import RewardModel

SPECIAL = ["<s>", "</s>", "<|user|>", "<|assistant|>", "<|end|>"]
# A turn ends with another token than EOS.
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
Make = Callable[..., RewardModel]


class Reads:
    """A model that runs: it keeps what it is given, and scores by the length of a response."""

    def __init__(self) -> None:
        self.given: list[tuple[Rollout, int | None]] = []

    def scores(self, rollout: Rollout, *, eos: int | None) -> Floats:
        self.given.append((rollout, eos))
        return np.array([s.response_length + s.group_id / 8 for s in rollout.samples], dtype=np.float32)


def other_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate([*SPECIAL, *alphabet])}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    single = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    backend.post_processor = single
    backend.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", chat_template=TEMPLATE)


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A checked model over a tokenizer; `config` are entries of its config.json."""
    make_tokenizer().save_pretrained(tmp_path / "policy")

    def made(tokenizer: Any, *, config: dict[str, Any] | None = None, **options: Any) -> RewardModel:
        sizes = {"vocab_size": 261, "max_position_embeddings": 90}
        LlamaConfig(**(sizes | (config or {}))).save_pretrained(tmp_path / "model")
        if tokenizer is not None:
            tokenizer.save_pretrained(tmp_path / "model")
        given = {"apply_chat_template": False, "max_tokens": 100, "normalize": False} | options
        given |= {"option": "o", "policy_tokenizer": str(tmp_path / "policy")}
        model = RewardModel("reward_model", "reward", str(tmp_path / "model"), **given)
        model.check()
        model.model = Reads()
        return model

    return made


def sample(group: int, number: int, text: str, *, prompt: str = "ask 1", stopped: bool = True, **own: Any) -> Sample:
    chat = [{"role": "user", "content": prompt}]
    record = Prompt(index=group, text=prompt, token_ids=np.array([5, 6], dtype=np.int32), label=None, chat=chat)
    return Sample(
        **{"prompt": record, "group_id": group, "sample_id": number, "response_length": 3, "response_text": text},
        **{"finish_reason": "stop" if stopped else "length", "weight_version": 0, **own},
    )


def read_rows(model: RewardModel, samples: Sequence[Sample]) -> list[list[int]]:
    """What the model was given last: prompt and response of each sample."""
    assert isinstance(model.model, Reads)
    rollout, eos = model.model.given[-1]
    assert eos is None, "it is among the tokens already"
    found = []
    for s in rollout.samples:
        group = rollout.tokens[s.group_id]
        response = np.split(group.response_ids, np.cumsum(group.lengths)[:-1])[s.sample_id]
        assert s.response_length == len(response) == group.lengths[s.sample_id]
        np.testing.assert_array_equal(s.prompt.token_ids, group.prompt_ids)
        found.append([*group.prompt_ids.tolist(), *response.tolist()])
    return found


@pytest.mark.parametrize("files", ["the same", "none"])
def test_the_policys_tokens_go_on_as_they_are(make: Make, files: str) -> None:
    tokenizer = make_tokenizer()
    tokenizer.eos_token = "<unk>"
    model = make(tokenizer if files == "the same" else None)
    rollout = Rollout(samples=[sample(0, 0, "a"), sample(2, 0, "b")], tokens=("r0", None, "r2"))
    assert model.score(rollout).outcomes == [(3.0, None), (3.25, None)]
    assert isinstance(model.model, Reads)
    assert model.model.given == [(rollout, 3 if files == "the same" else 2)], "with its own EOS, where it has any"
    assert model.line().endswith("reads the policy's tokens")


@pytest.mark.parametrize("chats", [False, True])
def test_text_is_read_as_reward_models_are_trained_on_it(make: Make, tmp_path: Path, chats: bool) -> None:
    model = make(other_tokenizer(), apply_chat_template=chats)
    texts = [("ask 1", "yes"), ("ask 1", "no no"), ("other", "x")]
    rows = [{"prompt": p, "chosen": text, "rejected": "-"} for p, text in texts]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = RowOptions(
        source=str(tmp_path / "pairs.jsonl"),
        tokenizer=load_tokenizer(str(tmp_path / "model"), chat_template=None),
        **{"apply_chat_template": chats, "input_template": None, "max_len": 90, "max_samples": None, "vocab_size": 261},
    )
    keys = {"prompt_key": "prompt", "chosen_key": "chosen", "rejected_key": "rejected"}
    trained = load_preference_rows(options, **keys, margin=False, values=True).rows
    expected = [ids[:-1].tolist() for ids in np.split(trained.input_ids, np.cumsum(trained.lengths)[:-1])[::2]]
    samples = [
        sample(0, 0, "yes"),
        sample(0, 1, "no no<stop>", stop_text="<stop>"),
        sample(1, 1, "x", prompt="other"),  # the first of its group is not to be scored
    ]
    outcomes = model.score(Rollout(samples=samples, tokens=())).outcomes
    assert read_rows(model, samples) == expected
    read = model.model.given[0][0].samples
    assert [reward for reward, _ in outcomes] == [s.response_length + s.group_id / 8 for s in read]
    cut = [replace(s, finish_reason="length") for s in samples]
    model.score(Rollout(samples=cut, tokens=()))
    ends = [row[-1] for row in read_rows(model, cut)]
    byte = other_tokenizer().get_vocab()
    assert ends == [byte["s"], byte["o"], byte["x"]], "at its last token, where it was cut"
    own = "with its own chat template" if chats else "as the policy reads them"
    assert own in model.line() and "reads text" in model.line()


def test_what_cannot_be_read_has_no_result_and_costs_no_other(make: Make) -> None:
    tokenizer = other_tokenizer()
    refusal = "{% if 'bad' in messages[-1].content %}{{ raise_exception('no') }}{% endif %}"
    tokenizer.chat_template = refusal + TEMPLATE
    space = tokenizer.get_vocab()["Ġ"]  # the last of those that come here
    model = make(tokenizer, apply_chat_template=True, max_tokens=60, config={"vocab_size": space})
    samples = [
        sample(0, 0, "fine", prompt="ask"),
        sample(0, 1, "", prompt="ask"),
        sample(1, 0, "a" * 80, prompt="ask"),
        sample(1, 1, "bad", prompt="ask"),
        sample(1, 2, "a b", prompt="ask"),
        sample(2, 0, "ok", prompt="ask", stopped=False),
    ]
    outcomes = model.score(Rollout(samples=samples, tokens=())).outcomes
    assert [reward is not None for reward, _ in outcomes] == [True, False, False, False, False, True]
    reasons = [reason for _, reason in outcomes]
    assert reasons[1] == "the response has no text"
    assert "tokens for the reward model, which takes 60" in str(reasons[2])
    assert "the chat template refuses it" in str(reasons[3])
    assert reasons[4] == f"it has the token {space}, which the reward model lacks"
    assert [s.group_id for s in model.model.given[0][0].samples] == [0, 2]


def test_a_text_without_tokens_costs_no_other(make: Make) -> None:
    model = make(other_tokenizer())
    samples = [sample(0, 0, "yes"), sample(1, 0, "yes", prompt=""), sample(2, 0, "no")]
    (first, _), (lost, reason), (last, _) = model.score(Rollout(samples=samples, tokens=())).outcomes
    assert first is not None and last is not None
    assert lost is None and "empty" in str(reason)


def test_nothing_to_read_asks_no_model(make: Make) -> None:
    model = make(other_tokenizer())
    assert model.score(Rollout(samples=[sample(0, 0, "")], tokens=())).outcomes == [(None, "the response has no text")]
    assert model.model.given == []


def test_scores_are_standardised_by_the_checkpoints_numbers_and_must_be_finite(make: Make) -> None:
    model = make(None, config={"mean": 1.5, "std": 4.0}, normalize=True)
    model.model.scores = lambda rollout, eos: np.array([3.5, np.nan, np.inf], dtype=np.float32)
    samples = [sample(0, number, "a") for number in range(3)]
    outcomes = model.score(Rollout(samples=samples, tokens=("r",))).outcomes
    assert outcomes == [(0.5, None), (None, "its score is nan"), (None, "its score is inf")]
    assert model.line().endswith("reward = (score - 1.5) / 4")


def test_a_tokenizer_of_its_own_must_be_one_to_render_with(make: Make) -> None:
    tokenizer = other_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match=r"o=.*model has another tokenizer than the policy.* has no chat template"):
        make(tokenizer, apply_chat_template=True)
    tokenizer.chat_template = TEMPLATE.replace("<|{{ m['role'] }}|>", "{{ messages|length }}")
    with pytest.raises(ValueError, match="does not begin with its rendered prompt"):
        make(tokenizer, apply_chat_template=True)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="has no EOS, which ends an answer"):
        make(tokenizer)
