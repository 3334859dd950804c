"""Weights in 4 bits against the same model with its matrices quantised whole by bitsandbytes, in every layout."""

from dataclasses import replace
from pathlib import Path
from weakref import ref

import peft
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from megarlhf.data.supervised import SupervisedData
from megarlhf.engine.export import export_hf
from megarlhf.engine.sharing import SharedWeights
from megarlhf.formats.huggingface import read_checkpoint
from megarlhf.models import four_bit
from megarlhf.models.registry import find_architecture
from megarlhf.models.sizes import layer_widths, stage_sizes
from megarlhf.planner.memory import rank_bytes
from megarlhf.trainers.parity_cases import parity_case, parity_rows
from megarlhf.trainers.reference import REF_LOG_PROBS, with_reference_log_probs
from tests.distributed.cases import Parts, by_row, read_shared
from tests.distributed.layouts import LAYOUTS, MOE_LAYOUTS, SINGLE, Layout, build, world
from tests.distributed.lora_cases import Trained, rows_of, start_adapters
from tests.distributed.pool import RankPool
from tests.distributed.test_lora import LORA, assert_equal, peft_log_probs, run
from tests.models.test_sizes import arguments, work
from tests.tiny_models import VOCAB_SIZE, make_model

FOUR_BIT = replace(LORA, load_in_4bit=True)
WHOLE = (".gate.weight", ".q_a_proj.weight", ".kv_a_proj_with_mqa.weight")  # matrices that stay as they are
WIDE = {"intermediate_size": 128}  # two blocks: one on each of two ranks


def is_matrix(name: str, tensor: Tensor) -> bool:
    return ".layers." in name and tensor.dim() == 2 and not name.endswith(WHOLE)


