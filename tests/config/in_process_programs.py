"""PPO, the supervised programs and parity on small inputs, with some options changed; what each gave to whom."""

import io
import json
import os
import shutil
import sys
import types
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from examples.demo.make_assets import make_tokenizer
from megarlhf.cli import (
    programs,
    rewards,
    run_eval,
    run_generate,
    run_parity,
    run_ppo,
    run_score,
    run_select,
    run_serve,
    run_supervised,
    serve_rm,
)
from megarlhf.config.arguments import PPOConfig
from megarlhf.config.chat_arguments import ChatConfig
from megarlhf.config.check_loops import check_eval, check_generate, check_score, check_select
from megarlhf.config.checks import raise_if
from megarlhf.config.command_line import from_dict
from megarlhf.config.eval_config import EvalConfig
from megarlhf.config.kd_arguments import KDConfig
from megarlhf.config.loop_arguments import GenerateConfig, ScoreConfig, SelectConfig
from megarlhf.config.passed import PREFIXES
from megarlhf.config.reward_model_arguments import PRMConfig, RMConfig
from megarlhf.config.serve_arguments import ServeConfig
from megarlhf.config.supervised_arguments import DPOConfig, KTOConfig, ParityConfig, SFTConfig, SupervisedConfig
from megarlhf.engine.indexed_data import CorpusWriter
from megarlhf.metrics import sinks
from megarlhf.trainers import assembly, experience, tasks
from megarlhf.trainers import parity as comparison
from tests.config.in_process import Trace, patch_torch_and_megatron, watched
from tests.config.in_process_rewards import FakeRemote, FakeScorer, FakeServer
from tests.config.in_process_services import patch_ray, patch_vllm
from tests.tiny_models import make_model, make_reward_model

Options = dict[str, Any]
TEMPLATE = "{% for m in messages %}q {{ m['content'] }} a {% endfor %}"


