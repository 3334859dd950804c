"""Counted numbers and bytes against those of models that Megatron-Core builds: on real ranks, and in a large world."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig

from megarlhf.config.layouts import LayoutArguments
from megarlhf.config.lora import LoraArguments
from megarlhf.data.model_sizes import ChunkSizes
from megarlhf.formats.huggingface import read_checkpoint, read_config
from megarlhf.models.build import ModelOptions, build_model
from megarlhf.models.names import padded_vocab_size
from megarlhf.models.registry import find_architecture
from megarlhf.models.sizes import engine_sizes, kv_numbers_per_token, layer_widths, stage_depths, stage_sizes
from megarlhf.parallel.groups import ParallelSizes, fake_world
from megarlhf.planner.memory import Work, rank_bytes
from megarlhf.trainers.parity_cases import (
    parity_case,
)
from tests.distributed.cases import make_rows
from tests.distributed.layouts import LARGE_LAYOUTS, LARGE_MOE_LAYOUTS, LAYOUTS, MOE_LAYOUTS, Layout, build, world
from tests.distributed.pool import RankPool
from tests.engine.test_offload import bytes_of
from tests.tiny_models import make_model

Head = Literal["lm", "value"]
Counted = tuple[list[int], list[int], int]  # dense and experts' parameters, smallest first; buffers
Bytes = dict[str, int]


def arguments(layout: Layout) -> LayoutArguments:
    """As flags give it."""
    return LayoutArguments(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        num_virtual_stages_per_pipeline_rank=layout.virtual if layout.virtual > 1 else None,
        decoder_first_pipeline_num_layers=layout.first_stage_layers,
        decoder_last_pipeline_num_layers=layout.last_stage_layers,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=layout.expert_tensor,
        sequence_parallel=layout.sequence_parallel,
    )


def of_chunk(chunk: Any) -> Counted:
    """What a built chunk holds; buffers are experts' biases alone."""
    parameters = list(chunk.named_parameters())
    biases = [buffer for name, buffer in chunk.named_buffers() if name.endswith("expert_bias")]
    dense = sorted(p.numel() for name, p in parameters if ".experts." not in name)
    return dense, sorted(p.numel() for name, p in parameters if ".experts." in name), sum(b.numel() for b in biases)


def counted(chunk: ChunkSizes) -> Counted:
    return sorted(chunk.dense), sorted(chunk.experts), chunk.buffers


def nbytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def measured(engine: Any) -> Bytes:
    """Bytes of each part, whether it is awake or not: of whole buffers where Megatron-Core keeps some."""
    parameters = [p.data for chunk in engine.chunks for p in chunk.parameters()]
    pools, buffers = engine.parameter_pools(), engine._ddp_buffers()
    biases = [b for chunk in engine.chunks for name, b in chunk.named_buffers() if name.endswith("expert_bias")]
    stepped = [p for group in engine.optimizer.param_groups for p in group["params"]]
    states = [t for part in engine.optimizer.chained_optimizers for t in _tensors(part.optimizer.state.values())]
    in_place = {tensor.untyped_storage()._cdata for tensor in (*parameters, *pools)}
    reference = getattr(engine._reference, "tensors", engine._reference)
    return {
        "parameters": nbytes(pools or parameters) + nbytes(biases),
        "gradients": nbytes([buffer.grad_data for buffer in buffers]),
        "optimizer": nbytes(states) + nbytes([t for t in stepped if t.untyped_storage()._cdata not in in_place]),
        "reference": nbytes(list(reference.values())),
    }


def _tensors(states: Any) -> list[Tensor]:
    return [value for state in states for key, value in state.items() if key in ("exp_avg", "exp_avg_sq")]


def built(
    rank: int, world_size: int, init_method: str, layout: Layout, model_dir: Path, head: Head
) -> tuple[int, list[Counted], Bytes]:
    """The rank's stage, and its engine's numbers and bytes after an optimizer step."""
    with world(layout, rank, init_method):
        engine = build(layout, model_dir, head=head)
        engine.keep_reference()
        engine.train_step(make_rows(), parity_case("critic" if head == "value" else "sft").objective, denominator=50.0)
        return engine.ranks.pp_rank, [of_chunk(chunk) for chunk in engine.chunks], measured(engine)


