"""Tasks: prompts, reference answers and rewards. A task is `TaskClass(cfg.task, tokenizer)`; see protocol.py.

One that shows images is `TaskClass(cfg.task, tokenizer, image_processor(cfg.model, tokenizer))`; see runner/images.py.
"""

from runner.schema import Geo3kTaskConfig, TaskConfig, VisualCountTaskConfig


def shows_images(task: TaskConfig) -> bool:
    """Whether prompts of this task have an image, so that the model must have a visual tower."""
    return isinstance(task, VisualCountTaskConfig | Geo3kTaskConfig)
