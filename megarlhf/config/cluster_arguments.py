"""Options of where the roles run, and how long that may take."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class EngineArguments:
    """The inference engines, and how long processes may take."""

    vllm_num_engines: int = 1
    """vLLM engines that generate side by side."""
    vllm_tensor_parallel_size: int = 1
    """Devices that share one vLLM engine."""
    start_timeout_seconds: float = 300.0
    """Seconds for all workers to be up and their models loaded."""
    phase_timeout_seconds: float = 1800.0
    """Seconds for one phase of a step (rollout, training, sync, evaluation or save) before the run stops."""


@dataclass(frozen=True, kw_only=True)
class ClusterArguments(EngineArguments):
    """Where the roles run. The reference model lives inside the actor's processes."""

    max_restarts: int = 0
    """How often a run whose worker died, raised or hung starts its workers again and goes on from the last checkpoint,
    to the same result; after that it stops. As often an inference engine that is lost while it generates is replaced
    by another, which answers its prompts again."""
    actor_num_nodes: int = 1
    """Nodes the actor is trained on. More than 1 needs a Ray cluster (ray_address) and directories that they share."""
    actor_num_gpus_per_node: int = 1
    """Actor ranks on each node: one GPU each, or one process each on a machine without GPUs."""
    critic_num_nodes: int | None = None
    """Nodes the critic is trained on (gae only). None: as many as the actor."""
    critic_num_gpus_per_node: int | None = None
    """Critic ranks on each node (gae only). None: as many as the actor."""
    reward_num_nodes: int | None = None
    """Nodes each reward model is on. None: as many as the actor."""
    reward_num_gpus_per_node: int | None = None
    """Ranks of each reward model on each node. None: as many as the actor."""
    colocate_all_models: bool = True
    """Let all roles take turns on the same devices. Off: actor, critic, each reward model and vLLM engines have their
    own."""
    ref_reward_offload: bool = True
    """Have the reference, and reward models that share devices, there only while they compute. Off: they stay on the
    devices, which saves copies from the host's memory."""
    weight_transport: Literal["auto", "shared_memory", "ipc", "broadcast"] = "auto"
    """How new weights reach the engines: read in the host's shared memory; gathered by the actor's ranks on GPUs that
    they share with the engines, which read them there (CUDA IPC); or sent by the actor's ranks to every engine over
    NCCL (Gloo without GPUs). auto: as devices and nodes are; --dry-run says which."""
    update_weight_buffer_mib: int = 512
    """Largest part of the weights, in MiB, that is gathered or broadcast at once. There are two of them on either side
    of a broadcast, and two on a GPU that is shared."""
    gpu_memory_gib: float | None = None
    """Memory of each GPU in GiB, which the plan's bytes must fit into. None: this machine's GPUs tell; without any, the
    plan is printed and compared with nothing."""
    host_memory_gib: float | None = None
    """Memory of each node's host in GiB, for what sleeps and what is stepped there. None: this machine's, where it has
    the GPUs; else it is printed and compared with nothing."""
    ray: bool | None = None
    """Run the workers in Ray. Off: as child processes of the run, on this machine. None: on, but as in OpenRLHF off for
    `python -m megarlhf.cli.train_ppo`."""
    ray_address: str | None = None
    """Address of a running Ray cluster to join, whose token is in RAY_AUTH_TOKEN. None: start one on this machine."""
    network_interface: str | None = None
    """Interface over which ranks and engines on several nodes speak (Gloo, NCCL, and where they meet), such as eth0.
    None: GLOO_SOCKET_IFNAME, or the one with the node's address in Ray. On one node it is the loopback interface."""
