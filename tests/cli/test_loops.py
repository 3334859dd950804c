"""Generating, scoring and whole loops: what a kill leaves, and that going on gives what never stopped.

Engines and programs are plain objects here; test_loop_runs.py has the real ones.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from examples.demo.make_assets import make_tokenizer
from megarlhf.cli import run_generate, run_iterate, run_score
from megarlhf.cluster import launch
from megarlhf.config.command_line import from_dict, to_dict
from megarlhf.config.loop_arguments import GenerateConfig, IterateConfig, ScoreConfig
from megarlhf.data.types import Prompt, Rollout, Sample
from megarlhf.formats.stages import JOURNAL, Stages
from megarlhf.rollout.engine import request_seed
from tests.tiny_models import make_model


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("loops")
    tokenizer = make_tokenizer()
    make_model(directory / "model", vocab_size=len(tokenizer), hidden_size=64, intermediate_size=64, eos_token_id=2)
    tokenizer.save_pretrained(directory / "model")
    rows = [{"input": f"ask {i % 3}", "label": f"{i}"} for i in range(10)]  # texts come more than once
    (directory / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (directory / "eval.jsonl").write_text('{"input": "try", "label": "1"}\n')
    (directory / "reward.py").write_text(
        "def reward_func(queries, prompts, labels):\n"
        "    return [None if q.endswith('7') else sum(map(ord, q[len(p):])) % 5 for q, p in zip(queries, prompts)]\n"
    )
    return directory


class Killed(Exception):
    """As a kill, but that the process goes on."""


class PlainEngines:
    """Answers that are a function of the response's seed."""

    def __init__(self, seed: int, per_prompt: int, *, dies_at: int | None) -> None:
        self.seed, self.per_prompt, self.dies_at = seed, per_prompt, dies_at
        self.parts: list[int] = []

    def generate(self, prompts: Sequence[Prompt], *, step: int, first_place: int, greedy: bool) -> Rollout:
        if self.dies_at is not None and first_place >= self.dies_at:
            raise Killed
        self.parts.append(len(prompts))
        samples = [
            Sample(
                prompt=prompt,
                group_id=group,
                sample_id=sample,
                response_length=3,
                response_text=f"{request_seed(self.seed, step, first_place + group, sample)}</s>",
                stop_text="</s>",
                finish_reason="stop",
                weight_version=0,
            )
            for group, prompt in enumerate(prompts)
            for sample in range(self.per_prompt)
        ]
        return Rollout(samples=samples, tokens=())


