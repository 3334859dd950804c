"""Generation with vLLM, and how new weights reach it."""
