"""Rules of images: who sees them, and whether their tokens fit. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator

from runner.errors import UserError
from runner.models import qwen3_vl
from runner.schema import Config, Geo3kTaskConfig, VisualCountTaskConfig
from runner.tasks import shows_images

MARKS = 2  # start and end of vision around an image's tokens
MOST_COLORS, MOST_SHAPES = 4, 3
SMALLEST_CELL = 7  # pixels that hold a shape of 5 in more than one place


def seen(cfg: Config) -> Iterator[UserError]:
    """A vision model may read text alone; a text model cannot see."""
    if shows_images(cfg.task) and not cfg.model.vision:
        yield UserError(
            f"task={cfg.task.name} shows images, and {cfg.model.name} has no visual tower",
            key="model",
            fix="model=tiny_vlm, or task=arithmetic",
        )
    if cfg.model.vision and cfg.model.family != qwen3_vl.Qwen3VL.name:
        yield UserError(
            f"family {cfg.model.family} has no visual tower", key="model.vision", fix="model.vision=false, or model=tiny_vlm"
        )
    if cfg.model.family == qwen3_vl.Qwen3VL.name and not cfg.model.vision:
        yield UserError(f"family {cfg.model.family} has a visual tower", key="model.vision", fix="model.vision=true")


def tower(cfg: Config) -> Iterator[UserError]:
    """A toy tower has the decoder's width and number of heads; its rotary embedding pairs rows and columns within a head."""
    model = cfg.model
    if model.vision and model.hf_checkpoint is None and model.num_heads > 0 and model.hidden_size % (4 * model.num_heads):
        yield UserError(
            f"{model.num_heads} heads of the visual tower do not divide its width {model.hidden_size} into multiples of 4",
            key="model.hidden_size",
            fix=f"model.hidden_size={-(-model.hidden_size // (4 * model.num_heads)) * 4 * model.num_heads}",
        )


def drafts(cfg: Config) -> Iterator[UserError]:
    """Proposals are verified by the model that sees, so ngram stays lossless; a draft model is given tokens alone."""
    if shows_images(cfg.task) and cfg.speculative.method == "draft":
        yield UserError(
            "a draft model does not see the images that the answers are about",
            key="speculative",
            fix="speculative=ngram, or speculative=none",
        )


def image_tokens(cfg: Config) -> Iterator[UserError]:
    task = cfg.task
    try:
        shape = qwen3_vl.tower(cfg.model)
    except UserError:  # said by rules/checkpoint.py
        return
    side = shape.patch_size * shape.merge
    if isinstance(task, VisualCountTaskConfig) and min(task.grid, task.cell_pixels) > 0:
        tokens = (task.grid * task.cell_pixels // side) ** 2 + MARKS
        if tokens >= task.max_prompt_tokens:
            yield UserError(
                f"an image of {task.grid} x {task.grid} cells is {tokens} tokens, prompts have {task.max_prompt_tokens} at most",
                key="task.grid",
                fix=f"a smaller task.grid, or task.max_prompt_tokens={tokens + 32}",
            )
    if isinstance(task, Geo3kTaskConfig):
        tokens = task.max_image_pixels // side**2 + MARKS
        if tokens >= task.max_prompt_tokens:
            yield UserError(
                f"an image of {task.max_image_pixels} pixels is {tokens} tokens, prompts have {task.max_prompt_tokens} at most",
                key="task.max_image_pixels",
                fix=f"task.max_image_pixels={max(1, task.max_prompt_tokens // 2) * side**2}",
            )
        if not side**2 <= task.min_image_pixels <= task.max_image_pixels:
            yield UserError(
                f"images of {task.min_image_pixels} to {task.max_image_pixels} pixels; one token is {side} x {side}",
                key="task.min_image_pixels",
                fix=f"task.min_image_pixels={min(max(side**2, task.min_image_pixels), max(side**2, task.max_image_pixels))}",
            )


def scenes(cfg: Config) -> Iterator[UserError]:
    task = cfg.task
    if not isinstance(task, VisualCountTaskConfig):
        return
    for key, most in (("colors", MOST_COLORS), ("shapes", MOST_SHAPES)):
        if not 1 <= getattr(task, key) <= most:
            yield UserError(f"{getattr(task, key)} {key} of {most}", key=f"task.{key}", fix=f"task.{key}={most}")
    if task.colors == task.shapes == 1:
        yield UserError("one kind of shape leaves nothing else in the image", key="task.colors", fix="task.colors=2")
    if task.cell_pixels < SMALLEST_CELL:
        yield UserError(f"no shape fits into {task.cell_pixels} pixels", key="task.cell_pixels", fix="task.cell_pixels=8")
    if not 1 <= task.max_count <= max(1, task.grid) ** 2:
        yield UserError(
            f"{task.max_count} shapes in {task.grid} x {task.grid} cells", key="task.max_count", fix=f"task.max_count={task.grid}"
        )
    if not 0 <= task.noise <= 255:
        yield UserError(f"noise of {task.noise} gray levels", key="task.noise", fix="task.noise=10")
    if task.eval_problems < cfg.evaluation.num_prompts:
        yield UserError(
            f"{cfg.evaluation.num_prompts} prompts are evaluated, {task.eval_problems} are held out",
            key="evaluation.num_prompts",
            fix=f"task.eval_problems={cfg.evaluation.num_prompts}",
        )


RULES = (seen, tower, drafts, image_tokens, scenes)
