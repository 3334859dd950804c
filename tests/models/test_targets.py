"""Which modules may have adapters, from tables."""

from pathlib import Path

import pytest

from megarlhf.cli.run import check_weights
from megarlhf.config.layouts import LayoutArguments, TransformerImpl
from megarlhf.config.lora import LoraArguments
from tests.tiny_models import make_model

# family -> modules of experts, of which adapters stand beside each alone; and others
EXPERTS = {
    "mixtral": (("w1", "w2", "w3"), ("q_proj", "o_proj")),
    "qwen3-moe": (("gate_proj", "up_proj", "down_proj"), ("k_proj", "v_proj")),
    "llama": ((), ("all-linear",)),
}


def check(directory: Path, targets: tuple[str, ...], impl: TransformerImpl, *, rank: int = 2) -> None:
    lora = LoraArguments(lora_rank=rank, target_modules=targets)
    check_weights([("pretrain", str(directory), LayoutArguments(), "lm")], transformer_impl=impl, lora=lora)


@pytest.mark.parametrize("family", EXPERTS)
def test_adapters_of_experts_are_refused_where_these_are_grouped(tmp_path: Path, family: str) -> None:
    model, (experts, others) = make_model(tmp_path / "model", family=family, num_hidden_layers=2), EXPERTS[family]
    for targets in (("all-linear",), experts[:1], (*experts[1:], *others)):
        if targets:
            check(model, targets, "local")
            check(model, targets, "transformer_engine", rank=0)
        if not experts:
            continue
        meant = experts if "all-linear" in targets else set(experts) & set(targets)
        named = ", ".join(sorted(meant))
        with pytest.raises(ValueError, match=rf"target_modules={' '.join(targets)}; {named} are experts'.*=local"):
            check(model, targets, "transformer_engine")
    check(model, others, "transformer_engine")
