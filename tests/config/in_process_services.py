"""Ray and vLLM, as far as a program talks to them, in this process."""

import contextlib
import importlib.machinery
import sys
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

import megarlhf.rollout
from megarlhf.cluster import launch, ray_processes, workers
from megarlhf.cluster.node_files import NodeLogs
from megarlhf.parallel import device
from megarlhf.rollout import engine as rollout_engine
from tests.config.in_process import Trace, log_prob

NODE = {"Alive": True, "Resources": {"CPU": 8.0}}
SHIFT = 0.01  # vLLM's log-probs are off by as much


class Ref:
    """A Ray reference whose call has been made already."""

    def __init__(self, value: Any) -> None:
        self.value = value


class FakeHandle:
    """A Ray actor that runs here."""

    def __init__(self, trace: Trace, worker: Any) -> None:
        self._trace, self._worker = trace, worker

    def __getattr__(self, name: str) -> Any:
        trace, spec, method = self._trace, self._worker.spec, getattr(self._worker, name)

        def remote(*arguments: Any) -> Ref:
            trace.calls.append((spec.role.name, spec.rank, name))
            before, trace.process = trace.process, (spec.role.name, spec.rank)
            try:
                return Ref(method(*[a.value if isinstance(a, Ref) else a for a in arguments]))
            finally:
                trace.process = before

        return types.SimpleNamespace(remote=remote)


