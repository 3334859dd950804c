"""Process reward model: cross-entropy of a judgement at the end of each step of a solution."""

from collections.abc import Sequence

import torch
from torch import Tensor

from megarlhf.algos.reward_models import step_loss
from megarlhf.data.types import MicroBatch
from megarlhf.engine.objective import Metrics, Objective, OutputLayer, TokenOutputs
from megarlhf.parallel.candidates import candidate_logits, likeliest_tokens
from megarlhf.parallel.vocab import vocab_parallel_log_probs
from megarlhf.trainers.supervised import SupervisedTask


def process_reward_task(reward_tokens: Sequence[int] | None) -> SupervisedTask:
    """Its objective, over the placeholders of any rows."""
    return SupervisedTask(name="prm", objective=process_reward_objective(reward_tokens))


def process_reward_objective(reward_tokens: Sequence[int] | None) -> Objective:
    """-sum_i share_i * log p(reward token i, among the reward tokens) at each placeholder, summed.

    Field of the micro-batch: `shares` [t, k]; or, without reward tokens, `label_ids` [t], and the loss is -log p of
    that token in the whole vocabulary. The model's judgement is its likeliest token of those.

    Args:
        reward_tokens: k token ids.
    """

    def among_rewards(layer: OutputLayer, batch: MicroBatch) -> TokenOutputs:
        assert reward_tokens is not None
        tokens = torch.tensor(reward_tokens, device=layer.hidden.device)
        logits = candidate_logits(layer.hidden, layer.weight, tokens, of=layer.distribution, group=layer.group)
        return TokenOutputs(candidates=layer.on_sequence(logits.log_softmax(-1), len(batch.targets)))

    def among_all(layer: OutputLayer, batch: MicroBatch) -> TokenOutputs:
        labels, length = batch.fields["label_ids"][layer.places].long(), len(batch.targets)
        log_probs, _ = vocab_parallel_log_probs(
            layer.hidden, layer.weight, labels, of=layer.distribution, group=layer.group
        )
        likeliest = likeliest_tokens(layer.hidden, layer.weight, of=layer.distribution, group=layer.group)
        return TokenOutputs(
            log_probs=layer.on_sequence(log_probs, length), likeliest=layer.on_sequence(likeliest, length)
        )

    def loss(outputs: TokenOutputs, batch: MicroBatch) -> tuple[Tensor, Metrics]:
        mask = batch.target_mask
        if outputs.candidates is not None:
            per_step, correct = step_loss(outputs.candidates[mask], batch.fields["shares"][mask])
        else:
            assert outputs.log_probs is not None and outputs.likeliest is not None
            per_step = -outputs.log_probs[mask]
            correct = outputs.likeliest[mask] == batch.fields["label_ids"][mask]
        return per_step.sum(), {"accuracy": (correct.float().sum(), len(correct))}

    outputs = among_all if reward_tokens is None else among_rewards
    return Objective(loss=loss, metric_names=("accuracy",), outputs=outputs)
