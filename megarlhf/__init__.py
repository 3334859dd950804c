"""RLHF and the classic alignment suite on Megatron-Core, vLLM and Ray."""

__version__ = "0.1.0"
