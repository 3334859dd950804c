"""Runs of preferences with two ranks, started as a user does."""

import json
import math
from pathlib import Path

import pytest

from tests.cluster.runs import metrics, run

Flags = dict[str, str | None]


def write(path: Path, rows: list[dict[str, object]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def flags(assets: Path, tmp_path: Path) -> Flags:
    return {
        "--pretrain": str(assets / "model"),
        "--max_len": "16",
        "--train_batch_size": "8",
        "--train-iters": "12",
        "--learning_rate": "5e-3",
        "--num_gpus_per_node": "2",
        "--save": str(tmp_path / "run"),
    }


@pytest.mark.slow
def test_dpo_learns_with_its_reference_kept_or_computed_once(flags: Flags, tmp_path: Path) -> None:
    """The second run, in another layout, keeps no reference and takes the first one's steps."""
    pairs = [{"prompt": f"{i}=", "chosen": "24680"[i % 5] * 2, "rejected": "13579"[i % 4]} for i in range(40)]
    pairs.append({"prompt": "1=", "chosen": "2", "rejected": "2"})
    own = flags | {
        "--dataset": write(tmp_path / "pairs.jsonl", pairs[8:]),
        "--eval_dataset": write(tmp_path / "eval.jsonl", pairs[:7]),
        "--prompt_key": "prompt",
        "--no_ref_offload": None,
        "--beta": "0.3",
    }
    said = run("train_dpo", own)
    assert "1 rows dropped: 1 with chosen equal to rejected" in said
    rows = metrics(tmp_path / "run")
    assert rows[1]["dpo/loss"] == pytest.approx(math.log(2), abs=1e-6) and rows[1]["dpo/margin"] == 0
    assert rows[12]["dpo/accuracy"] > 0.9 and rows[12]["dpo/margin"] > 0
    assert rows[12]["dpo/eval_accuracy"] > 0.9 and rows[12]["dpo/eval_loss"] < rows[1]["dpo/loss"]
    assert rows[1]["memory/dpo/reference_gib"] > 0
    assert "share_prompt_prefix: true" in (tmp_path / "run" / "config.yaml").read_text()
    del own["--no_ref_offload"]
    again = {"--precompute_ref_log_probs": None, "--pipeline_model_parallel_size": "2"}
    run("train_dpo", own | again | {"--save": str(tmp_path / "again")})
    assert len(list(tmp_path.glob("ref_log_probs-*.npy"))) == 2, "of the training and of the evaluation data"
    found = metrics(tmp_path / "again")
    assert found[1]["memory/dpo/reference_gib"] == 0
    for step in (1, 2, 12):
        assert found[step]["dpo/loss"] == pytest.approx(rows[step]["dpo/loss"], abs=2e-4)


@pytest.mark.slow
def test_kto_learns(flags: Flags, tmp_path: Path) -> None:
    answers = [
        {"input": f"{i // 2}=", "output": ("2468"[i % 4], "1357"[i % 4])[i % 2], "label": 1 - i % 2} for i in range(64)
    ]
    held_out = [row for i, row in enumerate(answers) if i % 16 in (0, 1, 6, 7)]
    training = [row for row in answers if row not in held_out]
    own = flags | {
        "--dataset": write(tmp_path / "answers.jsonl", training),
        "--eval_dataset": write(tmp_path / "eval.jsonl", held_out),
        "--output_key": "output",
        "--input_template": "{}",
        "--beta": "0.3",
        "--desirable_loss_weight": "3",
        "--train-iters": "20",
    }
    said = run("train_kto", own)
    assert "warning: 24 desirable answers x desirable_loss_weight=3 against 24 undesirable" in said
    rows = metrics(tmp_path / "run")
    desirable = 8 * rows[1]["kto/loss"] - 4  # of the 8 rows of a batch, d weigh 3 and the others 1, times a half
    assert desirable == pytest.approx(round(desirable), abs=1e-5) and rows[1]["kto/kl"] == 0
    assert rows[20]["kto/accuracy"] > 0.9 and rows[20]["kto/margin"] > 0
    assert rows[20]["kto/eval_accuracy"] > 0.9 and rows[20]["kto/eval_margin"] > 0
    page = (tmp_path / "run" / "report.html").read_text()
    assert "kto/eval_accuracy" in page


@pytest.mark.slow
def test_mistakes_are_told_before_any_rank_starts(flags: Flags, tmp_path: Path) -> None:
    path = write(tmp_path / "pairs.jsonl", [{"prompt": "1=", "chosen": "2"}])
    wrong = {"--dataset": path, "--ipo": None, "--label_smoothing": "0.1", "--max_tokens_per_micro_batch": "20"}
    said = run("train_dpo", flags | wrong, expect=2)
    assert "label_smoothing=0.1 with ipo=True" in said and "is below twice max_len = 32" in said
    said = run("train_dpo", flags | {"--dataset": path}, expect=2)
    assert "row 0 (line 1)" in said and "rejected_key=rejected is not there" in said