def work(layout: Layout, vocab_size: int) -> Work:
    etp = layout.expert_tensor or layout.tensor
    return Work(
        bf16=layout.bf16,
        tensor=layout.tensor,
        pipeline=layout.pipeline,
        virtual=layout.virtual,
        expert_tensor=etp,
        sequence_parallel=layout.sequence_parallel,
        replicas=layout.data * layout.context,
        expert_replicas=layout.world_size // (layout.expert * etp * layout.pipeline),
        distributed_optimizer=layout.distributed_optimizer,
        recompute=None,
        recompute_method=None,
        recompute_num_layers=None,
        tokens=64,
        micro_batches=8,
        vocabulary=padded_vocab_size(vocab_size, layout.tensor),
        logprob_chunk_tokens=2048,
        has_reference=True,
    )


CASES: list[tuple[str, bool, Head, Layout]] = [
    ("qwen3", True, "lm", LAYOUTS["TP2-PP2"]),
    ("llama", False, "value", LAYOUTS["PP3-uneven"]),
    ("qwen2", True, "lm", LAYOUTS["PP2-VPP2"]),
    ("llama", False, "lm", Layout(data=2, distributed_optimizer=True, bf16=True)),
    ("gemma3", True, "lm", LARGE_LAYOUTS["TP2-SP-DP2-distopt-overlap"]),
    ("qwen3-moe", False, "lm", MOE_LAYOUTS["EP2-distopt"]),
    ("qwen3-moe", False, "lm", MOE_LAYOUTS["PP2-VPP2"]),  # where two dense layers come first, chunks differ
    ("mixtral", False, "lm", MOE_LAYOUTS["TP2-SP-EP2-ETP1"]),
    ("deepseek-v3", False, "lm", LARGE_MOE_LAYOUTS["EP2-PP2"]),
    ("qwen2-moe", False, "lm", Layout(bf16=True)),
]


@pytest.mark.parametrize(("family", "tied", "head", "layout"), CASES)
def test_numbers_and_bytes_of_built_engines(
    ranks: RankPool, tmp_path: Path, family: str, tied: bool, head: Head, layout: Layout
) -> None:
    first_dense: dict[str, Any] = {"mlp_only_layers": [0, 1]} if family == "qwen3-moe" else {}
    directory = make_model(tmp_path / "model", family=family, tied=tied, **first_dense)
    hf, _ = read_checkpoint(directory)
    arch, asked = find_architecture(hf), work(layout, hf.vocab_size)
    stages, widths = stage_sizes(arch, hf, arguments(layout), head=head), layer_widths(arch, hf)
    found = ranks.run(layout.world_size, built, layout, directory, head)
    for stage, chunks, held in found:
        assert [counted(chunk) for chunk in stages[stage]] == chunks
        planned = rank_bytes(stages, widths, asked, stage=stage)
        assert planned.reference == held["reference"]
        for part in ("parameters", "gradients"):
            # A bucket more, for overlap or a tied embedding, is padded by less than 128 numbers.
            assert abs(getattr(planned, part) - held[part]) < (4 * 128 if layout.overlap else 1), part
    for stage in range(layout.pipeline):  # replicas' parts of a buffer differ; together they are all of it
        parts = [held["optimizer"] for number, _, held in found if number == stage]
        planned = rank_bytes(stages, widths, asked, stage=stage)
        padding = sum(4 * 3 * (64 * len(c.dense) + 64 * len(c.experts) + 512) for c in stages[stage])
        together = planned.optimizer * len(parts)
        assert (
            together - padding * len(parts) <= sum(parts) <= together
            if layout.distributed_optimizer
            else (together == sum(parts))
        )


def with_adapters(
    rank: int, world_size: int, init_method: str, layout: Layout, model_dir: Path, head: Head, lora: LoraArguments
) -> tuple[int, Bytes, Bytes]:
    """The rank's stage; bytes of each part as the engine counts them, at most; what they are once a step is over."""
    with world(layout, rank, init_method):
        engine = build(layout, model_dir, head=head, lora=lora)
        engine.keep_reference()
        engine.train_step(make_rows(), parity_case("critic" if head == "value" else "sft").objective, denominator=50.0)
        with engine.reference_weights():
            engine.forward(engine.micro_batches(make_rows()))
        return engine.ranks.pp_rank, dict(engine.memory.largest_bytes()), dict(engine.memory.num_bytes())


