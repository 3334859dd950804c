"""Checkpoints between Hugging Face and Megatron-Core: bit for bit, loadable by Megatron-Core itself, resumable."""

import json
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from megarlhf.cli.run import check_weights
from megarlhf.config.layouts import LayoutArguments
from megarlhf.conversion import steps as conversion_steps
from megarlhf.conversion.steps import MANIFEST, ConvertOptions, Memory
from megarlhf.conversion.to_hf import megatron_to_hf
from megarlhf.conversion.to_megatron import hf_to_megatron
from megarlhf.engine.checkpoint import load_engine, save_engine
from megarlhf.engine.export import export_hf
from megarlhf.trainers.parity_cases import (
    parity_case,
)
from tests.distributed.cases import make_rows
from tests.distributed.layouts import LAYOUTS, MOE_LAYOUTS, SINGLE, Layout, build, world
from tests.distributed.pool import RankPool
from tests.tiny_models import VOCAB_SIZE, make_model, store_head

FAMILIES = (
    *("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3"),
    *("mixtral", "qwen2-moe", "qwen3-moe", "deepseek-v2", "deepseek-v3"),
)
MOE_FAMILIES = ("mixtral", "qwen2-moe", "qwen3-moe", "deepseek-v2", "deepseek-v3")
SIZES: tuple[dict[str, int], ...] = (
    {},
    {"tensor": 2},
    {"pipeline": 2},
    {"pipeline": 4},
    {"tensor": 2, "pipeline": 2},
    {"tensor": 2, "pipeline": 4},
)
MOE_SIZES: tuple[dict[str, int], ...] = (
    {"expert": 4},
    {"tensor": 2, "expert": 2},
    {"pipeline": 2, "expert": 2},
    {"tensor": 2, "pipeline": 2, "expert": 2},
)
PLAIN = ConvertOptions(threads=2)
VERIFIED = ConvertOptions(threads=2, verify=True)


def to_megatron(load: Path, save: Path, options: ConvertOptions = PLAIN, **sizes: Any) -> Path:
    hf_to_megatron(load, save, **({"tensor": 1, "pipeline": 1, "expert": 1, "head": None} | sizes), options=options)
    return save


def to_hf(load: Path | str, save: Path, options: ConvertOptions = PLAIN, **others: Any) -> Path:
    arguments = {"hf_model": None, "role": "actor", "max_shard_bytes": 10**9} | others
    megatron_to_hf(str(load), save, **arguments, options=options)
    return save


def tensors(directory: Path) -> dict[str, Tensor]:
    return {name: t for file in sorted(directory.glob("*.safetensors")) for name, t in load_file(file).items()}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape and torch.equal(found[name], tensor), name


def make_reward_model(directory: Path, family: str) -> Path:
    """A sequence classifier with one label, drawn at random."""
    make_model(directory / "lm", family=family)
    torch.manual_seed(3)
    config = AutoConfig.from_pretrained(directory / "lm", num_labels=1)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(directory / "reward")
    return directory / "reward"


def layouts(families: tuple[str, ...]) -> list[Any]:
    """Every family in every layout; the default run has one layout of each, and all of the first of either kind."""
    found = []
    for family in families:
        all_sizes = SIZES + MOE_SIZES if family in MOE_FAMILIES else SIZES
        usual = MOE_SIZES[-1] if family in MOE_FAMILIES else {"tensor": 2, "pipeline": 2}
        for sizes in all_sizes:
            fast = sizes == usual or family in ("llama", "qwen3-moe")
            name = "-".join((family, *(f"{kind}{size}" for kind, size in sizes.items())))
            found.append(pytest.param(family, sizes, id=name, marks=() if fast else pytest.mark.slow))
    return found


