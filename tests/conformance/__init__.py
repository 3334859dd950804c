"""Tests against Transformers."""