@pytest.mark.parametrize(
    ("family", "head", "layout", "lora"),
    [
        ("llama", "value", LAYOUTS["TP2-SP"], LoraArguments(lora_rank=5)),
        ("qwen2", "lm", LAYOUTS["PP2-VPP2"], LoraArguments(lora_rank=3, target_modules=("q_proj", "down_proj"))),
        ("llama", "lm", Layout(distributed_optimizer=True, bf16=True), LoraArguments(lora_rank=5)),
        ("mixtral", "lm", MOE_LAYOUTS["TP2-SP-EP2-ETP1"], LoraArguments(lora_rank=4)),
    ],
)
def test_bytes_with_adapters_have_one_copy_of_the_base(
    ranks: RankPool, tmp_path: Path, family: str, head: Head, layout: Layout, lora: LoraArguments
) -> None:
    directory = make_model(tmp_path / "model", family=family)
    hf, _ = read_checkpoint(directory)
    arch, asked = find_architecture(hf), replace(work(layout, hf.vocab_size), has_reference=False)
    stages = stage_sizes(arch, hf, arguments(layout), head=head, lora=lora)
    full = stage_sizes(arch, hf, arguments(layout), head=head)
    for stage, largest, after in ranks.run(layout.world_size, with_adapters, layout, directory, head, lora):
        planned = rank_bytes(stages, layer_widths(arch, hf, lora=lora), asked, stage=stage)
        assert largest["reference"] == planned.reference == 0
        assert (planned.parameters, planned.gradients) == (after["parameters"], largest["gradients"])
        numbers = [number for chunk in stages[stage] for number in (*chunk.dense, *chunk.experts)]
        padding = (planned.gradients // 4 - sum(numbers)) * (12 if layout.bf16 else 8)
        steps = after["optimizer"] - (planned.optimizer - padding)  # torch's count of them, for each parameter
        assert 0 < steps <= 4 * len(numbers)
        base = sum(sum(c.dense) + sum(c.experts) for c in full[stage]) * asked.element
        assert base < planned.parameters < 1.5 * base


def kept_for_the_backward_pass(
    rank: int, world_size: int, init_method: str, models: tuple[Path, Path], lora: LoraArguments | None
) -> float:
    """Numbers that a layer keeps of a token: what two models differ by, one of which has a layer more."""
    layout, totals = Layout(max_tokens=512), []
    with world(layout, rank, init_method):
        for model_dir in models:
            engine, storages = build(layout, model_dir, lora=lora), dict[int, int]()
            own = {p.untyped_storage().data_ptr() for _, p in engine.named_parameters()}

            def note(tensor: Tensor, own: set[int] = own, storages: dict[int, int] = storages) -> Tensor:
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in own:
                    storages[storage.data_ptr()] = storage.nbytes()
                return tensor

            (batch,) = engine.micro_batches(make_rows())
            with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
                engine.step([batch], parity_case("sft").objective, denominator=50.0)
            totals.append(sum(storages.values()) / 4 / len(batch.tokens))
    return totals[1] - totals[0]


def test_what_a_layer_keeps_with_adapters(ranks: RankPool, tmp_path: Path) -> None:
    """Measured where o_proj has an adapter, whose input is a copy on a CPU, and where masks are float32."""
    sizes = {"hidden_size": 128, "intermediate_size": 320}
    models = tuple(make_model(tmp_path / str(n), num_hidden_layers=n, **sizes) for n in (2, 3))
    hf, _ = read_checkpoint(models[0])
    arch = find_architecture(hf)

    def measured_and_planned(*targets: str, dropout: float = 0.0) -> tuple[float, int]:
        lora = LoraArguments(lora_rank=4, lora_dropout=dropout, target_modules=("o_proj", *targets))
        widths = layer_widths(arch, hf, lora=lora)
        (measured,) = ranks.run(1, kept_for_the_backward_pass, models, lora)
        return measured, widths.whole + widths.attention + widths.dense

    measured, planned = measured_and_planned("all-linear")
    assert planned == sum(getattr(layer_widths(arch, hf), name) for name in ("whole", "attention", "dense")) + 7 * 4
    for targets in (("q_proj",), ("k_proj", "up_proj"), ("down_proj",), ()):
        found, expected = measured_and_planned(*targets)
        assert found - measured == pytest.approx(expected - planned) and expected < planned, targets
    found, expected = measured_and_planned("all-linear", dropout=0.5)
    modules = 5 * 128 + 128 + 320
    # a mask is half a number in the plan; o_proj's own input, which the copy stands for, is kept by attention on a GPU
    assert found - measured == pytest.approx(expected - planned + modules / 2 - 128)


def llama_70b() -> LlamaConfig:
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128256,
        tie_word_embeddings=False,
    )


