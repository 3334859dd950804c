"""Options passed through to vLLM and Megatron-Core: read from the sources, held against what is imported."""

import dataclasses
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from megarlhf.config import installed_fields as installed
from megarlhf.config.arguments import PPOConfig
from megarlhf.config.command_line import from_dict, options_of, parse, to_dict, to_yaml
from megarlhf.config.installed_fields import installed_fields, shown
from megarlhf.config.passed import PREFIXES, read
from megarlhf.config.refused_options import _TABLES, refusal
from megarlhf.config.supervised_arguments import SFTConfig
from megarlhf.models import build
from megarlhf.rollout import engine

PPO = ["--pretrain", "m", "--prompt_data", "d", "--save", "s"]
SFT = ["--pretrain", "m", "--dataset", "d", "--save", "s"]


def ppo(*flags: str) -> PPOConfig:
    return parse(PPOConfig, [*PPO, *flags], "ppo")[0]


def refused(
    capsys: pytest.CaptureFixture[str], *flags: str, config: Any = PPOConfig, given: Sequence[str] = PPO
) -> str:
    with pytest.raises(SystemExit) as stop:
        parse(config, [*given, *flags], "ppo")
    assert stop.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "program", "expected"),
    [
        (["--vllm_max_num_batched_tokens", "4096"], "vllm", {"max_num_batched_tokens": 4096}),
        (["--vllm-max-num-batched-tokens=none"], "vllm", {"max_num_batched_tokens": None}),
        (["--vllm_enable_chunked_prefill"], "vllm", {"enable_chunked_prefill": True}),
        (["--no-vllm-enable-chunked-prefill"], "vllm", {"enable_chunked_prefill": False}),
        (["--vllm_cudagraph_capture_sizes", "1", "2", "4"], "vllm", {"cudagraph_capture_sizes": [1, 2, 4]}),
        (["--vllm_cudagraph_capture_sizes", "[1, 8]"], "vllm", {"cudagraph_capture_sizes": [1, 8]}),
        (["--vllm_watermark", "0.02"], "vllm", {"watermark": 0.02}),
        (["--vllm_kv_cache_dtype", "fp8_e4m3"], "vllm", {"kv_cache_dtype": "fp8_e4m3"}),
        (["--vllm_attention_backend", "FLASH_ATTN"], "vllm", {"attention_backend": "FLASH_ATTN"}),
        (
            ["--vllm_compilation_config", '{"level": 3, "splitting_ops": ["a"]}'],
            "vllm",
            {"compilation_config": {"level": 3, "splitting_ops": ["a"]}},
        ),
        (["--vllm_optimization_level", "2"], "vllm", {"optimization_level": 2}),
        (["--moe-permute-fusion"], "megatron", {"moe_permute_fusion": True}),
        (["--no-clone-scatter-output-in-embedding"], "megatron", {"clone_scatter_output_in_embedding": False}),
        (["--recompute_modules", "mlp", "core_attn"], "megatron", {"recompute_modules": ["mlp", "core_attn"]}),
        (["--attention-backend", "flash"], "megatron", {"attention_backend": "flash"}),
        (["--min_offloaded_tensor_size", "4096"], "megatron", {"min_offloaded_tensor_size": 4096}),
        (["--moe_permute_fusion", "--no-moe-permute-fusion"], "megatron", {"moe_permute_fusion": False}),
    ],
)
def test_flags_give_values_of_the_fields_types(
    flags: list[str], program: str, expected: dict[str, Any], tmp_path: Path
) -> None:
    config = ppo(*flags)
    found = to_dict(config)
    assert found[program] == expected and [type(v) for v in found[program].values()] == [
        type(v) for v in expected.values()
    ]
    assert found | {program: {}} == to_dict(ppo())
    assert from_dict(PPOConfig, found) == config == from_dict(PPOConfig, yaml.safe_load(to_yaml(config)))
    (tmp_path / "c.yaml").write_text(to_yaml(config))
    assert parse(PPOConfig, ["--config", str(tmp_path / "c.yaml")], "ppo")[0] == config


