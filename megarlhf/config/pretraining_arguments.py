"""Options of the pretraining loss that is mixed into PPO's."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class PretrainingArguments:
    """Documents to go on pre-training with in each optimizer step of the actor."""

    pretrain_data: str | None = None
    """Texts, or with apply_chat_template also whole conversations, in the column input_key; in the formats of
    prompt_data. Each optimizer step of the actor draws global_batch_size of them; those of more than prompt_max_len +
    generate_max_len tokens are dropped and counted. None: no pretraining loss."""
    pretrain_data_probs: str | None = None
    """Numbers with commas between them, one for each of several data sets: rows are drawn in these proportions until
    one has no more. None: all rows of all of them."""
    pretrain_split: str = "train"
    """Split to take documents from, of data sets that have several."""
    ptx_coef: float = 0.05
    """Weight of the pretraining loss, a mean over the documents' tokens, beside the policy loss."""