@pytest.mark.parametrize(("family", "sizes"), layouts(FAMILIES))
def test_round_trip_is_bit_exact(tmp_path: Path, family: str, sizes: dict[str, int]) -> None:
    source = make_model(tmp_path / "model", family=family, tied=family == "qwen2")
    megatron = to_megatron(source, tmp_path / "megatron", VERIFIED, **sizes)
    result = to_hf(megatron, tmp_path / "hf", VERIFIED, max_shard_bytes=200_000)
    assert_equal(tensors(result), tensors(source))
    index = json.loads((result / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == tensors(source).keys()
    assert max(f.stat().st_size for f in result.glob("*.safetensors")) < 220_000
    assert json.loads((result / "config.json").read_text()) == json.loads((source / "config.json").read_text())
    _, loading = AutoModelForCausalLM.from_pretrained(result, output_loading_info=True)
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))


LLAMA3 = {"rope_type": "llama3", "rope_theta": 3e5, "factor": 16.0, "low_freq_factor": 2.0}
LLAMA3 |= {"high_freq_factor": 5.0, "original_max_position_embeddings": 4096}
YARN = {"rope_type": "yarn", "rope_theta": 3e5, "factor": 4.0, "original_max_position_embeddings": 64}
COMPUTED_ELSEWHERE: list[tuple[str, dict[str, object]]] = [
    ("llama", {"rope_parameters": LLAMA3}),
    ("llama", {"rope_parameters": YARN}),
    ("qwen2", {"hidden_act": "gelu"}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 1}),
    ("mistral", {"sliding_window": 32}),
    ("mixtral", {"router_jitter_noise": 0.1}),
    ("gemma2", {"use_bidirectional_attention": True, "hidden_activation": "relu"}),
    ("gemma3", {"attn_logit_softcapping": 30.0}),
    ("deepseek-v2", {"topk_method": "group_limited_greedy", "n_group": 2, "topk_group": 1}),
    ("deepseek-v3", {"rms_norm_eps": 1e-5, "norm_topk_prob": False, "topk_group": 3}),
    ("deepseek-v3", {"rope_parameters": YARN | {"truncate": False, "mscale": 0.7}}),
]


@pytest.mark.parametrize(("family", "options"), COMPUTED_ELSEWHERE)
def test_what_only_training_cannot_do_is_converted(tmp_path: Path, family: str, options: dict[str, object]) -> None:
    """Weights lie alike, however the model computes with them."""
    source = make_model(tmp_path / "model", family=family, **options)
    with pytest.raises(ValueError, match="^pretrain=.*; config.json: architecture "):
        check_weights([("pretrain", str(source), LayoutArguments(), "lm")], transformer_impl="local")
    result = to_hf(to_megatron(source, tmp_path / "megatron", VERIFIED, tensor=2), tmp_path / "hf", VERIFIED)
    assert_equal(tensors(result), tensors(source))
    assert json.loads((result / "config.json").read_text()) == json.loads((source / "config.json").read_text())


