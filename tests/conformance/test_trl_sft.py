"""Loss and gradients of chats whose every turn is trained, against TRL's SFTTrainer on the same model and rows.

TRL takes some eight seconds to import, so it is imported in the test.
"""

import json
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from examples.demo.make_assets import make_tokenizer
from megarlhf.data.sft import load_sft_rows
from megarlhf.data.types import TrainingRows
from megarlhf.trainers.parity import whole_gradients
from megarlhf.trainers.sft import sft_objective
from tests.data.rows import load_with
from tests.distributed.cases import Parts, assemble, parts
from tests.distributed.layouts import SINGLE, Layout, build, world
from tests.distributed.pool import RankPool
from tests.tiny_models import make_model

TEMPLATE = (
    "{% for m in messages %}{{ m['role'][0] }}={% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] }}</s>{% endgeneration %}{% else %}{{ m['content'] }}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}a={% endif %}"
)
CHATS = [
    [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(texts)]
    for texts in (["1 2", "3", "abc", "d"], ["7", "xyz"], ["a", "b", "c", "", "e", "0123456789"])
]


def load(path: str, tokenizer: PreTrainedTokenizerBase, *, multiturn: bool) -> TrainingRows:
    return load_with(
        load_sft_rows,
        path,
        tokenizer,
        input_key="messages",
        output_key=None,
        apply_chat_template=True,
        max_len=64,
        pretrain_mode=False,
        multiturn=multiturn,
        vocab_size=len(tokenizer),
    ).rows


def case(
    rank: int, world_size: int, init_method: str, layout: Layout, model_dir: Path, rows: TrainingRows
) -> tuple[float, Parts]:
    """Loss and gradients."""
    with world(layout, rank, init_method):
        engine = build(layout, model_dir)
        with whole_gradients(engine):
            loss, _, _ = engine.accumulate_gradients(
                engine.micro_batches(rows), sft_objective(), denominator=float(rows.num_loss_targets.sum())
            )
        return loss, parts(engine, gradients=True)


@pytest.mark.parametrize("layout", [SINGLE, replace(SINGLE, max_tokens=32)], ids=["packed", "unpacked"])
def test_loss_and_gradients_are_those_of_trl(ranks: RankPool, tmp_path: Path, layout: Layout) -> None:
    from trl import SFTConfig, SFTTrainer

    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    model_dir = make_model(tmp_path / "model", vocab_size=len(tokenizer))
    data = tmp_path / "chats.jsonl"
    data.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in CHATS))
    rows = load(str(data), tokenizer, multiturn=True)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    arguments = SFTConfig(
        output_dir=str(tmp_path / "trl"),
        assistant_only_loss=True,
        max_length=64,
        per_device_train_batch_size=len(CHATS),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
    )
    trainer = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=datasets.Dataset.from_list([{"messages": chat} for chat in CHATS]),
        processing_class=tokenizer,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    assert int((batch["labels"] != -100).sum()) == rows.num_loss_targets.sum()
    expected = trainer.compute_loss(model.train(), dict(batch))
    expected.backward()
    loss, found = ranks.run(layout.world_size, case, layout, model_dir, rows)[0]
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, gradient in assemble([found]).items():
        assert torch.allclose(gradient, gradients[name], atol=1e-6 * float(np.sqrt(gradient.numel()))), name
    last = load(str(data), tokenizer, multiturn=False)
    assert last.num_loss_targets.sum() < rows.num_loss_targets.sum(), "the mask is seen"
