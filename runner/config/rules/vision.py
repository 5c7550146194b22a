"""Rules of images: who sees them, and whether their tokens fit. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator

from runner.config.choices import Drafting
from runner.config.option import option_of
from runner.config.schema import Config
from runner.errors import UserError
from runner.models import FAMILIES


def seen(cfg: Config) -> Iterator[UserError]:
    """A vision model may read text alone; a text model cannot see."""
    if option_of(cfg.task).shows_images and not cfg.model.vision:
        yield UserError(
            f"task={cfg.task.name} shows images, and {cfg.model.name} has no visual tower",
            key="model",
            fix="model=tiny_vlm, or task=arithmetic",
        )
    family = FAMILIES.get(cfg.model.family)
    if cfg.model.vision and not (family and family.sees):
        yield UserError(
            f"family {cfg.model.family} has no visual tower", key="model.vision", fix="model.vision=false, or model=tiny_vlm"
        )
    if family and family.sees and not cfg.model.vision:
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
    if option_of(cfg.task).shows_images and cfg.speculative.method == Drafting.draft:
        yield UserError(
            "a draft model does not see the images that the answers are about",
            key="speculative",
            fix="speculative=ngram, or speculative=none",
        )


RULES = (seen, tower, drafts)
