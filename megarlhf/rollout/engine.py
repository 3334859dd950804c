"""Generation with vLLM: one engine, and the weights that it holds."""

import hashlib
import os
import time
from collections.abc import Generator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from megarlhf.config.roles import EnginePart
from megarlhf.data.types import GeneratedGroup, GroupTokens, TokenIds
from megarlhf.formats.buckets import Bucket
from megarlhf.formats.huggingface import read_checkpoint
from megarlhf.formats.shared_memory import SharedBlock
from megarlhf.parallel.memory_handles import MemoryHandle
from megarlhf.parallel.weight_group import LostMemberError, Place
from megarlhf.rollout.platform import engine_environment, platform_options


def request_seed(run_seed: int, step: int, place: int, sample_id: int) -> int:
    """Seed of one response, 63 bits: the same in every process, engine and batch, whatever else is generated beside it.

    Args:
        step: training step, so that a prompt which comes again is answered anew.
        place: of the prompt in the step's batch, not in the data: a prompt that a batch holds twice is answered twice.
    """
    key = f"{run_seed}/{step}/{place}/{sample_id}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 1


def response_texts(
    tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int], *, stopped: bool, skip_special_tokens: bool
) -> tuple[str, str]:
    """Text of a response and, where special tokens are in it, the stop token at its end.

    Args:
        token_ids: of the response, the stop token included.
        stopped: whether the last token is a stop token.
    """
    ids = list(token_ids)
    text = str(tokenizer.decode(ids, skip_special_tokens=skip_special_tokens))
    if skip_special_tokens or not stopped:
        return text, ""
    before = str(tokenizer.decode(ids[:-1], skip_special_tokens=False))
    return text, text[len(before) :] if text.startswith(before) else ""


