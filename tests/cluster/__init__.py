"""Tests of whole runs: real Ray, Megatron-Core and vLLM."""