def quantised_model(model: Path, directory: Path) -> Path:
    """The checkpoint with every matrix of attention and feed-forward parts as its 4 bits have it."""
    weights = load_file(model / "model.safetensors")
    for name, tensor in weights.items():
        if is_matrix(name, tensor):
            weights[name] = dequantize_4bit(*quantize_4bit(tensor, blocksize=64, quant_type="nf4"))
            assert 0.001 < (weights[name] - tensor).abs().max() < 0.1
    directory.mkdir()
    (directory / "config.json").write_bytes((model / "config.json").read_bytes())
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    return directory


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model, and its quantised twin."""
    directory = tmp_path_factory.mktemp("models")
    model = make_model(directory / "llama", **WIDE)
    return model, quantised_model(model, directory / "quantised")


@pytest.fixture(scope="module")
def expected(ranks: RankPool, models: tuple[Path, Path]) -> list[Trained]:
    """Ordinary adapters beside the twin, in one process."""
    return run(ranks, SINGLE, models[1])


@pytest.mark.parametrize("name", ["TP2", "TP2-SP", "PP2", "DP2-distopt", "recompute-full"])
def test_layouts_equal_the_quantised_twin(
    ranks: RankPool, models: tuple[Path, Path], expected: list[Trained], name: str
) -> None:
    assert_equal(run(ranks, LAYOUTS[name], models[0], FOUR_BIT), expected)


@pytest.mark.parametrize("name", ["EP2", "TP2-SP-EP2-ETP1"])
def test_experts(ranks: RankPool, tmp_path: Path, name: str) -> None:
    model = make_model(tmp_path / "mixtral", family="mixtral", **WIDE)
    twin = quantised_model(model, tmp_path / "quantised")
    assert_equal(run(ranks, MOE_LAYOUTS[name], model, FOUR_BIT), run(ranks, SINGLE, twin))


LATENT = {"kv_lora_rank": 64, "q_lora_rank": 64, "v_head_dim": 32, "moe_intermediate_size": 128}


@pytest.mark.slow
@pytest.mark.parametrize(("family", "head"), [("qwen2", "value"), ("gemma3", "lm"), ("deepseek-v3", "lm")])
def test_other_layers(ranks: RankPool, tmp_path: Path, family: str, head: str) -> None:
    sizes = LATENT if family == "deepseek-v3" else {"hidden_size": 128}
    model = make_model(tmp_path / "model", family=family, **WIDE, **sizes)
    twin = quantised_model(model, tmp_path / "quantised")
    found = run(ranks, LAYOUTS["TP2-SP"], model, FOUR_BIT, head=head)
    assert_equal(found, run(ranks, SINGLE, twin, head=head))


@pytest.mark.parametrize("name", ["TP2", "PP2"])
def test_logits_and_export_equal_transformers(
    ranks: RankPool, models: tuple[Path, Path], tmp_path: Path, name: str
) -> None:
    ours = run(ranks, LAYOUTS[name], models[0], FOUR_BIT, hf=tmp_path / "hf")
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(models[0], quantization_config=nf4, dtype=torch.float32)
    theirs.train()  # some CPUs have another path in evaluation, which rounds to bfloat16; there is no dropout
    plain = peft_log_probs(theirs)
    adapted = peft_log_probs(peft.PeftModel.from_pretrained(theirs, tmp_path / "hf").train())
    for of, expected in (("off", plain), ("trained", adapted)):
        for row, values in rows_of(ours, of).items():
            torch.testing.assert_close(values, expected[row], atol=1e-5, rtol=0)


def weights_case(
    rank: int, world_size: int, init_method: str, layout: Layout, model_dir: Path, hf: Path
) -> tuple[int, Parts, dict[str, Tensor], int]:
    """This rank's matrices, whole tensors as engines read them, and bytes of parameters; what it looks at itself is
    that sleep gives the bytes back and waking the numbers."""
    with world(layout, rank, init_method):
        engine = build(layout, model_dir, lora=FOUR_BIT)
        start_adapters(engine)
        rows = parity_rows(VOCAB_SIZE)
        before = by_row(rows, engine.forward(engine.micro_batches(rows)))
        num_bytes = engine.memory.num_bytes()["parameters"]
        engine.sleep("parameters")
        assert engine.memory.num_bytes()["parameters"] == 0
        engine.wake("parameters")
        after = by_row(rows, engine.forward(engine.micro_batches(rows)))
        assert before.keys() == after.keys() and all(torch.equal(before[row], after[row]) for row in before)
        shared = SharedWeights(engine)
        engine.train_step(rows, parity_case("sft").objective, denominator=50.0)
        export_hf(engine, hf)
        read = {name: tensor.clone() for name, tensor in read_shared(shared).items()}
        parts = [
            (shard.hf_name, shard.index, shard.view.reshape(-1).clone())
            for local in engine.weights.local
            for shard in engine.weights.shards(local, local.data)
            if local.exported
        ]
        return engine.ranks.pp_rank, parts, read, num_bytes


LAYOUTS_OF_WEIGHTS = {
    "one": ("llama", SINGLE),
    "TP2-SP": ("llama", LAYOUTS["TP2-SP"]),
    "PP2-VPP2": ("llama", LAYOUTS["PP2-VPP2"]),
    "EP2": ("mixtral", MOE_LAYOUTS["EP2-distopt"]),
    "bf16": ("llama", Layout(bf16=True, tensor=2)),
}


@pytest.mark.parametrize("name", LAYOUTS_OF_WEIGHTS)
def test_matrices_of_each_rank_and_their_bytes(ranks: RankPool, tmp_path: Path, name: str) -> None:
    family, layout = LAYOUTS_OF_WEIGHTS[name]
    model = make_model(tmp_path / "model", family=family, **WIDE)
    if layout.bf16:
        as_bf16 = {name: tensor.bfloat16() for name, tensor in load_file(model / "model.safetensors").items()}
        save_file(as_bf16, model / "model.safetensors", {"format": "pt"})
    twin = load_file(quantised_model(model, tmp_path / "twin") / "model.safetensors")
    hf, _ = read_checkpoint(model)
    arch, asked = find_architecture(hf), replace(work(layout, hf.vocab_size), has_reference=False)
    planned = {
        kind: stage_sizes(arch, hf, arguments(layout), head="lm", lora=lora)
        for kind, lora in (("whole", LORA), ("4 bits", FOUR_BIT))
    }
    found = ranks.run(layout.world_size, weights_case, layout, model, tmp_path / "hf")
    adapter = load_file(tmp_path / "hf" / "adapter_model.safetensors")
    seen = set()
    for stage, parts, _, num_bytes in found:
        for hf_name, index, numbers in parts:
            assert torch.equal(numbers, twin[hf_name][index].reshape(-1)), hf_name
            seen.add(hf_name)
        whole, in_4_bits = (
            rank_bytes(sizes, layer_widths(arch, hf), asked, stage=stage).parameters for sizes in planned.values()
        )
        assert num_bytes == in_4_bits < 0.6 * whole
    assert seen == set(twin)
    for hf_name, tensor in found[0][2].items():  # what engines read: adapters merged into the twin's numbers
        merged = twin[hf_name].float()
        if is_matrix(hf_name, tensor):
            a, b = (adapter[f"base_model.model.{hf_name[:-7]}.lora_{part}.weight"] for part in "AB")
            merged = merged + b @ a * (12 / 4)
        torch.testing.assert_close(tensor, merged.to(tensor.dtype), atol=1e-6, rtol=2**-7 if layout.bf16 else 0)


def layer_case(rank: int, world_size: int, init_method: str, layout: Layout, model_dir: Path) -> None:
    """The matrix is there only while it multiplies, in either pass."""
    with world(layout, rank, init_method), pytest.MonkeyPatch.context() as patch:
        engine = build(layout, model_dir, optimizer=False, lora=FOUR_BIT)
        linear = engine.chunks[0].decoder.layers[0].mlp.linear_fc1
        matrices: list[ref[Tensor]] = []

        def watched(weight: Tensor) -> Tensor:
            matrix = dense(weight)
            matrices.append(ref(matrix))
            return matrix

        dense = four_bit.dense
        patch.setattr(four_bit, "dense", watched)
        hidden = torch.randn(5, 1, 64, requires_grad=True)
        output, _ = linear(hidden)
        assert [matrix() for matrix in matrices] == [None]
        output.sum().backward()
        assert [matrix() for matrix in matrices] == [None, None]
        assert linear.weight.grad is None and hidden.grad is not None
        torch.testing.assert_close(hidden.grad, dense(linear.weight).sum(0).expand(5, 1, 64))


def test_a_matrix_lives_while_it_multiplies(ranks: RankPool, models: tuple[Path, Path]) -> None:
    ranks.run(1, layer_case, SINGLE, models[0])


def cached_case(
    rank: int, world_size: int, init_method: str, layout: Layout, model_dir: Path, cache: Path
) -> list[Tensor]:
    """Reference log-probs that are computed once, beside whole weights and beside those in 4 bits."""
    with world(layout, rank, init_method):
        data, found = SupervisedData(rows=parity_rows(VOCAB_SIZE)), []
        for lora in (LORA, FOUR_BIT):
            engine = build(layout, model_dir, optimizer=False, lora=lora)
            (completed,) = with_reference_log_probs(engine, [data], ref_pretrain=None, directory=cache)
            found.append(torch.from_numpy(completed.rows.fields[REF_LOG_PROBS]))
        return found


def test_what_is_computed_once_is_of_the_same_weights(
    ranks: RankPool, models: tuple[Path, Path], tmp_path: Path
) -> None:
    (found,) = ranks.run(1, cached_case, SINGLE, models[0], tmp_path / "cache")
    for values, model in zip(found, models, strict=True):
        expected = torch.cat(peft_log_probs(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)))
        torch.testing.assert_close(values, expected, atol=1e-5, rtol=0)
