"""What one GPU computes, against the CPU: `make test-gpu`. Needs torch, Megatron-Core and Transformers alone."""
