"""How the routers of a model with experts deal out tokens: the numbers behind the metrics `*/moe_*`."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor


class RouterStatistics:
    """Counts what every router of this rank's chunks chooses in training forward passes.

    Padding counts as tokens. Layers that are recomputed are seen twice, which changes no mean.
    """

    def __init__(self, chunks: Sequence[torch.nn.Module], num_layers: int) -> None:
        self._num_layers = num_layers
        self.start()
        for router in (m for chunk in chunks for m in chunk.modules() if isinstance(m, TopKRouter)):
            router.register_forward_hook(self._add)  # a router holds the statistics, which hold no router: no cycle

    def start(self) -> None:
        """Forget what was counted."""
        self._totals: Tensor | None = None  # [layers, 2 experts + 2]: choices, probabilities, log-probs, tokens

    @torch.no_grad()
    def _add(self, router: Any, inputs: tuple[Tensor, ...], outputs: tuple[Tensor, Tensor]) -> None:
        if not router.training:
            return
        chosen = outputs[1]  # [t, experts] bool
        logits = router.gating(inputs[0]).reshape(chosen.shape).float()
        scores = logits.softmax(-1) if router.score_function == "softmax" else logits.sigmoid()
        probs = scores / scores.sum(-1, keepdim=True)
        log_probs = torch.where(chosen, probs.log(), 0.0).sum() / router.topk
        row = torch.cat([chosen.sum(0), probs.sum(0), log_probs[None], log_probs.new_tensor([len(chosen)])]).double()
        if self._totals is None:
            self._totals = row.new_zeros(self._num_layers, len(row))
        self._totals[router.layer_number - 1] += row

    def metrics(self, num_experts: int, top_k: int, device: torch.device) -> dict[str, float]:
        """Over all tokens since `start`, equal on every rank; every rank of the world calls it.

        moe_balance_loss is the load-balancing loss of Switch Transformers (arXiv:2101.03961, equation 4), mean over
        layers, divided so that 1 is perfect balance.
        """
        shape = (self._num_layers, 2 * num_experts + 2)
        totals = self._totals if self._totals is not None else torch.zeros(shape, dtype=torch.float64, device=device)
        dist.all_reduce(totals)
        totals = totals[totals[:, -1] > 0]  # dense layers have no router
        chosen, probs, log_probs, tokens = totals.split([num_experts, num_experts, 1, 1], 1)
        load, probs = chosen * num_experts / (tokens * top_k), probs / tokens  # load 1: an expert's even share
        return {
            "moe_balance_loss": float((load * probs).sum(-1).mean()),
            "moe_load_max": float(load.max()),
            "moe_load_min": float(load.min()),
            "moe_router_log_prob": float((log_probs / tokens).mean()),
        }
