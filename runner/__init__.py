"""runner: low-precision reinforcement learning of language models, declared in YAML."""

__version__ = "0.1.0"
