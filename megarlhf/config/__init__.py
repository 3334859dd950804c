"""Configuration: dataclasses with their help texts, the command line and YAML, and checks before anything starts."""