class RolloutEngine:
    """A policy that answers prompts, and takes new weights from the trainer's ranks.

    The process should have been started with `engine_environment`; what is missing is set here, as far as it still
    takes effect.
    """

    def __init__(
        self,
        model_dir: str | os.PathLike[str],
        *,
        dtype: Literal["float32", "bfloat16"],
        quantization: Literal["fp8_per_tensor", "fp8_per_block"] | None = None,
        seed: int,
        max_model_len: int,
        tensor_parallel_size: int = 1,
        max_num_seqs: int = 256,
        enforce_eager: bool = True,
        gpu_memory_utilization: float = 0.5,
        kv_cache_gib: float = 1.0,
        threads: int | None = None,
        tokenizer_dir: str | os.PathLike[str] | None = None,
        skip_special_tokens: bool = True,
        passed: Mapping[str, Any] | None = None,
    ) -> None:
        """Load the model. What is not said here means what it means in vLLM.

        Args:
            quantization: of linear layers, made from each update's weights; on a CPU, which has no such kernels, their
                weights are rounded to FP8 and activations stay as they are.
            seed: of vLLM itself; sampled tokens depend on the seeds of `generate` alone.
            max_model_len: longest prompt and response together, in tokens.
            kv_cache_gib: KV cache on a CPU, in GiB a rank.
            threads: of the whole engine; None for all cores that the process may use.
            tokenizer_dir: None for `model_dir`.
            skip_special_tokens: leave special tokens out of the text of responses.
            passed: further options of vLLM's EngineArgs (config/refused_options.py has those that may not be here).
        Raises:
            ValueError: the model knows fewer positions than max_model_len.
        """
        config, _ = read_checkpoint(Path(model_dir), option="model_dir")
        known = config.max_position_embeddings
        if max_model_len > known:  # vLLM's own error cannot be pickled, so Ray would lose it
            raise ValueError(
                f"max_model_len={max_model_len} is more than max_position_embeddings={known} of {model_dir} (the model "
                "knows no later positions): set prompt_max_len and generate_max_len to a smaller sum"
            )
        threads = threads or len(os.sched_getaffinity(0))
        for name, value in engine_environment(threads=threads, tensor_parallel_size=tensor_parallel_size).items():
            os.environ.setdefault(name, value)
        torch.set_num_threads(threads // tensor_parallel_size)  # vLLM's CPU worker forbids it afterwards

        from vllm import LLM
        from vllm.config import WeightTransferConfig
        from vllm.platforms import current_platform

        from megarlhf.rollout import weight_transfer

        self.max_model_len, self.weight_version = max_model_len, 0
        self._workers_apart = tensor_parallel_size > 1  # from this process
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir or model_dir)
        self._texts = partial(response_texts, tokenizer, skip_special_tokens=skip_special_tokens)
        self._llm = LLM(
            model=str(model_dir),
            hf_overrides={"tie_word_embeddings": bool(config.tie_word_embeddings)},  # as the weights say
            skip_tokenizer_init=True,  # prompts come as tokens and responses are decoded here
            generation_config="vllm",  # sampling and stop tokens are those of `generate`, not of generation_config.json
            dtype=dtype,
            seed=seed,
            max_model_len=max_model_len,
            tensor_parallel_size=tensor_parallel_size,
            distributed_executor_backend="mp" if self._workers_apart else "uni",
            max_num_seqs=max_num_seqs,
            enforce_eager=enforce_eager,
            gpu_memory_utilization=gpu_memory_utilization,
            enable_prefix_caching=True,  # the samples of a prompt share its computation
            enable_sleep_mode=current_platform.is_sleep_mode_available(),  # a CPU refuses it, and sleeps without effect
            logprobs_mode="processed_logprobs",  # of the distribution sampled from: after temperature, top-k and top-p
            weight_transfer_config=WeightTransferConfig(backend=weight_transfer.BACKEND),
            worker_extension_cls=f"{weight_transfer.__name__}.{weight_transfer.WorkerExtension.__name__}",
            **platform_options(passed or {}, quantization, kv_cache_gib),
        )

    def generate(
        self,
        prompts: Sequence[TokenIds],
        *,
        group_ids: Sequence[int],
        n_samples: int,
        max_tokens: int,
        temperature: float,
        stop_token_ids: Sequence[int],
        run_seed: int,
        step: int,
        greedy: bool = False,
        top_p: float = 1.0,
        top_k: int = -1,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
    ) -> list[GeneratedGroup]:
        """Answer each prompt `n_samples` times, whatever has been answered before: with an empty prefix cache.

        Args:
            prompts: at least one token each.
            group_ids: one per prompt: its place in the step's batch over all engines.
            max_tokens: longest response, the stop token included.
            temperature: above 0; ignored when greedy.
            stop_token_ids: a response ends with the first of these tokens; no others stop it.
            run_seed, step: with the group and the sample's number they seed each response.
            top_p, top_k, min_p: of the sampled distribution; 1.0, -1 and 0.0 leave it whole.
            repetition_penalty: of tokens that are there already, for greedy too; 1.0: none.
        Returns:
            The samples of each prompt. The log-probs are of the distribution sampled from (for greedy: of the model's
            own).
        Raises:
            ValueError: a prompt that leaves no room for max_tokens, or a temperature of 0 without `greedy`.
        """
        from vllm import SamplingParams, TokensPrompt

        if not greedy and temperature <= 0:
            raise ValueError(f"temperature={temperature} is not above 0 (logits are divided by it): use greedy=True")
        longest = max(map(len, prompts), default=0)
        if longest + max_tokens > self.max_model_len:
            raise ValueError(
                f"max_tokens={max_tokens} with a prompt of {longest} tokens is more than max_model_len="
                f"{self.max_model_len}: drop longer prompts, or set generate_max_len lower"
            )
        if self._llm.llm_engine.is_sleeping():
            raise RuntimeError("the engine sleeps, or a part of it: wake it before generating")
        if self.weight_version < 0:
            raise RuntimeError("the weights are dropped, or their last update failed halfway: update them first")
        self._forget_prefixes()
        parameters = [
            SamplingParams(
                temperature=0.0 if greedy else temperature,
                top_p=1.0 if greedy else top_p,
                top_k=-1 if greedy else top_k,
                min_p=0.0 if greedy else min_p,
                repetition_penalty=repetition_penalty,
                max_tokens=max_tokens,
                seed=request_seed(run_seed, step, group_id, sample_id),
                stop_token_ids=list(stop_token_ids),
                ignore_eos=True,  # else vLLM adds the model configuration's end token to them
                logprobs=0,  # of the sampled token alone
                flat_logprobs=True,  # one list for a response, not an object for each token
                detokenize=False,
            )
            for _, group_id in zip(prompts, group_ids, strict=True)
            for sample_id in range(n_samples)
        ]
        inputs = [TokensPrompt(prompt_token_ids=prompt.tolist()) for prompt in prompts for _ in range(n_samples)]
        completions = [output.outputs[0] for output in self._llm.generate(inputs, parameters, use_tqdm=False)]
        return [
            self._group(prompt, completions[place * n_samples : (place + 1) * n_samples])
            for place, prompt in enumerate(prompts)
        ]

    def stream(
        self,
        prompt: TokenIds,
        *,
        max_tokens: int,
        temperature: float,
        stop_token_ids: Sequence[int],
        seed: int,
        greedy: bool = False,
        top_p: float = 1.0,
        repetition_penalty: float = 1.0,
    ) -> Generator[int, None, None]:
        """The tokens of one answer as they are generated, a stop token included; arguments as of `generate`.

        Nothing else is generated meanwhile. Closing the iterator stops the answer.
        """
        from vllm import SamplingParams, TokensPrompt
        from vllm.sampling_params import RequestOutputKind

        engine = self._llm.llm_engine
        parameters = SamplingParams(
            temperature=0.0 if greedy else temperature,
            top_p=1.0 if greedy else top_p,
            repetition_penalty=repetition_penalty,
            max_tokens=max_tokens,
            seed=seed,
            stop_token_ids=list(stop_token_ids),
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        request = engine.add_request("stream", TokensPrompt(prompt_token_ids=prompt.tolist()), parameters)
        try:
            while engine.has_unfinished_requests():
                outputs: list[Any] = engine.step()
                for output in outputs:
                    yield from output.outputs[0].token_ids
        finally:
            engine.abort_request([request], internal=True)  # without effect on one that is finished

    def _group(self, prompt: TokenIds, completions: Sequence[Any]) -> GeneratedGroup:
        """A record of vLLM's CompletionOutputs for one prompt."""
        for completion in completions:
            if completion.finish_reason not in ("stop", "length"):
                raise RuntimeError(f"vLLM ended a response with finish_reason={completion.finish_reason!r}")
        lengths = np.array([len(completion.token_ids) for completion in completions], dtype=np.int64)
        log_probs = [np.array(completion.logprobs.logprobs, dtype=np.float32) for completion in completions]
        if [len(values) for values in log_probs] != lengths.tolist():
            raise RuntimeError("vLLM did not give one log-prob for each generated token")
        texts = [self._texts(c.token_ids, stopped=c.finish_reason == "stop") for c in completions]
        return GeneratedGroup(
            tokens=GroupTokens(
                prompt_ids=prompt,
                response_ids=np.concatenate([np.array(c.token_ids, dtype=np.int32) for c in completions]),
                rollout_log_probs=np.concatenate(log_probs),
                lengths=lengths,
            ),
            lengths=lengths,
            texts=[text for text, _ in texts],
            stop_texts=[stop for _, stop in texts],
            finish_reasons=[completion.finish_reason for completion in completions],
            weight_version=self.weight_version,
        )

    def ignore_interrupts(self) -> None:
        """From now on Ctrl-C ends no worker process; this process decides. vLLM's own handler ends them in a step."""
        if self._workers_apart:
            self._llm.collective_rpc("ignore_interrupts")

    def connect_weights(self, blocks: Sequence[SharedBlock]) -> None:
        """Map the memory in which the trainer's ranks hold the weights, before the first update.

        Args:
            blocks: of every rank (formats/shared_memory.py), tensors with Hugging Face names.
        Raises:
            ValueError: parts that do not make up whole tensors.
        """
        self._ask_all("find_weights", {"blocks": list(blocks)})

    def join_weights(self, buckets: Sequence[Bucket], place: Place, *, by_handle: bool = False) -> None:
        """Meet the trainer's ranks that send the weights, and the other engines, before the first update.

        Args:
            buckets: of all senders (formats/buckets.py).
            place: of the first worker in the group; the senders have the first places.
            by_handle: buckets are not sent, but read in the memory of the sender that has a worker's device.
        Raises:
            LostMemberError: the others did not come in time.
        """
        self._ask_all("find_weights", {"buckets": list(buckets), "place": place, "by_handle": by_handle})

    def update_weights(
        self, version: int, checksum: str = "", handles: Sequence[MemoryHandle] = ()
    ) -> dict[str, Any]:
        """Take the weights as they are now in the trainer's memory, which must not change meanwhile, or as they come.

        Args:
            version: what `weight_version` of later samples will say.
            checksum: over the digests of all blocks, in the order of `connect_weights`; after `join_weights` it comes
                with the weights.
            handles: of each sender's memory for buckets, after `join_weights` by_handle.
        Returns:
            version and checksum as the workers report them, applied ("direct" or "loader", see weight_sources.py),
            and the seconds it took.
        Raises:
            ValueError: wrong checksum; the engine keeps its weights, where it has seen none of the new ones before.
            LostMemberError: the senders are lost; the engine generates nothing before the next update.
            RuntimeError: weights of the model were not sent; likewise.
        """
        start = time.perf_counter()
        self.weight_version = -1  # also where the workers do not answer below
        try:
            self._ask_all("take_weights", {"version": version, "checksum": checksum, "handles": list(handles)})
        finally:
            statuses = self._llm.collective_rpc("weight_status")
            self.weight_version = min(status["version"] for status in statuses)
        wanted = {"version": version, "checksum": checksum or statuses[0]["checksum"]}
        if any(status | wanted != status for status in statuses):
            raise RuntimeError(f"sent weights {wanted} and the engine's workers report {statuses}")
        self._forget_prefixes()
        return {**statuses[0], "seconds": time.perf_counter() - start}

    def _forget_prefixes(self) -> None:
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM kept its prefix cache, of other weights or prompts: were requests running?")

    def _ask_all(self, method: str, argument: dict[str, Any]) -> None:
        """Call a method of all workers, and raise the error of one, before those that others have by it."""
        errors = [error for found in self._llm.collective_rpc(method, args=(argument,)) for error in found]
        for error in sorted(errors, key=lambda error: isinstance(error, LostMemberError)):
            raise error

    def sleep(self, *, keep_weights: bool) -> None:
        """Give the GPU's memory to others; what was computed for past prompts is forgotten.

        vLLM does the same on a CPU, but that its worker frees nothing (v1/worker/cpu_worker.py, `sleep`).

        Args:
            keep_weights: they wait in host memory; else they are dropped, and an update must come before `generate`.
        """
        if not keep_weights:
            self.weight_version = min(self._llm.collective_rpc("drop_weights"))
        self._llm.sleep(level=1 if keep_weights else 2)

    def wake(self, parts: Sequence[EnginePart]) -> None:
        """Take the GPU's memory back for these parts; `update_weights` needs "weights", `generate` both."""
        self._llm.wake_up(tags=list(parts))

    def close(self) -> None:
        """Stop the engine and free its memory; it cannot be used afterwards."""
        self._llm.llm_engine.engine_core.shutdown()
        del self._llm
