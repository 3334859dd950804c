"""The Megatron engine: one model of one role, as this rank holds it.

Callers hand over this rank's packed sequences, or rows that every rank has, of which the engine takes its data-parallel
share by a plan that every rank computes alike. It runs Megatron-Core's schedule and gives back a number for each target
on the ranks of the last stage.
"""

import contextlib
import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.transformer.module import Float16Module
from torch import Tensor

from megarlhf.config.roles import Part
from megarlhf.data.packing import fill_fields, gather_targets, join_values, pack_rows
from megarlhf.data.planning import PackingOptions, plan_micro_batches
from megarlhf.data.types import Ints, MicroBatch, TargetValues, TrainingRows
from megarlhf.engine.memory import DeviceMemory
from megarlhf.engine.objective import LossTerm, NonFiniteError, Objective, Outputs, StepResult, TokenOutputs
from megarlhf.engine.optimizer import (
    OptimizerOptions,
    build_optimizer,
    build_scheduler,
    empty_wrappers,
    optimizer_tensors,
    wrap_chunks,
)
from megarlhf.engine.precision import Precision
from megarlhf.engine.reference import Reference, reference_source
from megarlhf.engine.schedule import (
    GradientReduction,
    balance_loss_unit,
    equally_long,
    run_evaluation,
    run_forward,
    run_forward_backward,
    summed,
    target_log_probs,
    term_losses,
    token_outputs,
)
from megarlhf.formats.huggingface import read_checkpoint
from megarlhf.models.build import Head, ModelOptions, build_model
from megarlhf.models.lora import Adapters
from megarlhf.models.names import check_names, stored_dtypes
from megarlhf.models.registry import check_computing, find_architecture
from megarlhf.models.router_statistics import RouterStatistics
from megarlhf.models.weights import ModelWeights
from megarlhf.parallel.context import context_part, join_context
from megarlhf.parallel.device import current_device, release_memory
from megarlhf.parallel.groups import current_ranks, seed_generators
from megarlhf.parallel.truncation import Truncation
from megarlhf.parallel.vocab import OutputDistribution


