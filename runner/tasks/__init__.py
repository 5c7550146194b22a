"""Tasks: prompts, reference answers and rewards. A task is `TaskClass(cfg.task, tokenizer)`; see protocol.py.

One whose OPTION says shows_images is `TaskClass(cfg.task, tokenizer, image_processor(cfg.model, tokenizer))`; see
runner/models/images.py.
"""
