"""Every supervised program, its ranks in this test's processes: a run that goes on is the run that never stopped."""

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from examples.demo.make_assets import make_tokenizer
from megarlhf.cli import run_supervised
from megarlhf.config.checks import check_supervised
from megarlhf.config.command_line import from_dict
from megarlhf.config.kd_arguments import KDConfig
from megarlhf.config.reward_model_arguments import PRMConfig, RMConfig
from megarlhf.config.supervised_arguments import DPOConfig, KTOConfig, SFTConfig, SupervisedConfig
from megarlhf.data.sampling import PromptSampler
from megarlhf.trainers import supervised
from tests.distributed.pool import RankPool
from tests.tiny_models import make_model

UNITS, BATCH, TOTAL, STOP = 11, 4, 5, 2  # the first epoch ends inside step 3
Options = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A program, its own options, and another layout to go on in."""

    config: type[SupervisedConfig]
    own: Options
    layout: Options
    other: Options


ONE: Options = {}
TP2 = {"tensor_model_parallel_size": 2, "num_gpus_per_node": 2}
PP2 = {"pipeline_model_parallel_size": 2, "num_gpus_per_node": 2}
CP2 = {"context_parallel_size": 2, "num_gpus_per_node": 2}
DP2 = {"num_gpus_per_node": 2}
LORA = {"lora_rank": 3, "lora_alpha": 6}
FOUR_BIT = LORA | {"load_in_4bit": True, "pretrain": "{}/wide"}
SFT = {"dataset": "{}/answers.jsonl", "output_key": "output"}
PAIRS = {"dataset": "{}/pairs.jsonl", "prompt_key": "prompt"}
PRM = {"dataset": "{}/steps.jsonl", "placeholder_token": "z", "reward_tokens": ("y", "n")}
KTO = {"dataset": "{}/answers.jsonl", "output_key": "output"}
KD = SFT | {"teacher_model": "{}/teacher"}
CASES = {
    "sft": Case(config=SFTConfig, own=SFT, layout=DP2, other=TP2),
    "dpo with LoRA": Case(config=DPOConfig, own=PAIRS | LORA, layout=PP2, other=ONE),
}
SLOW = {
    "rm": Case(config=RMConfig, own=PAIRS, layout=ONE, other=TP2),
    "dpo": Case(config=DPOConfig, own=PAIRS, layout=ONE, other=PP2),
    "kto": Case(config=KTOConfig, own=KTO, layout=ONE, other=DP2),
    "prm": Case(config=PRMConfig, own=PRM, layout=ONE, other=PP2),
    "kd": Case(config=KDConfig, own=KD, layout=ONE, other=PP2),
    "rm with LoRA": Case(config=RMConfig, own=PAIRS | LORA, layout=ONE, other=PP2),
    "sft with LoRA": Case(config=SFTConfig, own=SFT | LORA, layout=ONE, other=CP2),
    "prm with LoRA": Case(config=PRMConfig, own=PRM | LORA, layout=ONE, other=TP2),
    "kto with LoRA": Case(config=KTOConfig, own=KTO | LORA, layout=ONE, other=PP2),
    "kd with LoRA": Case(config=KDConfig, own=KD | LORA, layout=ONE, other=TP2),
    "sft with dropout": Case(config=SFTConfig, own=SFT | LORA | {"lora_dropout": 0.3}, layout=TP2, other=TP2),
    "dpo with log-probs computed once": Case(
        config=DPOConfig, own=PAIRS | {"precompute_ref_log_probs": True}, layout=ONE, other=TP2
    ),
    "dpo with another reference": Case(
        config=DPOConfig, own=PAIRS | {"ref_pretrain": "{}/reference", "ipo": True, "beta": 1.0}, layout=ONE, other=CP2
    ),
    "kd with likeliest tokens": Case(config=KDConfig, own=KD | {"teacher_top_k": 4}, layout=ONE, other=DP2),
    "rm in 4 bits": Case(config=RMConfig, own=PAIRS | FOUR_BIT, layout=ONE, other=TP2),
    "prm in 4 bits": Case(config=PRMConfig, own=PRM | FOUR_BIT, layout=ONE, other=DP2),
    "dpo in 4 bits": Case(config=DPOConfig, own=PAIRS | FOUR_BIT, layout=ONE, other=PP2),
    "kto in 4 bits": Case(config=KTOConfig, own=KTO | FOUR_BIT, layout=ONE, other=CP2),
    "kd in 4 bits": Case(config=KDConfig, own=KD | FOUR_BIT, layout=ONE, other=TP2),
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models with a tokenizer, and data of every kind, in one directory."""
    root, tokenizer = tmp_path_factory.mktemp("inputs"), make_tokenizer()
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    models: dict[str, dict[str, int]] = {
        **{"model": {}, "reference": {}, "teacher": {"num_hidden_layers": 4, "hidden_size": 64}},
        "wide": {"hidden_size": 128, "intermediate_size": 128},  # blocks of 4 bits on each of two ranks
    }
    for name, more in models.items():
        make_model(root / name, seed=len(name), **(sizes | more))
        tokenizer.save_pretrained(root / name)
    answers = [{"input": f"a{i}=", "output": "bcd"[i % 3] * (1 + i % 4), "label": i % 2} for i in range(UNITS + 3)]
    pairs = [{"prompt": f"p{i}=", "chosen": "bcd"[i % 3] * (1 + i % 4), "rejected": f"w{i}"} for i in range(UNITS + 3)]
    steps = [{"input": f"{i}z={i}z", "label": ["y", "yn"[i % 2]]} for i in range(UNITS + 3)]
    for name, rows in (("answers", answers), ("pairs", pairs), ("steps", steps)):
        for file, part in ((f"{name}.jsonl", rows[:UNITS]), (f"eval_{name}.jsonl", rows[UNITS:])):
            (root / file).write_text("".join(json.dumps(row) + "\n" for row in part))
    return root


