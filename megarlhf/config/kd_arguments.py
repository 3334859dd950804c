"""Options of knowledge distillation: those of supervised fine-tuning, and a teacher."""

from dataclasses import dataclass, field
from typing import Literal

from megarlhf.config.supervised_arguments import OneEpochBatchArguments, SFTConfig, SFTDataArguments


@dataclass(frozen=True, kw_only=True)
class KDDataArguments(SFTDataArguments):
    """Prompt-response pairs, or conversations, on whose tokens the student is compared with its teacher."""

    output_key: str | None = "output"
    """Column with the response. None: input_key holds the whole conversation."""


@dataclass(frozen=True, kw_only=True)
class KDArguments:
    """What is learned from whom."""

    teacher_model: str
    """Local directory of the teacher's Hugging Face checkpoint, with the same tokenizer; its depth, width and family
    may differ. It has the student's layout, and is on the device only while it computes."""
    kd_coef: float = 0.4
    """Weight of the distillation loss; the language-model loss has the rest, 1 - kd_coef."""
    kd_loss: Literal["forward", "reverse"] = "forward"
    """forward: the cross-entropy with the teacher's distribution, which is KL(teacher || student) and the teacher's
    entropy. reverse: KL(student || teacher)."""
    teacher_top_k: int | None = None
    """Compare the teacher's so many likeliest tokens, and all others as one, with the student's. The teacher computes
    them once, into a file beside the run directory, and is not loaded by later runs with the same teacher and data.
    None: the whole vocabulary, by a teacher that computes in each step."""


@dataclass(frozen=True, kw_only=True)
class KDConfig(SFTConfig):
    """Knowledge distillation: supervised fine-tuning beside a teacher."""

    program = "kd"
    batch: OneEpochBatchArguments = field(default_factory=OneEpochBatchArguments)
    data: KDDataArguments
    kd: KDArguments

    @property
    def other_models(self) -> dict[str, str]:
        """The teacher."""
        return {"teacher_model": self.kd.teacher_model}
