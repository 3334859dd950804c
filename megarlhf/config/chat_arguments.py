"""Options of `megarlhf chat`, with the defaults of OpenRLHF's interactive_chat."""

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class ChatModelArguments:
    """Which model answers, and where it computes."""

    pretrain: str
    """Local directory of the Hugging Face checkpoint to talk to, such as a run's hf/."""
    bf16: bool = False
    """Compute in bfloat16; fp32 otherwise."""
    max_len: int = 4096
    """Most tokens of a chat, the answer included; oldest turns are left out beyond it. A model that knows fewer
    positions has these."""
    vllm_tensor_parallel_size: int = 1
    """Devices that share the model."""
    vllm_gpu_memory_utilization: float = 0.5
    """Fraction of a GPU's memory for the model and its cache (GPUs only)."""
    vllm_kv_cache_gib: float = 1.0
    """Size of the KV cache in GiB (machines without GPUs only)."""


@dataclass(frozen=True, kw_only=True)
class ChatSamplingArguments:
    """How answers are drawn."""

    greedy_sampling: bool = False
    """Always take the likeliest token."""
    temperature: float = 0.2
    """Sampling temperature."""
    top_p: float = 0.9
    """Sample from the likeliest tokens that together have this probability."""
    repetition_penalty: float = 1.2
    """Above 1 tokens that the chat already holds become less likely."""
    seed: int = 42
    """Seed of sampling."""


@dataclass(frozen=True, kw_only=True)
class ChatTextArguments:
    """How a chat becomes the text that the model continues."""

    apply_chat_template: bool = False
    """Render the chat with the tokenizer's chat template."""
    tokenizer_chat_template: str | None = None
    """Chat template that replaces the tokenizer's own: a Jinja file, or its text."""
    input_template: str | None = None
    """Text around each message, which takes the place of {}. None: "User: {}\\nAssistant: " with real line breaks, or
    the chat template."""
    ta_prompt: str | None = None
    """Text file that comes before the chat, such as a few examples; `clear` leaves it."""
    enable_csft: bool = False
    """Put csft_prompt before each answer, as conditional SFT has trained the model."""
    csft_prompt: str = "<rm_score>: 5.00"
    """The reward to ask for."""


@dataclass(frozen=True, kw_only=True)
class ChatConfig:
    """Talk to a model: `exit` ends, `clear` forgets the chat, Ctrl-C stops an answer."""

    model: ChatModelArguments
    sampling: ChatSamplingArguments = field(default_factory=ChatSamplingArguments)
    text: ChatTextArguments = field(default_factory=ChatTextArguments)