def run_rank(
    rank: int, world_size: int, init_method: str, config: SupervisedConfig, inputs: Path, stop: bool
) -> list[list[int]]:
    """One rank of the program; SIGTERM reaches it in step STOP where it is to stop. Returns the units of each step."""
    drawn: list[list[int]] = []

    class Noting(PromptSampler):
        def batch(self, step: int) -> list[int]:
            drawn.append(super().batch(step))
            if stop and step + 1 == STOP:
                os.kill(os.getpid(), signal.SIGTERM)
            return drawn[-1]

    with pytest.MonkeyPatch.context() as patch, signals_as_before():
        patch.setattr(supervised, "PromptSampler", Noting)
        patch.setattr(run_supervised, "write_report", lambda directory, title: ("page", "picture"))  # a second each
        assert run_supervised._run_rank(config, inputs, rank, world_size, init_method) == 0
    return drawn


@contextmanager
def signals_as_before() -> Iterator[None]:
    """The process of a rank lives on: it is to end at SIGTERM again."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass(frozen=True)
class Programs:
    """Runs of a case."""

    ranks: RankPool
    inputs: Path
    root: Path
    case: Case

    def run(self, save: str, layout: Options, *, load: str | None = None, stop: bool = False) -> list[list[int]]:
        """Start as the programs do, but for the processes; returns the units of each step."""
        place = str(self.inputs)
        own = {k: v.replace("{}", place) if isinstance(v, str) else v for k, v in self.case.own.items()}
        data = Path(own["dataset"])
        options = {
            **{"pretrain": str(self.inputs / "model"), "max_len": 16, "global_batch_size": BATCH, "train_iters": TOTAL},
            **{"eval_dataset": str(data.with_name(f"eval_{data.name}")), "learning_rate": 1e-3, "adam_eps": 1e-4},
            **{"lr_warmup_ratio": 0.4, "weight_decay": 0.1, "enable_ema": True, "ema_decay": 0.7, "seed": 9},
            **{"save": str(self.root / save), "load": load and str(self.root / load)},
        }
        config = from_dict(self.case.config, options | own | layout)
        assert check_supervised(config) == []
        config = run_supervised.resolved(config)
        with TemporaryDirectory() as directory:
            run_supervised._prepare(config, Path(directory))
            world = config.ranks.num_gpus_per_node
            found = self.ranks.run(world, run_rank, config, Path(directory), stop)
        assert all(drawn == found[0] for drawn in found)
        return found[0]

    def rows(self, save: str) -> dict[int, dict[str, float]]:
        """Logged numbers of each step, without those of the clock and of memory."""
        rows = map(json.loads, (self.root / save / "metrics.jsonl").read_text().splitlines())
        kept = (self.case.config.program, "data")
        return {row["step"]: {key: value for key, value in row.items() if key.startswith(kept)} for row in rows}

    def weights(self, save: str) -> dict[str, torch.Tensor]:
        """What is exported: the weights or the adapters, and their averages."""
        files = (self.root / save).glob("hf*/*.safetensors")
        return {f"{path.parent.name} {name}": t for path in files for name, t in load_file(path).items()}


@pytest.mark.parametrize("name", [*CASES, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_a_run_that_goes_on_is_the_run_that_never_stopped(
    ranks: RankPool, inputs: Path, tmp_path: Path, name: str
) -> None:
    """Bit for bit in the same layout, within rounding in another one."""
    case = (CASES | SLOW)[name]
    programs = Programs(ranks, inputs, tmp_path, case)
    whole = programs.run("whole", case.layout)
    assert programs.run("parts", case.layout, stop=True) == whole[:STOP]
    assert programs.run("elsewhere", case.other, load="parts") == whole[STOP:]
    assert programs.run("parts", case.layout, load="parts") == whole[STOP:]
    rows, weights = programs.rows("whole"), programs.weights("whole")
    losses = {row[f"{name.split()[0]}/loss"] for row in rows.values()}
    evaluated = [step for step, row in rows.items() if f"{name.split()[0]}/eval_loss" in row]
    assert evaluated == [3, TOTAL], "at the end of the epoch and of the run"
    assert len(losses) == TOTAL, "each step changes the model"
    if case.config is RMConfig:
        file = "config_entries.json" if "lora_rank" in case.own else "config.json"
        entries = json.loads((tmp_path / "parts" / "hf" / file).read_text())
        measured = [rows[TOTAL][f"rm/eval_reward_{moment}"] for moment in ("mean", "std")]
        assert [entries["mean"], entries["std"]] == measured
    resumed, elsewhere = programs.weights("parts"), programs.weights("elsewhere")
    assert programs.rows("parts") == rows | {STOP: programs.rows("parts")[STOP]}
    assert resumed.keys() == elsewhere.keys() == weights.keys()
    assert all(torch.equal(resumed[key], weights[key]) for key in weights)
    for key, tensor in elsewhere.items():
        torch.testing.assert_close(tensor, weights[key], atol=1e-5, rtol=0)
    for step, row in programs.rows("elsewhere").items():
        assert row == pytest.approx(rows[step], rel=1e-5, abs=1e-5), step