def test_flags_win_over_yaml_name_by_name(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(
        "vllm: {max_num_batched_tokens: 1, block_size: 16}\nmegatron: {wgrad-deferral-limit: 3}"
    )
    config = ppo("--config", str(tmp_path / "c.yaml"), "--vllm_max_num_batched_tokens", "2")
    assert config.passed.vllm == {"max_num_batched_tokens": 2, "block_size": 16}
    assert config.passed.megatron == {"wgrad_deferral_limit": 3}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--vllm_max_num_batched_token", "1"], "did you mean --vllm_max_num_batched_tokens?"),
        (["--moe_permut_fusion"], "did you mean --moe_permute_fusion?"),
        (["--train_iter", "1"], "did you mean --train_iters?"),
        (["--vllm_max_num_batched_tokens", "many"], "--vllm_max_num_batched_tokens takes int | None, not 'many'"),
        (["--vllm_kv_cache_dtype", "int3"], "takes Literal['auto',"),
        (["--attention-backend", "best"], "--attention-backend takes Literal["),
        (["--moe_permute_fusion", "7"], "--moe_permute_fusion takes bool, not '7'"),
        (["--recompute_modules"], "--recompute_modules takes Optional[List[str]], not no value"),
        (["--vllm_compilation_config", "fast"], "takes dict, not 'fast'"),
        (["--vllm_seed", "1"], "--vllm_seed cannot be passed on; set seed"),
        (["--vllm_logprobs_mode", "raw_logits"], "cannot be passed on; the trainer compares"),
        (["--vllm-max-num-seqs", "3"], "cannot be passed on; set max_num_seqs"),
        (["--vllm_pipeline_parallel_size", "2"], "cannot be passed on; new weights reach an engine"),
        (["--hidden_dropout", "0.1"], "cannot be passed on; log-probs must be a function"),
        (["--no-masked-softmax-fusion"], "cannot be passed on; attention here has no softmax"),
        (["--cuda_graph_impl", "local"], "cannot be passed on; sleeping roles"),
        (["--lr", "1"], "cannot be passed on; set actor_learning_rate"),
        (["--no-vllm-block-size"], "unknown option --no-vllm-block-size"),
        (["--vllm", "{}"], "unknown option --vllm;"),
    ],
)
def test_what_is_refused(capsys: pytest.CaptureFixture[str], flags: list[str], words: str) -> None:
    assert words in refused(capsys, *flags)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("megatron: {weight_decay: 1.0}", "weight_decay of megatron is an option of this package: set weight_decay"),
        ("vllm: {gpu_memory_utilization: 0.1}", "set vllm_gpu_memory_utilization instead"),
        ("vllm: {seed: 1}", "vllm: seed=1 cannot be passed on; set seed"),
        ("vllm: {block_siz: 1}", "unknown key block_siz of vllm; did you mean block_size?"),
        ("vllm: 3", "vllm=3 must hold names and values"),
        ("megatron: {wgrad_deferral_limit: x}", "megatron: wgrad_deferral_limit='x' takes int, not 'x'"),
    ],
)
def test_yaml_that_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    assert words in refused(capsys, "--config", str(tmp_path / "c.yaml"))


def test_supervised_training_has_no_vllm(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse(SFTConfig, [*SFT, "--moe_permute_fusion"], "sft")[0].passed.megatron == {"moe_permute_fusion": True}
    assert "unknown option --vllm_block_size" in refused(capsys, "--vllm_block_size", "1", config=SFTConfig, given=SFT)


@pytest.mark.parametrize(
    ("topic", "texts"),
    [
        ("vllm", ["--vllm-max-num-batched-tokens  int | None  (EngineArgs)", "not passed on: set seed"]),
        (
            "megatron",
            ["--moe-permute-fusion  bool  (TransformerConfig)", "--log-num-zeros-in-grad  bool  (OptimizerConfig)"],
        ),
    ],
)
def test_help(capsys: pytest.CaptureFixture[str], topic: str, texts: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(PPOConfig, ["--help", topic], "ppo")
    assert stop.value.code == 0
    said = capsys.readouterr().out
    assert all(text in said for text in texts)
    assert all(f"--{PREFIXES[topic]}{name}".replace("_", "-") in said for name in installed_fields(topic))


def test_every_refusal_is_of_a_field_that_is_there() -> None:
    from fnmatch import fnmatchcase

    for program, table in _TABLES.items():
        for pattern in " ".join(table.values()).split():
            assert any(fnmatchcase(name, pattern) for name in installed_fields(program)), pattern


def test_megatrons_fields_are_those_of_the_imported_classes() -> None:
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.transformer.transformer_config import TransformerConfig

    import megarlhf.parallel  # noqa: F401  (so that megatron.core can be imported)

    expected = {f.name for c in (OptimizerConfig, TransformerConfig) for f in dataclasses.fields(c)}
    assert set(installed_fields("megatron")) == {name for name in expected if not name.startswith("_")}


def test_types_are_resolved_through_imports() -> None:
    vllm, megatron = installed_fields("vllm"), installed_fields("megatron")
    assert "'processed_logprobs'" in shown(vllm["logprobs_mode"].kind)  # a Literal of another module
    assert vllm["seed"].doc.startswith("Random seed")  # the text stands at ModelConfig.seed
    assert shown(megatron["attention_backend"].kind).startswith("Literal['flash', 'fused'")  # an enumeration's members
    assert shown(megatron["params_dtype"].kind) == "object" and shown(megatron["timers"].kind) == "Optional[object]"
    with pytest.raises(ValueError, match="takes dict"):
        read("vllm", "kernel_config", ["3"])


def test_a_package_that_is_not_installed_has_no_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installed.importlib.util, "find_spec", lambda name: None)
    for function in (installed._names, installed_fields):
        function.cache_clear()
    try:
        assert installed_fields("vllm") == {}
    finally:
        monkeypatch.undo()
        for function in (installed._names, installed_fields):
            function.cache_clear()


def keywords(function: Any, callee: str) -> set[str]:
    """Names of the keyword arguments that a function's source gives to another."""
    import ast
    import textwrap

    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and callee in ast.unparse(node.func)]
    return {word.arg for call in calls for word in call.keywords if word.arg}


def test_what_this_package_sets_itself_is_refused_or_its_own_option() -> None:
    from megarlhf.engine import optimizer
    from megarlhf.models.registry import ARCHITECTURES

    tables = {name for arch in ARCHITECTURES.values() for name in (*arch.config_fields, *arch.config_constants)}
    ours = {
        "vllm": keywords(engine.RolloutEngine.__init__, "LLM"),
        "megatron": keywords(build.transformer_config, "TransformerConfig")
        | keywords(optimizer.build_optimizer, "OptimizerConfig")
        | set(build._FUSIONS)
        | tables,
    }
    assert len(ours["vllm"]) > 15 and len(ours["megatron"]) > 50
    for program, names in ours.items():
        for name in names & installed_fields(program).keys():
            own = PREFIXES[program] + name in options_of(PPOConfig)
            assert own or refusal(program, name) is not None, (program, name)
