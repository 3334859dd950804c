"""Adapters against PEFT on Transformers' model, and every layout against one process."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from megarlhf.config.lora import LoraArguments
from megarlhf.trainers.parity_cases import parity_rows
from tests.distributed.cases import sequences
from tests.distributed.layouts import LAYOUTS, MOE_LAYOUTS, SINGLE, Layout
from tests.distributed.lora_cases import Trained, dropout_case, profiled_case, rows_of, shared_case, trained_case, whole
from tests.distributed.pool import RankPool
from tests.tiny_models import VOCAB_SIZE, make_model

LORA = LoraArguments(lora_rank=4, lora_alpha=12)
SOME = LoraArguments(lora_rank=3, lora_alpha=3, target_modules=("k_proj", "up_proj", "o_proj"))
NAMES = ("TP2-SP", "TP2", "PP2-VPP2", "CP2-p2p", "DP2-distopt", "DP2-distopt-overlap", "recompute-full")


def run(
    ranks: RankPool,
    layout: Layout,
    model: Path,
    lora: LoraArguments = LORA,
    *,
    head: str = "lm",
    hf: Path | None = None,
    save: Path | None = None,
    load: Path | None = None,
    steps: tuple[int, int] = (0, 2),
) -> list[Trained]:
    return ranks.run(layout.world_size, trained_case, layout, model, lora, head, hf, save, load, steps)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def single(ranks: RankPool, llama: Path) -> list[Trained]:
    return run(ranks, SINGLE, llama)


def assert_equal(found: list[Trained], expected: list[Trained]) -> None:
    for of in ("forward", "off", "trained"):
        for row, values in rows_of(expected, of).items():
            torch.testing.assert_close(rows_of(found, of)[row], values, atol=2e-5, rtol=0)
    for of, atol in (("gradients", 2e-6), ("after", 1e-4)):
        theirs, ours = whole(expected, of), whole(found, of)
        assert theirs.keys() == ours.keys()
        for name, tensor in theirs.items():
            torch.testing.assert_close(ours[name], tensor, atol=atol, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    for rank in found:
        assert rank.loss == pytest.approx(expected[0].loss, rel=1e-5)
        assert rank.grad_norms == pytest.approx(expected[0].grad_norms, rel=1e-4)
        assert rank.base_moved == 0.0


def peft_log_probs(model: Any) -> list[Tensor]:
    rows = []
    for tokens, prompt in sequences(parity_rows(VOCAB_SIZE)):
        logits = model(torch.tensor([tokens])).logits[0, :-1]
        chosen = logits.log_softmax(-1).gather(-1, torch.tensor(tokens[1:])[:, None])[:, 0]
        rows.append(chosen[prompt - 1 :])
    return rows


@pytest.mark.parametrize("lora", [LORA, SOME], ids=["all", "some"])
def test_loss_and_gradients_equal_pefts(ranks: RankPool, llama: Path, tmp_path: Path, lora: LoraArguments) -> None:
    (ours,) = run(ranks, SINGLE, llama, lora, hf=tmp_path / "hf", steps=(0, 0))
    base = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float64)
    before = torch.cat(peft_log_probs(base))
    model = peft.PeftModel.from_pretrained(
        base, tmp_path / "hf", is_trainable=True, autocast_adapter_dtype=False
    ).double()
    found = peft_log_probs(model)
    torch.testing.assert_close(
        torch.cat([ours.forward[row] for row in range(len(found))]).double(), torch.cat(found), atol=1e-5, rtol=0
    )
    torch.testing.assert_close(
        torch.cat([ours.off[row] for row in range(len(found))]).double(), before, atol=1e-5, rtol=0
    )
    assert (torch.cat(found) - before).abs().max() > 0.01
    loss = -torch.cat(found).mean()
    loss.backward()
    assert ours.loss == pytest.approx(loss.item(), abs=1e-6)
    theirs = {name.replace(".default", ""): p.grad for name, p in model.named_parameters() if p.requires_grad}
    mine = whole([ours], "gradients")
    assert mine.keys() == theirs.keys()
    for name, gradient in theirs.items():
        torch.testing.assert_close(mine[name].double(), gradient, atol=1e-6, rtol=1e-4)
    trained = sum(gradient.numel() for gradient in mine.values())
    assert ours.gradient_bytes == 4 * trained


@pytest.mark.parametrize("name", NAMES)
def test_layouts_equal_one_process(ranks: RankPool, llama: Path, single: list[Trained], name: str) -> None:
    assert_equal(run(ranks, LAYOUTS[name], llama), single)


@pytest.mark.slow
def test_a_subset_under_tensor_parallelism(ranks: RankPool, llama: Path) -> None:
    assert_equal(run(ranks, LAYOUTS["TP2-SP"], llama, SOME), run(ranks, SINGLE, llama, SOME))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["TP2-SP", "PP2"])
def test_value_heads_train_beside_adapters(ranks: RankPool, llama: Path, name: str) -> None:
    expected = run(ranks, SINGLE, llama, head="value")
    assert "base_model.model.score.weight" in whole(expected, "after")
    assert_equal(run(ranks, LAYOUTS[name], llama, head="value"), expected)


@pytest.mark.slow
def test_experts(ranks: RankPool, tmp_path: Path) -> None:
    model = make_model(tmp_path / "mixtral", family="mixtral")
    expected = run(ranks, SINGLE, model)
    layouts = [MOE_LAYOUTS[name] for name in ("EP2", "TP2-SP", "TP2-SP-EP2-ETP1")]
    for layout in (*layouts, Layout(data=4, expert=2, expert_tensor=2)):
        assert_equal(run(ranks, layout, model), expected)


@pytest.mark.slow
def test_latent_attention(ranks: RankPool, tmp_path: Path) -> None:
    model = make_model(tmp_path / "deepseek", family="deepseek-v3")
    assert_equal(run(ranks, MOE_LAYOUTS["TP2-SP"], model), run(ranks, SINGLE, model))


@pytest.mark.parametrize(
    ("family", "layout"),
    [("llama", LAYOUTS["TP2-SP"]), ("llama", LAYOUTS["PP2-VPP2"]), ("mixtral", MOE_LAYOUTS["EP2"])],
)
def test_exports_load_with_peft(ranks: RankPool, tmp_path: Path, family: str, layout: Layout) -> None:
    model = make_model(tmp_path / "model", family=family)
    ours = run(ranks, layout, model, hf=tmp_path / "hf")
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    found = peft_log_probs(peft.PeftModel.from_pretrained(base, tmp_path / "hf"))
    for row, values in rows_of(ours, "trained").items():
        torch.testing.assert_close(values, found[row], atol=1e-5, rtol=0)
        assert (values - rows_of(ours, "forward")[row]).abs().max() > 1e-3


def test_a_checkpoint_goes_on_in_another_layout(ranks: RankPool, llama: Path, tmp_path: Path) -> None:
    whole_run = run(ranks, SINGLE, llama, steps=(0, 4))
    run(ranks, LAYOUTS["TP2-SP"], llama, save=tmp_path / "saved", steps=(0, 2))
    rest = run(ranks, LAYOUTS["PP2-VPP2"], llama, load=tmp_path / "saved", steps=(2, 4))
    assert rest[0].grad_norms == pytest.approx(whole_run[0].grad_norms[2:], rel=1e-4)
    names = whole(whole_run, "after")
    for name, tensor in whole(rest, "after").items():
        torch.testing.assert_close(tensor, names[name], atol=2e-4, rtol=1e-3)
    size = sum(path.stat().st_size for path in (tmp_path / "saved").rglob("*"))
    assert size < (llama / "model.safetensors").stat().st_size


def test_unknown_modules_are_refused(ranks: RankPool, llama: Path) -> None:
    wrong = LoraArguments(lora_rank=4, target_modules=("q_proj", "query"))
    with pytest.raises(RuntimeError, match=r"target_modules=query.*all-linear.*down_proj.*q_proj"):
        run(ranks, SINGLE, llama, wrong)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["TP2-SP", "PP2", "DP2-distopt-overlap"])
def test_engines_read_merged_weights(ranks: RankPool, llama: Path, tmp_path: Path, name: str) -> None:
    layout = LAYOUTS[name]
    read, *_ = ranks.run(layout.world_size, shared_case, layout, llama, tmp_path / "hf")
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), tmp_path / "hf")
    base = {key: tensor.clone() for key, tensor in AutoModelForCausalLM.from_pretrained(llama).state_dict().items()}
    merged = model.merge_and_unload().state_dict()
    for key, tensor in read.items():
        torch.testing.assert_close(tensor, merged[key], atol=1e-6, rtol=0)
        assert torch.equal(tensor, base[key]) == ("proj" not in key)


@pytest.mark.parametrize("head", ["lm", "value"])
@pytest.mark.parametrize("layout", [SINGLE, LAYOUTS["TP2"], LAYOUTS["PP2"]], ids=["single", "TP2", "PP2"])
def test_frozen_matrices_multiply_whole_gradients(ranks: RankPool, llama: Path, layout: Layout, head: str) -> None:
    """Not token by token, as matmul does where strides are not those of a new tensor."""
    for operations in ranks.run(layout.world_size, profiled_case, layout, llama, head):
        assert "aten::mm" in operations and "aten::bmm" not in operations


@pytest.mark.slow
@pytest.mark.parametrize("name", ["TP2", "TP2-SP", "recompute-full"])
def test_dropout_is_of_the_step(ranks: RankPool, llama: Path, tmp_path: Path, name: str) -> None:
    model = tmp_path / "model"
    model.symlink_to(llama)
    layout = LAYOUTS[name]
    first, *others = ranks.run(layout.world_size, dropout_case, layout, model)
    with_dropout, again, resumed, without = first
    assert with_dropout == again and resumed == pytest.approx(with_dropout[1:], rel=1e-6)
    assert all(abs(a - b) > 1e-4 for a, b in zip(with_dropout, without, strict=True))
    assert all(other == first for other in others)