@pytest.fixture
def generate(assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    def run(name: str, *, dies_at: int | None = None, **changes: Any) -> PlainEngines:
        own = {"pretrain": str(assets / "model"), "prompt_data": str(assets / "prompts.jsonl"), "seed": 7}
        own |= {"prompt_max_len": 16, "generate_max_len": 8, "n_samples_per_prompt": 2, "max_num_seqs": 2}
        config = from_dict(GenerateConfig, own | {"output": str(tmp_path / f"{name}.jsonl")} | changes)
        engines = PlainEngines(config.model.seed, config.generate.n_samples_per_prompt, dies_at=dies_at)

        @contextmanager
        def open_engines(*arguments: Any, **options: Any) -> Iterator[PlainEngines]:
            yield engines

        monkeypatch.setattr(launch, "open_engines", open_engines)
        run_generate.run(config, dry_run=False)
        return engines

    return run


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_killed_generation_goes_on_after_its_last_part(
    generate: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate("whole").parts == [4, 4, 2]
    with pytest.raises(Killed):
        generate("killed", dies_at=8)
    assert not (tmp_path / "killed.jsonl").exists()
    partial = tmp_path / "killed.jsonl.partial"
    partial.write_bytes(partial.read_bytes()[:-9])  # a part that was cut off is generated again
    assert generate("killed").parts == [4, 2]
    whole = (tmp_path / "whole.jsonl").read_bytes()
    assert (tmp_path / "killed.jsonl").read_bytes() == whole
    with pytest.raises(Killed):
        generate("other", dies_at=8)
    assert generate("other", temperature=0.5).parts == [4, 4, 2], "other options: from the start"
    capsys.readouterr()
    for dies_at, answered, again, parts in ((4, 0, 4, [8, 2]), (8, 8, 0, [2])):
        with pytest.raises(Killed):
            generate("engines", dies_at=dies_at)
        assert generate("engines", vllm_num_engines=2).parts == parts, "of the parts that more engines have"
        assert (tmp_path / "engines.jsonl").read_bytes() == whole
        said = f"{answered} prompts are answered already" + f", {again} are answered again" * bool(again)
        assert said in (printed := capsys.readouterr().out) and ("again" in printed) == bool(again)
    found = read(tmp_path / "whole.jsonl")
    assert [(row["place"], row["index"], row["sample"]) for row in found] == [
        (i, i, sample) for i in range(10) for sample in range(2)
    ]
    assert [row["output"] for row in found] == [
        f"{request_seed(7, 0, i, sample)}" for i in range(10) for sample in range(2)
    ]
    assert found[5] == {
        **{"input": "ask 2", "output": found[5]["output"], "label": "2", "index": 2, "place": 2, "sample": 1},
        **{"finish_reason": "stop", "stop_text": "</s>"},
    }


def test_an_iter_takes_its_slice_and_its_seeds(generate: Any, tmp_path: Path) -> None:
    generate("slice", iter=2, rollout_batch_size=4)
    found = read(tmp_path / "slice.jsonl")
    assert [row["index"] for row in found[::2]] == [8, 9, 0, 1]
    assert [row["place"] for row in found[::2]] == [0, 1, 2, 3]
    assert found[0]["output"] == f"{request_seed(7, 2, 0, 0)}"


def score(assets: Path, tmp_path: Path, **changes: Any) -> list[dict[str, Any]]:
    own = {"dataset": str(tmp_path / "samples.jsonl"), "output": str(tmp_path / "scored.jsonl")}
    config = from_dict(ScoreConfig, own | {"reward_function": str(assets / "reward.py")} | changes)
    run_score.run(config, dry_run=False)
    return read(tmp_path / "scored.jsonl")


def test_scores_are_those_of_the_source(
    assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"input": f"q{i // 3}", "output": f"{i}", "place": i // 3, "more": [i]} for i in range(20)]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    expected = [None if i in (7, 17) else sum(map(ord, f"{i}")) % 5 for i in range(20)]
    found = score(assets, tmp_path)
    scores = [{"reward": reward, "parts": {"function": reward}} for reward in expected]
    assert found == [row | own for row, own in zip(rows, scores, strict=True)]
    assert "2 of 20 samples without a result" in capsys.readouterr().out
    # In parts, the second of which is killed; groups are not cut.
    monkeypatch.setattr(run_score, "_PART", 4)
    _, samples, borders = run_score.load_samples(from_dict(ScoreConfig, {
        "dataset": str(tmp_path / "samples.jsonl"), "output": "o"}).score)  # fmt: skip
    assert borders == [0, 6, 12, 18, 20]
    assert [(s.group_id, s.sample_id) for s in samples[6:9]] == [(0, 0), (0, 1), (0, 2)]
    calls: list[int] = []
    real = run_score.SumOfSources.score

    def dying(sources: Any, rollout: Rollout) -> Any:
        calls.append(len(rollout.samples))
        if len(calls) == 3:
            raise Killed
        return real(sources, rollout)

    monkeypatch.setattr(run_score.SumOfSources, "score", dying)
    (tmp_path / "scored.jsonl").unlink()
    with pytest.raises(Killed):
        score(assets, tmp_path)
    others = {"reward_timeout_seconds": 31.0, "remote_rm_timeout_seconds": 7.0, "remote_rm_concurrency": 2}
    others |= {"remote_rm_max_retries": 1, "remote_rm_allow_http": True, "min_result_fraction": 0.1}
    others |= {"start_timeout_seconds": 7.0, "phase_timeout_seconds": 7.0, "gpu_memory_gib": 7.0}
    others |= {"max_no_result_fraction": 0.9}
    assert {"output", *others} == set(run_score.FREE)
    assert score(assets, tmp_path, **others) == found and calls == [6, 6, 6, 6, 2]
    del calls[:]
    with pytest.raises(Killed):
        score(assets, tmp_path)
    assert score(assets, tmp_path, reward_chunk_size=5) == found and calls == [6, 6, 6, 6, 6, 6, 2], "from the start"


def test_too_few_results_are_an_error(assets: Path, tmp_path: Path) -> None:
    rows = [{"input": "q", "output": "7"}] * 3 + [{"input": "q", "output": "8"}]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(RuntimeError, match=r"75\.0% of the samples have no result, where min_result_fraction=0\.5"):
        score(assets, tmp_path)
    assert len(score(assets, tmp_path, min_result_fraction=0.25)) == 4


def test_the_journal_of_stages(tmp_path: Path) -> None:
    Stages(tmp_path, {"seed": 1, "x": (1, 2)}).finish("a", 1.5)
    with (tmp_path / JOURNAL).open("a") as file:
        file.write('{"stage": "b"')  # cut off
    stages = Stages(tmp_path, {"seed": 1, "x": [1, 2], "new": 3})
    stages.finish("c", 2.0)
    with pytest.raises(ValueError, match="another process runs its stages"):
        Stages(tmp_path, {"seed": 1})
    del stages
    assert Stages(tmp_path, {"seed": 1, "x": (1, 2)}).seconds == {"a": 1.5, "c": 2.0}
    with pytest.raises(ValueError, match="seed: was 1, now 2"):
        Stages(tmp_path, {"seed": 2, "x": [1, 2]})


class PlainPrograms:
    """The stages' programs: each writes the files of its configuration, functions of what it reads."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.dies: tuple[str, str] | None = None  # stage, and whether before or after its files are there

    def __call__(self, module: str, arguments: Sequence[str], *, should_stop: Any) -> int:
        path = Path(arguments[1])
        stage = f"{path.parent.name}/{path.stem}"
        if self.dies == (stage, "before"):
            raise Killed
        self.ran.append(stage)
        values = {k: v for group in yaml_of(path).values() for k, v in group.items()}
        if module.endswith("generate"):
            self._generate(values)
        elif module.endswith("score"):
            rows = read(Path(values["dataset"]))
            rewards = [0.5 if row["place"] == 3 else len(row["output"]) for row in rows]
            # place 3 has no part by the function: of 4 greedy responses 3 can be judged
            parts = [{"reward_model": r} | ({} if r == 0.5 else {"function": r - 1}) for r in rewards]
            own = [{"reward": r, "parts": part} for r, part in zip(rewards, parts, strict=True)]
            write(values["output"], [row | each for row, each in zip(rows, own, strict=True)])
        else:
            (hf := Path(values["save"]) / "hf").mkdir(parents=True, exist_ok=True)
            measured = [{"step": step, "dpo/loss": 1.0, "dpo/eval_loss": 1.0 / step} for step in (1, 4)]
            write(f"{values['save']}/metrics.jsonl", measured if values["eval_split"] else [])
            given = values["pretrain"], values.get("ref_pretrain")
            (hf / "weights").write_text(f"{given} {Path(values['dataset']).read_text()}")
        if self.dies == (stage, "after"):
            raise Killed
        return 0

    def _generate(self, values: dict[str, Any]) -> None:
        rows = [
            {"input": f"p{place}", "output": "a" * (place + sample), "place": place, "sample": sample}
            | {"finish_reason": "stop", "pretrain": values["pretrain"], "iter": values["iter"]}
            for place in range(4)
            for sample in range(values["n_samples_per_prompt"])
        ]
        write(values["output"], rows)


def yaml_of(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(path.read_text())
    return found


def write(path: str, rows: list[dict[str, Any]]) -> None:
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


STAGES = [
    *("round_000/eval_generate", "round_000/eval_score"),
    *(
        f"round_00{number}/{stage}"
        for number in (1, 2)
        for stage in ("generate", "score", "train", "eval_generate", "eval_score")
    ),
]


def loop(assets: Path, save: Path, programs: PlainPrograms, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    own = {"pretrain": str(assets / "model"), "prompt_data": str(assets / "prompts.jsonl"), "save": str(save)}
    own |= {"eval_data": str(assets / "eval.jsonl"), "reward_function": str(assets / "reward.py"), "max_len": 32}
    own |= {"prompt_max_len": 16, "generate_max_len": 8, "n_samples_per_prompt": 2, "rollout_batch_size": 4}
    config = from_dict(IterateConfig, own | {"method": "iterative_dpo", "num_rounds": 2} | changes)
    monkeypatch.setattr(run_iterate, "run_program", programs)
    monkeypatch.setattr(run_iterate, "_check_stages", lambda config, dry_run: "")
    monkeypatch.setattr(run_iterate, "write_report", lambda directory, title: ("page", "picture"))
    run_iterate.run(config, dry_run=False)


def test_a_loop_goes_on_wherever_it_was_killed(
    assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = PlainPrograms()
    loop(assets, tmp_path / "whole", whole, monkeypatch)
    assert whole.ran == STAGES
    weights = (tmp_path / "whole" / "hf" / "weights").read_text()
    assert (tmp_path / "whole" / "hf").readlink() == Path("round_002/train/hf")
    assert weights.startswith(f"('{tmp_path}/whole/round_001/train/hf', '{assets}/model') ")
    metrics = read(tmp_path / "whole" / "metrics.jsonl")
    assert [row["step"] for row in metrics] == [0, 1, 2]
    # place 0 has one answer that is not empty, place 3 one reward
    expected = {"select/rows": 2.0, "select/ties": 2.0, "select/no_result_count": 0.0, "rollout/truncated_frac": 0.0}
    expected |= {"reward/mean": 10 / 8, "reward/no_result_count": 0.0, "eval/reward_mean": 3.5 / 4}
    expected["eval/accuracy"] = 1 / 3  # by the function: -1, 0 and 1
    assert {key: metrics[2][key] for key in expected} == expected and "dpo/eval_loss" not in metrics[2]
    table = capsys.readouterr().out.splitlines()
    assert ["2", "1.2500", "2", "2", "0.8750", "33.3%"] in [line.split() for line in table]
    for number, stage in enumerate(STAGES):
        programs, save = PlainPrograms(), tmp_path / f"{number}"
        programs.dies = (stage, ("before", "after")[number % 2])
        with pytest.raises(Killed):
            loop(assets, save, programs, monkeypatch)
        programs.dies, before = None, list(programs.ran)
        loop(assets, save, programs, monkeypatch)
        assert programs.ran == before + STAGES[number:]
        assert (save / "hf" / "weights").read_text().replace(str(save), str(tmp_path / "whole")) == weights
        assert [row["step"] for row in read(save / "metrics.jsonl")] == [0, 1, 2]
    with pytest.raises(ValueError, match="n_samples_per_prompt: was 2, now 3"):
        loop(assets, tmp_path / "whole", whole, monkeypatch, n_samples_per_prompt=3)
    loop(assets, tmp_path / "whole", whole, monkeypatch, num_rounds=3)
    assert whole.ran[len(STAGES) :] == [stage.replace("002", "003") for stage in STAGES[-5:]]


def test_a_part_of_what_is_selected_measures_the_training(
    assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop(assets, tmp_path, PlainPrograms(), monkeypatch, eval_split="0.25", eval_data=None)
    metrics = read(tmp_path / "metrics.jsonl")
    assert [row.get("dpo/eval_loss") for row in metrics] == [None, 0.25, 0.25], "of its last step"
    assert "dpo/loss" not in metrics[1] and "eval/accuracy" not in metrics[1]


def test_a_round_that_selects_nothing_keeps_its_model(
    assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs = PlainPrograms()
    loop(assets, tmp_path / "run", programs, monkeypatch, rollout_batch_size=4, generate_max_len=7, num_rounds=1)
    monkeypatch.setattr(PlainPrograms, "_generate", lambda self, values: write(values["output"], [
        {"input": "p", "output": "a", "place": 0, "sample": i, "finish_reason": "stop"} for i in range(2)
    ]))  # fmt: skip
    loop(assets, tmp_path / "run", programs, monkeypatch, generate_max_len=7)
    assert programs.ran[-4:] == [f"round_002/{stage}" for stage in ("generate", "score", "eval_generate", "eval_score")]
    assert (tmp_path / "run" / "hf").readlink() == Path("round_001/train/hf")
    assert to_dict(from_dict(IterateConfig, yaml_of(tmp_path / "run" / "config.yaml")))["generate_max_len"] == 7


def test_a_stage_that_fails_ends_the_loop(assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(module: str, arguments: Sequence[str], *, should_stop: Any) -> int:
        return 3

    with pytest.raises(RuntimeError, match="round_000: eval_generate ended with status 3"):
        loop(assets, tmp_path / "run", failing, monkeypatch)  # type: ignore[arg-type]
