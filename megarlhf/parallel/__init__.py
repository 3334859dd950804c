"""Devices, process groups, vocabulary-parallel operations and attention: what the models are made parallel with.

Importing this package makes `megatron.core` importable on a machine without CUDA (see cpu/megatron_cpu).
"""

from megarlhf.parallel.cpu import megatron_cpu

megatron_cpu.install()