class FakeLLM:
    """vLLM: answers with tokens that follow from the seed and as many as it gives."""

    def __init__(self, trace: Trace, **options: Any) -> None:
        self.options, self._trace = options, trace
        self.parameters: list[Any] = []
        self.prompts: list[list[int]] = []
        self._status: dict[str, Any] = {}
        self.given_weights: list[dict[str, Any]] = []
        self.streams: list[tuple[dict[str, Any], Any]] = []
        self._waiting = 0
        self.llm_engine = types.SimpleNamespace(
            **{"is_sleeping": lambda: False, "engine_core": types.SimpleNamespace(shutdown=lambda: None)},
            **{"add_request": self._add, "step": self._step, "has_unfinished_requests": lambda: self._waiting > 0},
            abort_request=lambda requests, internal: None,
        )

    def _add(self, name: str, prompt: Any, parameters: Any) -> str:
        self.streams.append((prompt, parameters))
        self._waiting = 2
        return name

    def _step(self) -> list[Any]:
        self._waiting -= 1
        return [types.SimpleNamespace(outputs=[types.SimpleNamespace(token_ids=[5])])]

    def generate(self, inputs: Sequence[Any], parameters: Sequence[Any], *, use_tqdm: bool) -> list[Any]:
        self.parameters.append(parameters)
        self.prompts += [each["prompt_token_ids"] for each in inputs]
        return [types.SimpleNamespace(outputs=[self._answer(p)]) for p in parameters]

    def _answer(self, parameters: Any) -> Any:
        learned = self._status.get("version", 0) if parameters.temperature == 0 else 0
        length = min(parameters.max_tokens, 2 + (parameters.seed + learned) % 5)
        tokens = [5 + (parameters.seed // 7 + i) % 9 for i in range(length)]
        reason = "length"
        if length < parameters.max_tokens:
            tokens, reason = [*tokens[:-1], parameters.stop_token_ids[0]], "stop"
        temperature = parameters.temperature or 1.0
        log_probs = types.SimpleNamespace(logprobs=[log_prob(token, temperature) + SHIFT for token in tokens])
        return types.SimpleNamespace(token_ids=tokens, logprobs=log_probs, finish_reason=reason)

    def collective_rpc(self, name: str, args: tuple[Any, ...] = ()) -> list[Any]:
        if name == "take_weights":
            self._status = dict(args[0])
            self.given_weights.append(self._status)
        return [{"weight_status": self._status, "drop_weights": -1}.get(name, [])]

    def reset_prefix_cache(self) -> bool:
        return True

    def sleep(self, *, level: int) -> None: ...

    def wake_up(self, *, tags: list[str]) -> None: ...


def patch_ray(patch: pytest.MonkeyPatch, trace: Trace) -> None:
    """Worker processes that run here, one after the other."""

    def wait(refs: Sequence[Ref], num_returns: int = 1, timeout: float | None = None) -> tuple[list[Ref], list[Ref]]:
        trace.waits.append(timeout)
        return list(refs[:num_returns]), list(refs[num_returns:])

    def remote(kind: Any) -> Any:
        def options(**settings: Any) -> Any:
            trace.given["environment"].append(settings["runtime_env"]["env_vars"])
            return types.SimpleNamespace(remote=lambda spec, store: FakeHandle(trace, kind(spec, store)))

        return types.SimpleNamespace(options=options)

    @contextlib.contextmanager
    def children() -> Iterator[ray_processes.RayProcesses]:
        trace.given["children"].append(True)
        logs = NodeLogs(Path("nowhere"), {}, timeout_seconds=1.0)
        place = PlacementGroupSchedulingStrategy(None)
        yield ray_processes.RayProcesses({0: place}, {}, {}, logs)  # whose calls of Ray come here all the same

    for module, name, value in (
        (launch, "local_processes", children),
        (ray, "init", lambda **options: trace.given["ray.init"].append(options)),
        (ray, "shutdown", lambda: None),
        (ray, "nodes", lambda: [NODE | {"NodeID": f"{n}", "NodeManagerAddress": f"10.0.0.{n}"} for n in range(3)]),
        (ray_processes, "nodes_without_run_directory", lambda *arguments, **options: []),
        (ray, "put", Ref),
        (ray, "get", lambda refs: [ref.value for ref in refs] if isinstance(refs, list) else refs.value),
        (ray, "wait", wait),
        (ray, "kill", lambda handle: None),
        (ray, "remote", remote),
        (ray_processes, "placement_group", lambda bundles, **rest: types.SimpleNamespace(ready=lambda: Ref(True))),
        (ray_processes, "PlacementGroupSchedulingStrategy", lambda **options: None),
        (workers, "redirect_output", lambda path: None),
        (workers, "use_interface", lambda name, address: trace.given["interface"].append(dict(name=name, at=address))),
    ):
        patch.setattr(module, name, value)
    patch.setattr(device, "freeze_garbage_collector", lambda: None)
    patch.setenv("RAY_AUTH_TOKEN", "none")


def patch_vllm(patch: pytest.MonkeyPatch, trace: Trace) -> None:
    """An inference engine that is none."""

    def module(name: str, **attributes: Any) -> Any:
        made = types.ModuleType(name)
        made.__spec__ = importlib.machinery.ModuleSpec(name, None)
        vars(made).update(attributes)
        patch.setitem(sys.modules, name, made)
        return made

    def llm(**options: Any) -> FakeLLM:
        trace.llms.append(FakeLLM(trace, **options))
        return trace.llms[-1]

    def tokenizer(path: Any) -> Any:
        trace.given["engine's tokenizer"].append(str(path))
        return real.from_pretrained(path)

    real = rollout_engine.AutoTokenizer
    patch.setattr(rollout_engine, "AutoTokenizer", types.SimpleNamespace(from_pretrained=tokenizer))
    platform = types.SimpleNamespace(is_sleep_mode_available=lambda: True, is_cpu=lambda: True)
    module("vllm", LLM=llm, SamplingParams=types.SimpleNamespace, TokensPrompt=dict)
    module("vllm.sampling_params", RequestOutputKind=types.SimpleNamespace(DELTA="delta"))
    module("vllm.config", WeightTransferConfig=types.SimpleNamespace)
    module("vllm.platforms", current_platform=platform)
    transfer = module(
        "megarlhf.rollout.weight_transfer",
        **{"register": lambda: None, "BACKEND": "none", "ROUNDS": "megarlhf_rounds_weights"},
        **{"WorkerExtension": type("WorkerExtension", (), {})},
    )
    patch.setattr(megarlhf.rollout, "weight_transfer", transfer, raising=False)