def test_positions_cut_no_weight(tmp_path: Path) -> None:
    """Not even where RoPE could not be built."""
    source = make_model(tmp_path / "model")
    config = json.loads((source / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": "3000"}
    (source / "config.json").write_text(json.dumps(config))
    result = to_hf(to_megatron(source, tmp_path / "megatron"), tmp_path / "hf", VERIFIED)
    assert_equal(tensors(result), tensors(source))


@pytest.mark.parametrize("head", ["equal", "other"])
@pytest.mark.parametrize("sizes", [{}, {"tensor": 2, "pipeline": 2}])
def test_a_tied_configuration_with_a_head_of_its_own(tmp_path: Path, head: str, sizes: dict[str, int]) -> None:
    """Weights decide, there and back; an equal head is the embedding, which is stored once."""
    source = store_head(make_model(tmp_path / "model", tied=True), equal=head == "equal")
    megatron = to_megatron(source, tmp_path / "megatron", VERIFIED, **sizes)
    result = to_hf(megatron, tmp_path / "hf", VERIFIED)
    expected = {name: t for name, t in tensors(source).items() if head == "other" or name != "lm_head.weight"}
    assert_equal(tensors(result), expected)
    for directory in (megatron / "hf_config", result):
        assert json.loads((directory / "config.json").read_text())["tie_word_embeddings"] == (head == "equal")
    given = to_hf(megatron, tmp_path / "given", hf_model=str(source))  # whose config.json is wrong
    assert json.loads((given / "config.json").read_text())["tie_word_embeddings"] == (head == "equal")
    assert_equal(tensors(given), expected)


@pytest.mark.parametrize("family", ["qwen2", "llama", "deepseek-v3"])
def test_four_way_tensor_parallelism(tmp_path: Path, family: str) -> None:
    source = make_model(tmp_path / "model", family=family, num_key_value_heads=4)
    result = to_hf(to_megatron(source, tmp_path / "megatron", VERIFIED, tensor=4), tmp_path / "hf", VERIFIED)
    assert_equal(tensors(result), tensors(source))


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_one_key_value_head(tmp_path: Path, family: str) -> None:
    """q, k and v then lie together in Megatron's parameter, in another shape than HF's."""
    source = make_model(tmp_path / "model", family=family, num_key_value_heads=1)
    megatron = to_megatron(source, tmp_path / "megatron", VERIFIED)
    assert_equal(tensors(to_hf(megatron, tmp_path / "hf", VERIFIED)), tensors(source))
    noted = json.loads((megatron / "release" / MANIFEST).read_text())["tensors"]
    assert {k: v["shape"] for k, v in noted.items()} == {k: list(v.shape) for k, v in tensors(source).items()}


@pytest.mark.parametrize(("family", "sizes"), layouts(FAMILIES))
def test_reward_model_keeps_its_head(tmp_path: Path, family: str, sizes: dict[str, int]) -> None:
    source = make_reward_model(tmp_path, family)
    megatron = to_megatron(source, tmp_path / "megatron", **sizes)
    result = to_hf(megatron, tmp_path / "hf", VERIFIED)
    assert_equal(tensors(result), tensors(source))
    model, loading = AutoModelForSequenceClassification.from_pretrained(result, output_loading_info=True)
    assert model.num_labels == 1 and not loading["missing_keys"] and not loading["unexpected_keys"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype_is_converted_on_the_way(tmp_path: Path, dtype: torch.dtype) -> None:
    source = make_model(tmp_path / "model")
    expected = {name: tensor.to(dtype) for name, tensor in tensors(source).items()}
    there = to_megatron(source, tmp_path / "there", replace(VERIFIED, dtype=dtype))
    assert_equal(tensors(to_hf(there, tmp_path / "a")), expected)
    back = to_hf(to_megatron(source, tmp_path / "kept"), tmp_path / "b", replace(VERIFIED, dtype=dtype))
    assert_equal(tensors(back), expected)
    config = json.loads((back / "config.json").read_text())
    assert config.get("dtype", config.get("torch_dtype")) == str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype_leaves_the_router_bias_alone(tmp_path: Path, dtype: torch.dtype) -> None:
    """As the engine does, which keeps it in float32."""
    source = make_model(tmp_path / "model", family="deepseek-v3")
    expected = {
        name: tensor if name.endswith("e_score_correction_bias") else tensor.to(dtype)
        for name, tensor in tensors(source).items()
    }
    assert {tensor.dtype for tensor in expected.values()} == {dtype, torch.float32}
    there = to_megatron(source, tmp_path / "there", replace(VERIFIED, dtype=dtype))
    assert_equal(tensors(to_hf(there, tmp_path / "a", VERIFIED)), expected)
    back = to_hf(to_megatron(source, tmp_path / "kept"), tmp_path / "b", replace(VERIFIED, dtype=dtype))
    assert_equal(tensors(back), expected)


@pytest.mark.parametrize("sizes", [{}, {"tensor": 2}, {"pipeline": 2}, {"tensor": 2, "pipeline": 4}])
def test_a_critic_starts_from_a_language_model(tmp_path: Path, ranks: RankPool, sizes: dict[str, int]) -> None:
    """With the head that the engine draws for the same seed."""
    source = make_model(tmp_path / "model")
    megatron = to_megatron(source, tmp_path / "critic", head="value", **sizes)
    assert json.loads((megatron / "release" / MANIFEST).read_text())["left_out"] == ["lm_head.weight"]
    result = tensors(to_hf(megatron, tmp_path / "hf", role="critic"))
    (engine,) = ranks.run(1, parameters_of, SINGLE, source, "value", None)
    assert torch.equal(result["score.weight"], torch.from_numpy(engine["output_layer.weight"]))


def parameters_of(
    rank: int, world_size: int, init_method: str, layout: Layout, model_dir: Path, head: str, checkpoint: Path | None
) -> dict[str, Any]:
    """This rank's parameters in the engine, loaded from HF, or after it from a checkpoint."""
    with world(layout, rank, init_method):
        engine = build(layout, model_dir, head=head, optimizer=False)
        if checkpoint is not None:
            load_engine(engine, checkpoint)
        return {name: p.detach().numpy().copy() for chunk in engine.chunks for name, p in chunk.named_parameters()}


def plain_megatron(
    rank: int, world_size: int, init_method: str, layout: Layout, model_dir: Path, checkpoint: Path
) -> dict[str, Any]:
    """This rank's parameters in a GPTModel of Megatron-Core's own layers, which dist_checkpointing.load filled."""
    with world(layout, rank, init_method):
        from megatron.core import dist_checkpointing
        from megatron.core.models.gpt import GPTModel
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

        engine = build(layout, model_dir, optimizer=False)
        model = GPTModel(
            engine.config,
            get_gpt_decoder_block_spec(engine.config, use_transformer_engine=False, normalization="RMSNorm"),
            vocab_size=128,
            max_sequence_length=256,
            pre_process=engine.ranks.is_first_stage,
            post_process=engine.ranks.is_last_stage,
            share_embeddings_and_output_weights=engine.hf.tie_word_embeddings,
            position_embedding_type="rope",
        )
        state = dist_checkpointing.load({"model": model.sharded_state_dict()}, str(checkpoint))
        model.load_state_dict(state["model"], strict=True)
        return {name: p.detach().numpy().copy() for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    ("family", "tied", "name", "sizes"),
    [
        ("llama", False, "TP2", {}),
        ("llama", True, "PP2", {"tensor": 2}),
        ("qwen3", False, "TP2-PP2", {"pipeline": 2}),
        ("mixtral", False, "EP2", {"tensor": 2}),
        ("qwen3-moe", False, "TP2", {"expert": 4}),
    ],
)
def test_megatron_core_loads_it_in_any_layout(
    ranks: RankPool, tmp_path: Path, family: str, tied: bool, name: str, sizes: dict[str, int]
) -> None:
    layout = MOE_LAYOUTS["EP2"] if name == "EP2" else replace(LAYOUTS[name])
    model, other = (make_model(tmp_path / f"model{s}", family=family, tied=tied, seed=s) for s in (0, 1))
    checkpoint = to_megatron(model, tmp_path / "megatron", **sizes) / "release"
    expected = ranks.run(layout.world_size, parameters_of, layout, model, "lm", None)
    plain = ranks.run(layout.world_size, plain_megatron, layout, other, checkpoint)
    ours = ranks.run(layout.world_size, parameters_of, layout, other, "lm", checkpoint)
    for rank in range(layout.world_size):
        assert plain[rank].keys() == expected[rank].keys() == ours[rank].keys()
        for key, array in expected[rank].items():
            assert (plain[rank][key] == array).all() and (ours[rank][key] == array).all(), key


def train_and_save(
    rank: int, world_size: int, init_method: str, layout: Layout, model_dir: Path, head: str, run: Path
) -> None:
    """One step, then a checkpoint as the programs write it, and the online export."""
    import torch.distributed as dist

    with world(layout, rank, init_method):
        engine = build(layout, model_dir, head=head)
        engine.train_step(make_rows(), parity_case("critic" if head == "value" else "sft").objective, denominator=50.0)
        if rank == 0:
            (run / "checkpoints" / "iter_0000010").mkdir(parents=True)
            (run / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("10")
            (run / "config.yaml").write_text(f"model:\n  pretrain: {model_dir}\n  critic_pretrain: null\n")
        dist.barrier()
        save_engine(engine, run / "checkpoints" / "iter_0000010" / ("critic" if head == "value" else "actor"))
        export_hf(engine, run / "hf")


@pytest.mark.parametrize(
    ("family", "head", "name"),
    [
        ("llama", "lm", "TP2"),
        ("llama", "value", "TP2"),
        ("qwen2", "lm", "PP2"),
        ("qwen3", "lm", "DP2-distopt"),
        ("llama", "lm", "PP2-VPP2"),
        ("qwen3-moe", "lm", "EP2"),
    ],
)
def test_a_run_checkpoint_gives_what_the_online_export_gives(
    ranks: RankPool, tmp_path: Path, family: str, head: str, name: str
) -> None:
    layout = MOE_LAYOUTS[name] if family in MOE_FAMILIES else LAYOUTS[name]
    source = make_model(tmp_path / "model", family=family, tied=family == "qwen2")
    run = tmp_path / "run"
    ranks.run(layout.world_size, train_and_save, layout, source, head, run)
    role = "critic" if head == "value" else "actor"
    exported = tensors(run / "hf")
    assert any(not torch.equal(exported[key], tensor) for key, tensor in tensors(source).items() if key in exported)
    assert_equal(tensors(to_hf(run, tmp_path / "a", VERIFIED, role=role)), exported)
    step = run / "checkpoints" / "iter_0000010" / role
    assert_equal(tensors(to_hf(step, tmp_path / "b", hf_model=str(source))), exported)
    assert_equal(tensors(to_hf(f"{run}@10", tmp_path / "c", role=role)), exported)
    config, expected = (json.loads((d / "config.json").read_text()) for d in (tmp_path / "a", run / "hf"))
    assert config["architectures"] == expected["architectures"]


def in_bf16(directory: Path) -> Path:
    """The same model stored in bf16."""
    AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).save_pretrained(directory)
    return directory


@pytest.mark.parametrize("family", ["qwen2", "deepseek-v3"])
def test_a_run_trained_in_fp32_from_bf16(
    ranks: RankPool, tmp_path: Path, capsys: pytest.CaptureFixture[str], family: str
) -> None:
    """Both ways of export give the source's dtype, with the same bytes."""
    source = in_bf16(make_model(tmp_path / "model", family=family))
    run = tmp_path / "run"
    ranks.run(1, train_and_save, SINGLE, source, "lm", run)
    exported = tensors(run / "hf")
    assert torch.bfloat16 in {tensor.dtype for tensor in exported.values()}
    assert_equal(tensors(to_hf(run, tmp_path / "a", VERIFIED)), exported)
    if family == "qwen2":
        files = [directory / "model.safetensors" for directory in (tmp_path / "a", run / "hf")]
        assert files[0].read_bytes() == files[1].read_bytes()
    whole = tensors(to_hf(run, tmp_path / "b", replace(VERIFIED, dtype=torch.float32)))
    assert {tensor.dtype for tensor in whole.values()} == {torch.float32}
    capsys.readouterr()
    moved = source.rename(tmp_path / "moved")
    assert_equal(tensors(to_hf(run, tmp_path / "c", hf_model=str(moved))), whole)
    said = capsys.readouterr().out
    assert said.startswith(f"dtype: kept as stored, since the run's export dtype cannot be read: pretrain={source}")
    assert said.count("\n") == 1


def rename_keys(checkpoint: Path, change: Callable[[str], str]) -> None:
    """Write the metadata anew with other keys."""
    path = checkpoint / "release" / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    metadata.state_dict_metadata = {change(key): value for key, value in metadata.state_dict_metadata.items()}
    metadata.storage_data = {replace(k, fqn=change(k.fqn)): value for k, value in metadata.storage_data.items()}
    path.write_bytes(pickle.dumps(metadata))


def test_layer_norms_under_the_names_of_either_layer_implementation(tmp_path: Path) -> None:
    source = make_model(tmp_path / "model")
    megatron = to_megatron(source, tmp_path / "megatron")
    renamed = {
        "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
        "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
    }
    rename_keys(megatron, lambda key: key.replace(*next(((a, b) for a, b in renamed.items() if a in key), ("", ""))))
    assert b"input_layernorm.weight" in (megatron / "release" / ".metadata").read_bytes()
    assert_equal(tensors(to_hf(megatron, tmp_path / "hf")), tensors(source))


def save_numbered(rank: int, world_size: int, init_method: str, model_dir: Path, target: Path) -> None:
    """A checkpoint in which every layer has keys of its own, as Megatron-LM writes it for uneven models."""
    with world(SINGLE, rank, init_method):
        from megatron.core import dist_checkpointing

        engine = build(SINGLE, model_dir, optimizer=False)
        target.mkdir()
        state = engine.chunks[0].sharded_state_dict(metadata={"non_homogeneous_layers": True})
        dist_checkpointing.save(state, str(target))


def test_numbered_layers_are_read_as_well(ranks: RankPool, tmp_path: Path) -> None:
    source = make_model(tmp_path / "model")
    ranks.run(1, save_numbered, source, tmp_path / "numbered")
    assert b"decoder.layers.3.mlp.linear_fc2.weight" in (tmp_path / "numbered" / ".metadata").read_bytes()
    assert_equal(tensors(to_hf(tmp_path / "numbered", tmp_path / "hf", hf_model=str(source))), tensors(source))


KILLED = """
import os, signal, sys
from tests.conversion import test_convert as t
t.conversion_steps._BUNDLE_BYTES = 1
calls = []
def progress(phase, num_bytes, total):
    calls.append(num_bytes)
    if len(calls) == 6:
        os.kill(os.getpid(), signal.SIGKILL)
options = t.ConvertOptions(threads=2, progress=progress)
direction, load, save = sys.argv[1:]
{"there": t.to_megatron, "back": t.to_hf}[direction](t.Path(load), t.Path(save), options)
"""


def count_steps(convert: Callable[..., Path], load: Path, target: Path) -> int:
    """Convert; how many steps it took."""
    counted: list[bool] = []
    options = replace(VERIFIED, progress=lambda phase, num_bytes, total: counted.append(phase == "convert"))
    convert(load, target, options)
    return sum(counted)


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["there", "back"])
def test_a_killed_conversion_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, direction: str) -> None:
    source = make_model(tmp_path / "model")
    load = source if direction == "there" else to_megatron(source, tmp_path / "megatron")
    save = tmp_path / "target"
    command = [sys.executable, "-c", KILLED, direction, str(load), str(save)]
    assert subprocess.run(command, cwd=Path(__file__).parents[2]).returncode == -signal.SIGKILL
    assert not save.exists()
    noted = len((tmp_path / "target.partial" / "progress.jsonl").read_text().splitlines()) - 1
    assert noted >= 5
    monkeypatch.setattr(conversion_steps, "_BUNDLE_BYTES", 1)
    convert = to_megatron if direction == "there" else to_hf
    steps = [count_steps(convert, load, target) for target in (save, tmp_path / "at-once")]
    assert steps[0] == steps[1] - noted, "the steps that were done are not done again"
    assert not (tmp_path / "target.partial").exists() and not (save / "progress.jsonl").exists()
    assert_equal(tensors(save if direction == "back" else to_hf(save, tmp_path / "hf")), tensors(source))


def test_a_changed_source_starts_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was done from other weights is thrown away."""
    monkeypatch.setattr(conversion_steps, "_BUNDLE_BYTES", 1)

    def stop(phase: str, num_bytes: int, total: int) -> None:
        if num_bytes:
            raise KeyboardInterrupt

    first, second = make_model(tmp_path / "model"), make_model(tmp_path / "other", seed=1)
    with pytest.raises(KeyboardInterrupt):
        to_megatron(first, tmp_path / "megatron", replace(PLAIN, progress=stop))
    assert (tmp_path / "megatron.partial").exists()
    (second / "model.safetensors").rename(first / "model.safetensors")
    expected = tensors(first)
    assert_equal(tensors(to_hf(to_megatron(first, tmp_path / "megatron"), tmp_path / "hf")), expected)


def test_verify_finds_a_changed_byte(tmp_path: Path) -> None:
    source = make_model(tmp_path / "model")

    def damage(phase: str, num_bytes: int, total: int) -> None:
        if phase == "verify" and num_bytes == 0:
            (file,) = (tmp_path / "megatron.partial" / "release").glob("__0_*.distcp")
            data = bytearray(file.read_bytes())
            data[len(data) // 2] ^= 1
            file.write_bytes(data)

    with pytest.raises(ValueError, match="read back, these differ"):
        to_megatron(source, tmp_path / "megatron", replace(VERIFIED, progress=damage))
    assert not list(tmp_path.glob("megatron*")), "what is wrong is not gone on with"


def test_metadata_runs_no_code(tmp_path: Path) -> None:
    megatron = to_megatron(make_model(tmp_path / "model"), tmp_path / "megatron")

    class Attack:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "touched",)

    (megatron / "release" / ".metadata").write_bytes(pickle.dumps(Attack()))
    with pytest.raises(ValueError, match="cannot be read: it names"):
        to_hf(megatron, tmp_path / "hf")
    assert not (tmp_path / "touched").exists()


def test_padding_of_the_vocabulary_stays_out(tmp_path: Path) -> None:
    source = make_model(tmp_path / "model")
    megatron = to_megatron(source, tmp_path / "megatron")
    metadata = pickle.loads((megatron / "release" / ".metadata").read_bytes())
    assert metadata.state_dict_metadata["embedding.word_embeddings.weight"].size == (128, 64)
    assert tensors(to_hf(megatron, tmp_path / "hf"))["model.embed_tokens.weight"].shape == (VOCAB_SIZE, 64)


def test_memory_of_all_threads_together() -> None:
    """At most the largest piece and 384 MiB, or one piece alone; all of it is given back."""
    mib = 2**20
    memory = Memory(1000 * mib)
    held, most, guard = 0, 0, threading.Lock()

    def work(size: int) -> None:
        nonlocal held, most
        for _ in range(5):
            with memory.lend(size * mib // 2, besides=size * mib // 2) as buffer:
                assert len(buffer) == size * mib // 2
                with guard:
                    held += size
                    most = max(most, held)
                with guard:
                    held -= size

    threads = [threading.Thread(target=work, args=(size,)) for size in (1000, 800, 600, 500, 400, 300, 2000)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive()
    assert held == 0 and most <= 2000
    assert sum(map(len, memory._spare)) <= 1384 * mib


def test_memory_is_shared_up_to_its_limit() -> None:
    memory = Memory(100)
    memory._limit = 200
    order: list[str] = []

    def ask(name: str, size: int) -> threading.Thread:
        def work() -> None:
            with memory.lend(size):
                order.append(name)

        thread = threading.Thread(target=work)
        thread.start()
        return thread

    with memory.lend(100), memory.lend(50, besides=50):
        waiting = ask("large", 150)
        while not memory._turn.locked():
            continue
        behind = ask("small", 100)
        assert order == [], "nothing is left"
    for thread in (waiting, behind):
        thread.join(timeout=60)
    assert order == ["large", "small"], "the small one does not overtake"


def test_memory_is_used_again() -> None:
    """By what is nearly as large; where room lacks, spare buffers go."""
    memory = Memory(100)
    memory._limit = 200
    with memory.lend(100) as first:
        place = first.data_ptr()
    with memory.lend(60) as second:
        assert second.data_ptr() == place and len(second) == 60
    with memory.lend(40), memory.lend(40):
        assert list(map(len, memory._spare)) == [100], "too large for 40"
        with memory.lend(50, besides=70):
            assert memory._spare == []


def test_memory_is_given_back_after_an_error() -> None:
    memory = Memory(100)
    for _ in range(3):
        with pytest.raises(KeyError), memory.lend(2**30):
            raise KeyError
