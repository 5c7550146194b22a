"""Tasks: prompts, reference answers and rewards. A task is `TaskClass(cfg.task, tokenizer)`; see protocol.py."""