class Programs:
    """Runs in one process, each set of options once. Text options may name a directory's files as {}/name."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._number = 0
        tokenizer = make_tokenizer()
        sizes = {"vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 64, "eos_token_id": 2}
        for seed, (name, family) in enumerate((("model", "llama"), ("other", "llama"), ("experts", "mixtral"))):
            make_model(directory / name, family=family, seed=seed, **sizes)
            tokenizer.save_pretrained(directory / name)
        for name, family in (("rm", "llama"), ("rm_experts", "mixtral")):
            make_reward_model(directory / name, family=family, seed=7, entries={"mean": 0.5, "std": 2.0}, **sizes)
            tokenizer.save_pretrained(directory / name)
        tokenizer.save_pretrained(directory / "tokenizer")
        tokenizer.chat_template = TEMPLATE
        tokenizer.save_pretrained(directory / "chat")
        for name, count in (("rows", 8), ("other_rows", 6), ("eval", 2), ("other_eval", 3)):
            rows = [
                {"input": f"{name[0]} {i}", "label": f"{i}", "question": f"ask {i}", "answer": f"{i} {i}"}
                | {"wanted": i % 2, "unwanted": 1 - i % 4 // 2}
                for i in range(count)
            ]
            (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (directory / "splits").mkdir()
        for split in ("train", "test", "other"):
            row = {"input": f"{split[:2]} split", "label": "1"}
            (directory / "splits" / f"{split}-00000-of-00001.jsonl").write_text(json.dumps(row) + "\n")
        for name, first in (("even", 4), ("odd", 5)):  # each document's tokens are one token, many times
            writer = CorpusWriter(str(directory / name), vocab_size=len(tokenizer))
            writer.add_documents(np.full(40 * 9, first, dtype=np.int32), np.full(40, 9))
            writer.close()
        chat = [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 2, "1234", strict=True)]
        (directory / "turns.jsonl").write_text(json.dumps({"input": chat}) + "\n")
        for name, count in (("pairs", 8), ("other_pairs", 6), ("pairs_eval", 2), ("other_pairs_eval", 3)):
            self._write(name, [pair(name[0], i) for i in range(count)])
        for name, count in (("steps", 8), ("other_steps", 6), ("steps_eval", 2), ("other_steps_eval", 3)):
            self._write(name, [solution(name[0], i) for i in range(count)])
        self._write("ragged_pairs", [pair("", i) | {"prompt": "r" * (i + 1)} for i in range(8)])
        self._write("ragged_steps", [solution("r" * i, i) for i in range(8)])
        ragged = [{"input": "r" * (i + 1), "label": "1", "answer": f"{i}", "wanted": i % 2} for i in range(8)]
        lines = [json.dumps(row) + "\n" for row in ragged]
        (directory / "ragged.jsonl").write_text("".join(lines))
        shutil.copytree(directory / "model", directory / "chat_model")
        tokenizer.save_pretrained(directory / "chat_model")
        (directory / "few.txt").write_text("f 0")
        (directory / "reward.py").write_text("def reward_func(queries, prompts, labels): ...\n")
        (directory / "key.pem").write_text("")
        (directory / "reward2.py").write_text("def reward_func(queries, prompts, labels): ...\n")
        self.ppo, self.sft, self.parity = cache(self._ppo), cache(self._sft), cache(self._parity)
        self.kd, self.dpo, self.kto = cache(self._kd), cache(self._dpo), cache(self._kto)
        self.rm, self.prm, self.chat = cache(self._rm), cache(self._prm), cache(self._chat)
        self.serve = cache(self._serve)
        self.generate, self.score, self.select = cache(self._generate), cache(self._score), cache(self._select)
        self.eval = cache(self._eval)
        for name, count in (("scored", 8), ("other_scored", 6)):
            places = [i // 2 if count == 8 else i for i in range(count)]
            samples = [{"input": f"{name[0]} {i}", "output": f"{i}", "reward": i / 2} for i in range(count)]
            self._write(name, [s | {"place": place} for s, place in zip(samples, places, strict=True)])
        self.ppo((("save", "{}/first_ppo"),))  # to continue from
        self.sft((("save", "{}/first_sft"),))
        self.kd((("save", "{}/first_kd"),))
        self.dpo((("save", "{}/first_dpo"),))
        self.kto((("save", "{}/first_kto"),))
        self.rm((("save", "{}/first_rm"),))
        self.prm((("save", "{}/first_prm"),))

    def _write(self, name: str, rows: Sequence[Options]) -> None:
        (self.directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def options(self, changes: "Changes") -> Options:
        """The changes with this directory's names."""
        place = str(self.directory)
        found = {k: v.replace("{}", place) if isinstance(v, str) and "{}/" in v else v for k, v in changes}
        if "data_path" in found:
            found["data_path"] = [text.replace("{}", place) for text in found["data_path"]]
        return {k: dict(v) if k in PREFIXES else v for k, v in found.items()}  # pairs, so that they may be remembered

    def _run(self, run: Callable[[pytest.MonkeyPatch, Trace], None]) -> Trace:
        trace = Trace()
        with pytest.MonkeyPatch.context() as patch, watched(trace):
            for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
                patch.delenv(name, raising=False)
            patch.setenv("WANDB_MODE", "offline")
            patch.setenv("KEY_OF_A_SERVICE", "secret")
            patch.setenv("MEGARLHF_RM_TOKEN", "secret too")
            patch_torch_and_megatron(patch, trace)
            _patch_metrics(patch, trace)
            run(patch, trace)
        return trace

    def _save(self) -> str:
        self._number += 1
        return str(self.directory / f"run{self._number}")

    def _ppo(self, changes: "Changes") -> Trace:
        base = {
            **{"pretrain": "{}/model", "prompt_data": "{}/rows.jsonl", "eval_data": "{}/eval.jsonl"},
            **{"reward_function": "{}/reward.py", "save": self._save(), "prompt_max_len": 16, "generate_max_len": 8},
            **{"train_iters": 2, "rollout_batch_size": 4, "n_samples_per_prompt": 2, "global_batch_size": 4},
        }
        config = from_dict(PPOConfig, self.options(tuple((base | dict(changes)).items())))

        def run(patch: pytest.MonkeyPatch, trace: Trace) -> None:
            patch_ray(patch, trace)
            patch_vllm(patch, trace)
            patch.setattr(rewards, "RewardScorer", lambda **options: FakeScorer(trace, **options))
            patch.setattr(rewards, "RemoteReward", lambda *arguments: FakeRemote(trace, *arguments))
            patch.setattr(run_ppo, "write_report", lambda directory, title: ("page", "picture"))
            _spy(patch, trace, run_ppo, "with_restarts")
            _spy(patch, trace, experience, "compute_advantages")
            _spy(patch, trace, assembly, "policy_objective")
            _spy(patch, trace, assembly, "value_objective")
            programs.PPO_IN_RAY.start(config)

        return self._finished(self._run(run), config.logging.save)

    def _generate(self, changes: "Changes") -> Trace:
        base = {"pretrain": "{}/model", "prompt_data": "{}/rows.jsonl", "prompt_max_len": 24, "generate_max_len": 8}
        return self._lines(GenerateConfig, check_generate, run_generate.run, base, changes)

    def _score(self, changes: "Changes") -> Trace:
        base = {"dataset": "{}/rows.jsonl", "output_key": "answer", "reward_function": "{}/reward.py"}
        return self._lines(ScoreConfig, check_score, run_score.run, base, changes)

    def _select(self, changes: "Changes") -> Trace:
        base = {"dataset": "{}/scored.jsonl", "post_processor": "csft"}
        return self._lines(SelectConfig, check_select, run_select.run, base, changes)

    def _eval(self, changes: "Changes") -> Trace:
        base = {"pretrain": "{}/model", "eval_data": "{}/rows.jsonl", "prompt_max_len": 24, "generate_max_len": 8}
        base |= {"reward_function": "{}/reward.py", "responses": f"{self._save()}.jsonl"}
        trace = self._lines(EvalConfig, check_eval, run_eval.run, base, changes, written="responses", suffix=".json")
        trace.given["metrics"] = [json.loads(path.read_text())["metrics"] for path in map(Path, trace.given["output"])]
        return trace

    def _lines(
        self, config_class: Any, check: Any, program: Any, base: Options, changes: "Changes",
        *, written: str = "output", suffix: str = ".jsonl",
    ) -> Trace:  # fmt: skip
        """A program that writes a file of lines, which the option `written` names."""
        own = base | {"output": f"{self._save()}{suffix}"} | dict(changes)
        config = from_dict(config_class, self.options(tuple(own.items())))

        def run(patch: pytest.MonkeyPatch, trace: Trace) -> None:
            patch_ray(patch, trace)
            patch_vllm(patch, trace)
            patch.setattr(rewards, "RewardScorer", lambda **options: FakeScorer(trace, **options))
            patch.setattr(rewards, "RemoteReward", lambda *arguments: FakeRemote(trace, *arguments))
            raise_if(check(config))
            program(config, dry_run=False)

        trace, paths = self._run(run), self.options(tuple((name, own[name]) for name in {"output", written}))
        path, trace.given["path"] = Path(paths[written]), [paths[written]]
        trace.given["output"] = [paths["output"]] if Path(paths["output"]).exists() else []
        if path.exists():
            trace.given["lines"] = [json.loads(line) for line in path.read_text().splitlines()]
        return trace

    def _sft(self, changes: "Changes") -> Trace:
        return self._supervised(SFTConfig, {"output_key": "label"}, changes)

    def _kd(self, changes: "Changes") -> Trace:
        return self._supervised(KDConfig, {"output_key": "label", "teacher_model": "{}/other"}, changes)

    def _dpo(self, changes: "Changes") -> Trace:
        keys = {"prompt_key": "input", "chosen_key": "answer", "rejected_key": "label"}
        return self._supervised(DPOConfig, keys, changes)

    def _kto(self, changes: "Changes") -> Trace:
        return self._supervised(KTOConfig, {"output_key": "answer", "label_key": "wanted"}, changes)

    def _rm(self, changes: "Changes") -> Trace:
        own = {"dataset": "{}/pairs.jsonl", "eval_dataset": "{}/pairs_eval.jsonl", "prompt_key": "prompt"}
        return self._supervised(RMConfig, own, changes)

    def _prm(self, changes: "Changes") -> Trace:
        own = {"dataset": "{}/steps.jsonl", "eval_dataset": "{}/steps_eval.jsonl"}
        return self._supervised(PRMConfig, own | {"placeholder_token": "z", "reward_tokens": ("y", "n")}, changes)

    def _supervised(self, config_class: type[SupervisedConfig], own: Options, changes: "Changes") -> Trace:
        base = {
            **{"pretrain": "{}/model", "dataset": "{}/rows.jsonl", "eval_dataset": "{}/eval.jsonl"},
            **{"save": self._save(), "max_len": 32, "global_batch_size": 4, "train_iters": 3},
            **own,
        }
        config = from_dict(config_class, self.options(tuple((base | dict(changes)).items())))

        program = getattr(programs, config_class.program.upper())

        def run(patch: pytest.MonkeyPatch, trace: Trace) -> None:
            def ranks(module: str, arguments: Sequence[str], **options: Any) -> int:
                trace.given["ranks"].append(options)
                for name, value in options["environment"].items():
                    patch.setenv(name, value)
                for number in range(options["world_size"]):
                    patch.setenv("WORLD_SIZE", str(options["world_size"]))
                    patch.setenv("RANK", str(number))
                    if number == options["world_size"] - 1:  # the others would do the same
                        trace.process = ("actor", number)
                        program.start(config)
                return 0

            def top_tokens(engine: Any, build: Any, data: Any, **options: Any) -> Any:
                trace.given["top tokens"].append(options)
                return data

            patch.setattr(run_supervised, "run_local_ranks", ranks)
            patch.setattr(tasks, "with_top_tokens", top_tokens)
            patch.setattr(run_supervised, "write_report", lambda directory, title: ("page", "picture"))
            trace.process = ("actor", 0)
            program.start(config)

        return self._finished(self._run(run), config.logging.save)

    def _serve(self, changes: "Changes") -> Trace:
        base = {"reward_function": "{}/reward.py", "port": 0}
        config = from_dict(ServeConfig, self.options(tuple((base | dict(changes)).items())))

        def run(patch: pytest.MonkeyPatch, trace: Trace) -> None:
            patch_ray(patch, trace)
            patch.setattr(rewards, "RewardScorer", lambda **options: FakeScorer(trace, **options))
            patch.setattr(run_serve, "RewardServer", partial(FakeServer, trace))
            serve_rm._run(config, "megarlhf serve-rm", dry_run=False)

        return self._run(run)

    def _parity(self, changes: "Changes") -> Trace:
        base = {"pretrain": "{}/model"}
        config = from_dict(ParityConfig, self.options(tuple((base | dict(changes)).items())))

        def run(patch: pytest.MonkeyPatch, trace: Trace) -> None:
            def ranks(module: str, arguments: Sequence[str], **options: Any) -> int:
                phase = os.environ["MEGARLHF_PARITY_PHASE"]
                trace.given["ranks"].append((phase, options["world_size"]))
                number = options["world_size"] - 1 if phase == "layout" else 0
                for key, value in (("WORLD_SIZE", options["world_size"]), ("RANK", number), ("LOCAL_RANK", number)):
                    patch.setenv(key, str(value))
                patch.setenv("MEGARLHF_RENDEZVOUS", "file://nowhere")
                trace.process = (phase, number)
                return programs.PARITY.start(config)

            def rows(vocab_size: int, **options: Any) -> list[Any]:
                trace.given["rows"].append(options)
                return []

            def compare(engine: Any, name: str, given: Any, directory: Path) -> dict[str, float]:
                directory.mkdir(parents=True, exist_ok=True)
                return {"training": 1e-4, "loss": 1e-6}

            scales = {"loss": 1.0, "grad norm": 1.0, "gradients": 1.0, "moved": 1.0}
            patch.setattr(run_parity, "run_local_ranks", ranks)
            patch.setattr(run_parity, "parity_rows", rows)
            patch.setattr(comparison, "write_reference", lambda *arguments: None)
            patch.setattr(comparison, "compare", compare)
            patch.setattr(comparison, "scales", lambda directory: scales)
            # Both are set for the processes that are started; those are this one.
            patch.setenv("MEGARLHF_PARITY_PHASE", "")
            patch.setattr(run_parity.os, "environ", os.environ)
            try:
                programs.PARITY.start(config)
            finally:
                os.environ.pop("MEGARLHF_PARITY", None)

        return self._run(run)

    def _chat(self, changes: "Changes") -> Trace:
        config = from_dict(ChatConfig, self.options(tuple(({"pretrain": "{}/model"} | dict(changes)).items())))

        def run(patch: pytest.MonkeyPatch, trace: Trace) -> None:
            patch_vllm(patch, trace)
            patch.setattr(sys, "stdin", io.StringIO("0 1\n"))
            programs.CHAT.start(config)

        return self._run(run)

    def _finished(self, trace: Trace, save: str) -> Trace:
        """With what is in the run directory."""
        metrics = Path(save) / "metrics.jsonl"
        lines = metrics.read_text().splitlines() if metrics.is_file() else []
        trace.given["metrics"] = [json.loads(line) for line in lines]
        trace.given["checkpoints"] = sorted(path.name for path in Path(save).glob("checkpoints/iter_*"))
        trace.given["directory"] = [save]
        return trace


