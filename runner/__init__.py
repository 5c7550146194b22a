"""runner: low-precision reinforcement learning of language models, declared in YAML."""

__version__ = "0.1.0"
PROGRAM = "python -m runner"  # what a user types; messages and help begin their commands with it