class MegatronEngine:
    """One sharded model with its optimizer.

    Args:
        pretrain: HF checkpoint directory that gives configuration and weights.
        optimizer: None for a model that only runs forward.
        logprob_chunk_tokens: tokens whose logits exist at once.
        truncation: what of the distributions at the temperature the log-probs are over; None: all.
    """

    def __init__(
        self,
        pretrain: str | Path,
        *,
        head: Head,
        model: ModelOptions,
        packing: PackingOptions,
        optimizer: OptimizerOptions | None,
        logprob_chunk_tokens: int,
        temperature: float = 1.0,
        truncation: Truncation | None = None,
        seed: int = 42,
    ) -> None:
        self.pretrain, self.head = Path(pretrain), head
        self.ranks = current_ranks()
        self.packing = packing.for_pipeline(self.ranks.pp_size, self.ranks.vpp_size)
        self.hf, source = read_checkpoint(pretrain)
        arch = find_architecture(self.hf)
        check_computing(arch, self.hf)
        check_names(arch, self.hf, source, head)
        self.source_dtypes = stored_dtypes(arch, self.hf, source, head)
        self.chunks, self.config = build_model(arch, self.hf, self.ranks, model, head=head, seed=seed)
        self.weights = ModelWeights(self.chunks, arch, self.hf, self.ranks, head=head)
        self.weights.load(source)
        self.adapters = Adapters(self.chunks, self.weights, model.lora, seed=seed) if model.lora.lora_rank else None
        self._seed = seed
        for chunk in self.chunks:
            chunk.to(current_device())
        self.config.finalize_model_grads_func = self.reduction = GradientReduction()
        self._routers = RouterStatistics(self.chunks, self.hf.num_hidden_layers) if arch.is_moe(self.hf) else None
        self._bf16 = model.bf16
        self.distribution = OutputDistribution(
            vocab_size=self.hf.vocab_size,
            chunk_tokens=logprob_chunk_tokens,
            temperature=temperature,
            soft_cap=arch.additions(self.hf).logit_soft_cap,
            truncation=truncation or Truncation(),
        )
        self._outputs = partial(token_outputs, model=self.chunks[-1], head=head, distribution=self.distribution)
        self.model: list[Any] = [Float16Module(self.config, c) if model.bf16 else c for c in self.chunks]
        self.precision = Precision(model.precision, self.config, self.chunks)
        self._pad = self.precision.token_multiple * (self.ranks.tp_size if model.layout.sequence_parallel else 1)
        self.optimizer: Any = None
        self.scheduler: Any = None
        self._gathers_late = False  # parameters reach the other data-parallel ranks only in the next forward pass
        if optimizer is not None:
            self._add_optimizer(optimizer)
        self._reference: Reference | None = None
        self._reference_stays = False
        self.memory = DeviceMemory(self._parts())
        self.memory.sleep("gradients")  # they are on the device inside an update alone

    def _add_optimizer(self, options: OptimizerOptions) -> None:
        self.model = wrap_chunks(self.model, self.config, options)
        weakref.finalize(self, empty_wrappers, self.model).atexit = False
        self._gathers_late = options.overlap_param_gather
        self.optimizer = build_optimizer(self.model, options, bf16=self._bf16)
        self.optimizer.reload_model_params()
        self.scheduler = build_scheduler(self.optimizer, options)
        self.precision.keep_fp8_weights()

    def pack(self, rows: TrainingRows, indices: Sequence[int], min_length: int = 1) -> MicroBatch:
        """One packed sequence of these rows, whole, as this layout needs it; see pack_rows."""
        return pack_rows(
            rows,
            indices,
            share_prefix=self.packing.share_prefix,
            pad_to_multiple=self._pad,
            context_size=self.ranks.cp_size,
            min_length=min_length,
        )

    def micro_batches(self, rows: TrainingRows, indices: Sequence[int] | Ints | None = None) -> list[MicroBatch]:
        """This rank's part of rows that every rank has, as packed sequences; as many micro-batches as on any rank.

        Args:
            indices: of the rows to pack; None: all. Where some come more than once, as where a batch holds the end of
                an epoch and the start of the next, rows are numbered in the order of the indices.
        """
        chosen = np.arange(len(rows)) if indices is None else np.asarray(indices, dtype=np.int64)
        if len(np.unique(chosen)) < len(chosen):
            rows, chosen = rows.drawn(chosen), np.arange(len(chosen))
        plan = plan_micro_batches(
            rows.lengths[chosen],
            rows.prompt_lengths[chosen],
            rows.unit_ids[chosen],
            num_ranks=self.ranks.dp_size,
            packing=self.packing,
        )
        mine: list[list[int]] = [chosen[places].tolist() for places in plan[self.ranks.dp_rank]]
        batches = [self.pack(rows, indices) for indices in mine]
        if self.packing.one_length:
            longest = max(len(batch.tokens) for batch in batches)
            batches = [self.pack(rows, indices, longest) for indices in mine]
        return [fill_fields(batch, rows) for batch in batches]

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """Parameters of every chunk, with unique names."""
        for number, chunk in enumerate(self.chunks):
            for name, parameter in chunk.named_parameters():
                yield f"{number}.{name}", parameter

    def parameter_pools(self) -> list[Tensor]:
        """The tensors that parameters are views of, where the optimizer keeps them together."""
        return [buffer.param_data for buffer in self._ddp_buffers() if buffer.param_data is not None]

    def finish_param_gather(self) -> None:
        """Bring what the last optimizer step changed to every data-parallel rank; all call it before weights are read.

        With overlap_param_gather the step leaves that to the next forward pass.
        """
        if self._gathers_late:
            for chunk in self.model:
                chunk.start_param_sync(force_sync=True)

    def log_probs(self, rows: TrainingRows) -> TargetValues:
        """`forward` on rows that every rank has, at the rollout's temperature; their fields are not looked at."""
        return self.forward(self.micro_batches(rows))

    def forward(self, batches: list[MicroBatch], *, compute: Outputs = target_log_probs) -> TargetValues:
        """Log-probs of this rank's targets, or the value head's values before them; empty before the last stage.

        Args:
            compute: makes something else of a language model than log-probs, such as `hidden_outputs`: one of
                TokenOutputs, whose numbers come back.
        """
        self._evaluates()

        def computed() -> TargetValues:
            outputs = run_forward(self.model, self._own_parts(batches), self._outputs, compute)
            found = self._results(batches, outputs)
            self.precision.check("log_prob", found.values)
            return found

        return self.precision.guarded("log_prob", computed)

    def evaluate(self, batches: list[MicroBatch], objective: Objective) -> tuple[float, dict[str, tuple[float, float]]]:
        """The objective without gradients over all ranks' rows: its sum, and each metric's sum and count."""
        self._evaluates()

        def computed() -> tuple[float, dict[str, tuple[float, float]]]:
            stored = run_evaluation(self.model, self._own_parts(batches), self._outputs, objective)
            self.precision.check("log_prob")
            return summed(stored, objective, counts=self.ranks.computes_results)

        return self.precision.guarded("log_prob", computed)

    def _evaluates(self) -> None:
        self.memory.require("parameters")
        for chunk in self.chunks:
            chunk.eval()

    def _own_parts(self, batches: list[MicroBatch]) -> list[MicroBatch]:
        return [context_part(batch, self.ranks.cp_rank, self.ranks.cp_size) for batch in batches]

    def _results(self, batches: list[MicroBatch], outputs: list[TokenOutputs]) -> TargetValues:
        if not self.ranks.is_last_stage:
            return join_values([])
        found = []
        for batch, computed in zip(batches, outputs, strict=True):
            kinds = (computed.values, computed.log_probs, computed.hidden, computed.candidates, computed.divergence)
            part = next(part for part in kinds if part is not None)
            found.append(gather_targets(batch, self._whole_sequence(batch, part.detach()).cpu()))
        return join_values(found)

    def _whole_sequence(self, batch: MicroBatch, part: Tensor) -> Tensor:
        """Values of every context rank's tokens; all of the group call it."""
        if self.ranks.cp_size == 1:
            return part
        parts = [torch.empty_like(part) for _ in range(self.ranks.cp_size)]
        dist.all_gather(parts, part.contiguous(), group=parallel_state.get_context_parallel_group())
        return join_context(parts, batch.cu_seqlens)

    def train_step(self, rows: TrainingRows, objective: Objective, *, denominator: float) -> StepResult:
        """`step` on rows that every rank has."""
        return self.step(self.micro_batches(rows), objective, denominator=denominator)

    def step(
        self, batches: list[MicroBatch], objective: Objective, *, denominator: float, beside: Sequence[LossTerm] = ()
    ) -> StepResult:
        """One optimizer step on sum(loss over all ranks' packed sequences) / denominator, and on the terms `beside` it.

        A metric that is not finite is reported as it is.

        Raises:
            NonFiniteError: a loss or the gradient is not finite, on every rank; nothing has changed.
        """
        self.memory.require("parameters", "optimizer")
        compute = partial(self._step, batches, objective, denominator=denominator, beside=beside)
        try:
            result = self.precision.guarded("train", compute)
        finally:
            self.memory.sleep("gradients")
        self.precision.keep_fp8_weights()
        return result

    def _step(
        self, batches: list[MicroBatch], objective: Objective, *, denominator: float, beside: Sequence[LossTerm]
    ) -> StepResult:
        loss, metrics, outputs = self.accumulate_gradients(batches, objective, denominator=denominator, beside=beside)
        self.precision.check("train")
        self.scheduler.step(1)
        learning_rate = float(self.optimizer.param_groups[0]["lr"])
        try:
            _, grad_norm, _ = self.optimizer.step()
        except NonFiniteError as error:
            self.scheduler.step(-1)
            raise NonFiniteError(f"loss={loss}, {error}; the step was not taken") from None
        return StepResult(loss=loss, metrics=metrics, grad_norm=grad_norm, learning_rate=learning_rate, outputs=outputs)

    def accumulate_gradients(
        self, batches: list[MicroBatch], objective: Objective, *, denominator: float, beside: Sequence[LossTerm] = ()
    ) -> tuple[float, dict[str, float], TargetValues]:
        """Forward and backward; gradients stay in the model's buffers, reduced over every group, and on the device.

        Args:
            beside: more terms of the loss. What is returned is the first one's, but for their metrics.
        Raises:
            NonFiniteError: a loss is not finite, on every rank.
        """
        first = LossTerm(name="", batches=batches, objective=objective, denominator=denominator)
        terms = equally_long([first, *beside]) if self.packing.one_length else [first, *beside]
        parts = [replace(term, batches=self._own_parts(term.batches)) for term in terms]
        self.memory.wake("gradients")
        for chunk, wrapped in zip(self.chunks, self.model, strict=True):
            chunk.train()
            wrapped.zero_grad_buffer()
        if self.adapters is not None and self.adapters.options.lora_dropout:
            seed_generators(self._seed + self.scheduler.num_steps)  # so that a resumed run drops what it would have
        self.optimizer.zero_grad()
        if self._routers is not None:
            self._routers.start()
        unit = balance_loss_unit(self.config, self.ranks, [batch for part in parts for batch in part.batches])
        self.config.grad_scale_func = None if unit is None else lambda gradient: gradient / unit
        stored = run_forward_backward(self.model, parts, self._outputs, unit=unit or 1.0)
        losses, reported = term_losses(terms, stored, counts=self.ranks.computes_results)
        if not all(map(math.isfinite, losses)):
            raise NonFiniteError(f"loss={losses[0]}, {reported}; the step was not taken")
        outputs = self._results(terms[0].batches, [computed for computed, _ in stored[0]])
        if self._routers is not None:
            experts, top_k = self.config.num_moe_experts, self.config.moe_router_topk
            reported |= self._routers.metrics(experts, top_k, current_device())
        return losses[0], reported, outputs

    def keep_reference(self, pretrain: str | Path | None = None, *, stays: bool = False) -> None:
        """Remember the present weights as the reference model, or those of another checkpoint.

        With adapters, the weights without them are the reference.

        Args:
            stays: on the device, also while it does not compute.
        Raises:
            ValueError: its tensors are not those of this engine's model.
        """
        if self.adapters is not None:
            assert pretrain is None, "check_supervised refuses another reference"
            return
        self.finish_param_gather()
        self.memory.wake("reference")  # an earlier one, which goes
        self._reference, self._reference_stays = Reference(dict(self.named_parameters())), stays
        if pretrain is not None:
            source = reference_source(pretrain, self.weights)
            with self._reference.in_place_of(dict(self.named_parameters())):
                self.weights.load(source)
        if not stays:
            self.memory.sleep("reference")

    def drop_reference(self) -> None:
        """Forget the reference model and free its memory."""
        self.memory.wake("reference")
        self._reference = None
        self.memory.sleep("reference")

    @contextlib.contextmanager
    def reference_weights(self) -> Iterator[None]:
        """Compute with the reference model inside the block, where alone it is on the device unless it stays there."""
        if self.adapters is not None:
            with self.adapters.off():
                yield
            return
        assert self._reference is not None, "keep_reference() comes first"
        self.finish_param_gather()
        self.memory.wake("reference")
        try:
            with self._reference.in_place_of(dict(self.named_parameters())):
                yield
        finally:
            if not self._reference_stays:
                self.memory.sleep("reference", changed=False)

    def sleep(self, *parts: Part) -> None:
        """Free the device's memory of these parts, for the other roles; all ranks call it."""
        if self.memory.is_awake("parameters"):
            self.finish_param_gather()
        self.memory.sleep(*parts)
        release_memory()

    def wake(self, *parts: Part) -> None:
        """Undo sleep()."""
        self.memory.wake(*parts)

    def _parts(self) -> dict[Part, Callable[[], Iterable[Tensor]]]:
        """For DeviceMemory. Parameters may be those of the reference, and what is stepped views of parameters."""
        of = weakref.proxy(self)  # memory is the engine's own, and must not keep it

        def parameters() -> Iterator[Tensor]:
            yield from of.parameter_pools()
            for chunk in of.chunks:
                yield from chunk.parameters()
                yield from chunk.buffers()
            if of._reference is not None:
                yield from of._reference.replaced.values()

        return {
            "reference": lambda: [] if of._reference is None else of._reference.tensors.values(),
            "parameters": parameters,
            "gradients": lambda: [buffer.grad_data for buffer in of._ddp_buffers()],
            "optimizer": lambda: optimizer_tensors(of.optimizer),
        }

    def _ddp_buffers(self) -> list[Any]:
        """Megatron-Core's buffers of parameters and gradients, experts' included."""
        chunks = [chunk for chunk in self.model if isinstance(chunk, DistributedDataParallel)]
        return [buffer for chunk in chunks for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]