def pair(letter: str, number: int) -> Options:
    """Two answers, and two others."""
    texts = {"prompt": f"{letter} {number}", "chosen": f"c {number}", "rejected": f"r {number}"}
    return texts | {"question": f"ask {number}", "better": f"b {number}", "worse": f"w {number}", "margin": number / 4}


def solution(letter: str, number: int) -> Options:
    """A step that ends with two tokens, either of which may be the placeholder, with two labels for it."""
    texts = {"input": f"{letter} {number}z={number}", "question": f"ask {number}z="}
    return texts | {"label": ["y"], "answer": ["n"]}


Changes = tuple[tuple[str, Any], ...]  # option and value; a tuple, since runs are remembered by it


def _spy(patch: pytest.MonkeyPatch, trace: Trace, module: types.ModuleType, name: str) -> None:
    real = getattr(module, name)

    def noted(*arguments: Any, **options: Any) -> Any:
        trace.given[name].append({"positional": arguments, **options})
        return real(*arguments, **options)

    patch.setattr(module, name, noted)


def _patch_metrics(patch: pytest.MonkeyPatch, trace: Trace) -> None:
    """TensorBoard and W&B take seconds to import."""

    def sink(name: str) -> Callable[..., Any]:
        def made(directory: Path, **options: Any) -> Any:
            trace.given[name].append({"directory": directory, **options})
            return types.SimpleNamespace(log=lambda step, metrics: None, close=lambda: None)

        return made

    patch.setattr(sinks, "TensorBoardSink", sink("tensorboard"))
    patch.setattr(sinks, "WandbSink", sink("wandb"))
