"""Every option of `megarlhf kd`: those of `megarlhf sft` under its own names of metrics, and the teacher's."""

from dataclasses import replace

import pytest

from tests.config.in_process import Trace
from tests.config.option_probes import Probe, adam, best_probes, both, metric, steps_with
from tests.config.option_probes_rest import SFT

LOSSES = [metric(f"kd/{name}", 1) for name in ("loss", "lm_loss", "kl", "teacher_entropy")]


def share_of_distillation(trace: Trace) -> float:
    """kd_coef, from what is reported."""
    loss, lm_loss, kl, entropy = (seen(trace) for seen in LOSSES)
    return round((loss - lm_loss) / (kl + entropy - lm_loss), 4)


def has_entropy(trace: Trace) -> bool:
    """Whether the loss is the cross-entropy with the teacher."""
    loss, lm_loss, kl, _ = (seen(trace) for seen in LOSSES)
    return loss != pytest.approx(0.6 * lm_loss + 0.4 * kl, abs=1e-5)


def _beside_teacher(probe: Probe) -> Probe:
    """Where experts are split the teacher has some too, and what a run goes on from is one of this program's."""
    given = {key: renamed(value) for key, value in probe.also.items()}
    given |= {"output_key": "output"} if probe.also.get("dataset") == "" else {}  # its default, as data_path asks
    given |= {"teacher_model": "{}/experts"} if probe.also.get("pretrain") == "{}/experts" else {}
    return replace(probe, also=given, value=renamed(probe.value))


def renamed(value: object) -> object:
    """A directory of SFT's runs as one of KD's."""
    return value.replace("_sft", "_kd") if isinstance(value, str) else value


KD = {name: _beside_teacher(probe) for name, probe in SFT.items()} | {
    "save": replace(SFT["save"], value="{}/elsewhere_kd", expected="elsewhere_kd"),
    "load": replace(SFT["load"], value="{}/first_kd"),
    **best_probes("kd/eval_loss"),
    "eval_interval": replace(SFT["eval_interval"], seen=steps_with("kd/eval_loss")),
    "learning_rate": replace(SFT["learning_rate"], seen=both(adam("lr"), metric("kd/learning_rate", 1))),
    "teacher_model": Probe(
        value="{}/experts",
        seen=both(lambda t: t.engine("teacher").pretrain.name, lambda t: t.engine().pretrain.name),
        expected=("experts", "model"),
    ),
    "kd_coef": Probe(value=0.7, seen=share_of_distillation),
    "teacher_top_k": Probe(
        value=3,
        seen=both(
            lambda t: [(call["k"], call["teacher_model"].rsplit("/", 1)[1]) for call in t.given["top tokens"]],
            lambda t: any(name == "teacher" for name, _ in t.engines),
        ),
        expected=([(3, "other")], False),
    ),
    "kd_loss": Probe(value="reverse", seen=has_entropy, expected=False),
}
