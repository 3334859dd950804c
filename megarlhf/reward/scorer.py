"""Rewards for samples, from reward code in processes of its own that may raise, hang or die."""

import logging
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from megarlhf.data.types import Rollout
from megarlhf.reward.pool import LOAD_TIMEOUT_SECONDS, ChunkScores, PoolWorker, TimeLimit, chunks
from megarlhf.reward.process import RewardProcess
from megarlhf.reward.sources import Outcome, SourceResult

logger = logging.getLogger(__name__)

# What reward code can do where it has no namespaces of its own, by the kind of its separation (separation.py).
_NOT_KEPT_FROM = {
    "landlock": "see the names of this run's processes, though not their environment or memory: the system gives it no "
    "namespace of its own",
    "none": "read the environment and memory of this run's processes, as every program of this user can: the system "
    "keeps them apart in no way",
}
# Chunks in a row that a process gives up; then it takes no more of the batch.
MAX_CHUNKS_GIVEN_UP = 2
# A batch may take this many times the limit of a call more than its chunks, for scoring samples one by one.
SINGLE_CALLS = 10


class RewardScorer:
    """Scores samples by a built-in rule or by the user's `reward_func(queries, prompts, labels)`.

    The code runs in separate processes, so that a hang or a crash costs a reward and not the trainer. The processes
    start with `check` and again when they are needed after a loss; state that reward code keeps in memory does not
    survive that, and each process has its own. Of this process's environment they see PASSED_VARIABLES (process.py)
    and what is named, and of other processes nothing where the system allows that (separation.py). `close` ends them,
    as does the end of this process.

    Each process takes the next chunk of a batch as soon as it is free (pool.py).
    """

    def __init__(
        self,
        *,
        function_path: str | None,
        rule: str | None,
        rule_pattern: str | None,
        timeout_seconds: float,
        num_workers: int = 1,
        chunk_size: int = 1024,
        passed_variables: Sequence[str] = (),
        memory_bytes: int | None = None,
        network: bool = False,
    ) -> None:
        """Take settings that config/checks.py has passed; nothing is loaded before `check`.

        Args:
            function_path: Python file that defines `reward_func`; either this or `rule` is given.
            rule: "math", "exact_match" or "format".
            rule_pattern: regular expression of the rule "format".
            timeout_seconds: limit of one call, be it for a chunk or for a sample.
            num_workers: processes side by side.
            chunk_size: samples in one call, at most.
            passed_variables: environment variables that the code sees besides PASSED_VARIABLES.
            memory_bytes, network: what each process may have; see RewardProcess.
        """
        self.name = "function" if rule is None else "rule"
        self.last_failures: list[str] = []  # what went wrong in the last `score`; a sample's entry names its place
        self._source = f"reward_function={function_path}" if rule is None else f"reward_rule={rule}"
        self._timeout_seconds = timeout_seconds
        self._chunk_size = chunk_size
        settings = {"function_path": function_path, "rule": rule, "rule_pattern": rule_pattern}
        processes = [
            RewardProcess(passed_variables, memory_bytes=memory_bytes, network=network) for _ in range(num_workers)
        ]
        self._network = network
        self._workers = [PoolWorker(process, settings, timeout_seconds=timeout_seconds) for process in processes]
        self._has_said_separation = False
        self._limit = TimeLimit(0.0)  # of the last `score`
        weakref.finalize(self, _end, processes)

    def check(self) -> None:
        """Start the processes and load the reward code in each, unless that is done already.

        Raises:
            ValueError: the code cannot be loaded: the file cannot be imported or defines no `reward_func`.
        """
        limit, reasons = TimeLimit(LOAD_TIMEOUT_SECONDS), list[str]()

        def load(worker: PoolWorker) -> None:
            reason = worker.load(limit)
            if reason is not None:
                reasons.append(reason)

        self._in_threads(load, limit)
        if len(reasons) == len(self._workers):
            raise ValueError(f"{self._source} cannot be loaded: {reasons[0]}")
        if reasons:
            raise ValueError(
                f"reward_num_workers={len(self._workers)}: {self._source} cannot be loaded in {len(reasons)} of them: "
                f"{reasons[0]}; set fewer"
            )

    def score(self, rollout: Rollout) -> SourceResult:
        """Reward of each sample, in their order; None where there is no result, whatever the reward code did.

        It takes no longer than LOAD_TIMEOUT_SECONDS, and the limit of a call for each of the chunks that one process
        has to score and SINGLE_CALLS times more.
        """
        self.last_failures, samples = [], rollout.samples
        size = min(self._chunk_size, -(-len(samples) // len(self._workers)))
        parts = list(chunks(samples, size=size, max_size=self._chunk_size))
        turns = -(-len(parts) // len(self._workers))
        limit = self._limit = TimeLimit(LOAD_TIMEOUT_SECONDS + (turns + SINGLE_CALLS) * self._timeout_seconds)
        scores: dict[int, ChunkScores] = {}
        left = iter(enumerate(parts))  # shared: whichever process is free takes the next

        def work(worker: PoolWorker) -> None:
            given_up = 0
            while given_up < MAX_CHUNKS_GIVEN_UP and (taken := next(left, None)) is not None:
                number, chunk = taken
                scores[number] = worker.score(chunk, limit)
                given_up = given_up + 1 if scores[number].given_up else 0

        self._in_threads(work, limit)
        outcomes: list[Outcome] = []
        for number, chunk in enumerate(parts):
            untried = (None, f"not tried after {MAX_CHUNKS_GIVEN_UP} chunks in a row in which calls hung or died")
            found = scores.get(number, ChunkScores([untried] * len(chunk), None, False))
            if found.failure is not None:
                first, last = len(outcomes), len(outcomes) + len(chunk) - 1
                self.last_failures.append(f"samples {first} to {last} in one call: {found.failure}")
            outcomes += found.outcomes
        if self.last_failures:
            said = len(self.last_failures), len(parts), self.last_failures[0]
            logger.warning("%d of %d calls failed, whose samples were scored one by one; %s", *said)
        self.last_failures += [f"sample {i}: {reason}" for i, (_, reason) in enumerate(outcomes) if reason is not None]
        return SourceResult(outcomes=outcomes)

    def close(self) -> None:
        """End the processes and what they started, also under a `score` of another thread. Scoring starts others."""
        self._limit.stop()
        _end([worker.process for worker in self._workers])

    def _in_threads(self, function: Callable[[PoolWorker], None], limit: TimeLimit) -> None:
        """Run the function for each process in a thread of its own; an interruption of this thread ends them all."""
        with ThreadPoolExecutor(len(self._workers)) as pool:
            try:
                for future in [pool.submit(function, worker) for worker in self._workers]:
                    future.result()
            except BaseException:
                limit.stop()
                for worker in self._workers:
                    worker.process.interrupt()
                raise
        said = next((worker.separation for worker in self._workers if worker.separation is not None), None)
        if said is not None and not self._has_said_separation:
            self._has_said_separation = True
            if said.kind != "namespaces":
                text = "reward code can %s (%s); see docs/security.md"
                logger.warning(text, _NOT_KEPT_FROM[said.kind], said.reason)
            if said.network != "none" and not self._network:
                which = "the network" if said.network == "open" else "the network without TCP"
                logger.warning("reward code can use %s, which it is not given; see docs/security.md", which)


def _end(processes: Sequence[RewardProcess]) -> None:
    for process in processes:
        process.kill()
