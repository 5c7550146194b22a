"""What a server starts from: config.json with the run's quantization, and no weights (the first sync brings them)."""

from __future__ import annotations

import json
from pathlib import Path

from runner.config.schema import ModelConfig
from runner.models import family_of
from runner.models.agreement import window_problem
from runner.models.build import save_config
from runner.precision.plan import PrecisionPlan


def write_model_folder(model: ModelConfig, plan: PrecisionPlan, folder: Path) -> None:
    """UserError (from the model group) when a checkpoint's config cannot be read.

    End-of-sequence ids are left out here, because a request brings its own: `stop_token_ids` are the union of those that
    tokenizer, generation_config.json and config.json name (runner/models/ends.py), and the server ends a sample at no other.
    """
    folder.mkdir(parents=True, exist_ok=True)
    save_config(model, folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    if model.hf_checkpoint is not None and (error := window_problem(model, family_of(model), config)):
        raise error
    config["eos_token_id"] = None
    config.pop("quantization_config", None)  # of the published checkpoint
    if (quantization := plan.quantization_config()) is not None:
        config["quantization_config"] = quantization
    path.write_text(json.dumps(config, indent=1))
    (folder / "generation_config.json").unlink(missing_ok=True)