def test_a_rank_of_a_70b_world() -> None:
    hf, sizes = llama_70b(), ParallelSizes(tensor=8, pipeline=4)
    arch = find_architecture(hf)
    layout = LayoutArguments(tensor_model_parallel_size=8, pipeline_model_parallel_size=4, sequence_parallel=True)
    stages = stage_sizes(arch, hf, layout, head="lm")
    options = ModelOptions(bf16=True, layout=layout)
    for stage, rank in ((0, 3), (1, 12), (3, 31)):
        with fake_world(sizes, rank=rank, world_size=32) as ranks:
            (chunk,), _ = build_model(arch, hf, ranks, options, head="lm", seed=0)
            assert ranks.pp_rank == stage and of_chunk(chunk) == counted(stages[stage][0])
    # Published: 70.55 billion; 161 norms are on each of 8 tensor-parallel ranks.
    assert 8 * sum(map(sum, (chunk.dense for (chunk,) in stages))) - 7 * 161 * 8192 == 70_553_706_496


def test_layers_of_uneven_stages() -> None:
    first = LayoutArguments(pipeline_model_parallel_size=4, decoder_first_pipeline_num_layers=9)
    assert stage_depths(30, first) == [9, 7, 7, 7]
    both = replace(first, decoder_first_pipeline_num_layers=8, decoder_last_pipeline_num_layers=6)
    assert stage_depths(30, both) == [8, 8, 8, 6]
    assert stage_depths(30, LayoutArguments()) == [30]


def test_of_inference_engines(tmp_path: Path) -> None:
    hf = llama_70b()
    arch = find_architecture(hf)
    # 327,680 bytes a token in bfloat16 over all ranks; more ranks than KV heads hold one each.
    assert kv_numbers_per_token(arch, hf, tensor=1) * 2 == 327_680
    assert kv_numbers_per_token(arch, hf, tensor=4) * 2 == 81_920
    assert kv_numbers_per_token(arch, hf, tensor=16) == kv_numbers_per_token(arch, hf, tensor=8)
    whole, largest = engine_sizes(arch, hf, tensor=1)
    assert (whole, largest) == (70_553_706_496, 128256 * 8192)
    over_eight, _ = engine_sizes(arch, hf, tensor=8)
    assert engine_sizes(arch, hf, tensor=16)[0] * 2 - over_eight == 161 * 8192 + 2 * 80 * 128 * 8192
    latent = read_config(make_model(tmp_path / "latent", family="deepseek-v3"))
    assert kv_numbers_per_token(find_architecture(latent), latent, tensor=2) == 4 * (32 + 16)
    experts = read_config(make_model(tmp_path / "experts", family="mixtral"))
    # A layer's 4 experts of 3 matrices [96, 64] are one module.
    assert engine_sizes(find_architecture(experts), experts, tensor=1)[1] == 4 * 3 * 96 * 64


def test_bytes_of_an_optimizer_that_is_half_on_the_host(ranks: RankPool, tmp_path: Path) -> None:
    """The plan's are bounds: a parameter lies across the border, and padding is stepped nowhere."""
    layout = Layout(data=2, distributed_optimizer=True, bf16=True)
    directory = make_model(tmp_path / "model", family="llama")
    hf, _ = read_checkpoint(directory)
    arch = find_architecture(hf)
    stages, widths = stage_sizes(arch, hf, arguments(layout), head="lm"), layer_widths(arch, hf)
    planned = rank_bytes(stages, widths, replace(work(layout, hf.vocab_size), offload_fraction=0.5), stage=0)
    largest, padding = max(stages[0][0].dense), 64 * len(stages[0][0].dense) + 512
    for _, (device, host), _ in ranks.run(2, bytes_of, layout, directory):
        assert planned.optimizer - 12 * (largest + padding) <= device <= planned.optimizer
        assert planned.host_optimizer - 16 * (largest + padding) <= host <= planned.host_optimizer
