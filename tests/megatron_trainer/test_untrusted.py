"""A Megatron checkpoint that somebody planted code in: never executed, whichever way it is opened."""

from __future__ import annotations

import io
import json
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from runner.errors import UserError
from runner.run import export
from runner.trainer.megatron import MegatronTrainer, driver, untrusted
from runner.trainer.megatron.driver import initial_folder
from tests.megatron_trainer.configs import megatron_config
from tests.megatron_trainer.scenario import batch, megatron

pytestmark = pytest.mark.megatron


class Payload:
    """Unpickling this leaves a file."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return Path.touch, (self.trace,)


@pytest.fixture(scope="module")
def trainer() -> Iterator[MegatronTrainer]:
    with megatron(megatron_config("dense", "single")) as trainer:
        trainer.step(batch(trainer.cfg))
        yield trainer


@pytest.fixture(scope="module")
def saved(trainer: MegatronTrainer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "trainer"
    folder.mkdir()
    trainer.save(folder)
    return folder


def table_as_payload(model: Path, trace: Path) -> None:
    (model / ".metadata").write_bytes(pickle.dumps(Payload(trace)))


def payload_inside_the_table(model: Path, trace: Path) -> None:
    edit(model, lambda metadata: setattr(metadata, "planner_data", Payload(trace)))


def tensor_as_object(model: Path, trace: Path) -> None:
    """torch unpickles what the table calls an object, wherever a tensor was asked for."""
    buffer = io.BytesIO()
    torch.save(Payload(trace), buffer)

    def change(metadata: Any) -> None:
        name = next(iter(metadata.state_dict_metadata))
        metadata.state_dict_metadata[name] = BytesStorageMetadata()
        index = next(index for index in metadata.storage_data if index.fqn == name)
        place = metadata.storage_data.pop(index)
        for other in [other for other in metadata.storage_data if other.fqn == name]:
            del metadata.storage_data[other]
        place.offset, place.length = 0, len(buffer.getvalue())
        place.relative_path = "__9_0.distcp"
        metadata.storage_data[type(index)(name)] = place

    (model / "__9_0.distcp").write_bytes(buffer.getvalue())
    edit(model, change)


def payload_in_common(model: Path, trace: Path) -> None:
    torch.save({"content": Payload(trace)}, model / "common.pt")


def files_elsewhere(model: Path, trace: Path) -> None:
    def change(metadata: Any) -> None:
        for place in metadata.storage_data.values():
            place.relative_path = f"../../{place.relative_path}"

    edit(model, change)


def another_backend(model: Path, trace: Path) -> None:
    (model / "metadata.json").write_text(json.dumps(untrusted.BACKENDS | {"sharded_backend": "zarr"}))


def edit(model: Path, change: Callable[[Any], object]) -> None:
    metadata = pickle.loads((model / ".metadata").read_bytes())
    change(metadata)
    (model / ".metadata").write_bytes(pickle.dumps(metadata))


PLANTS = [table_as_payload, payload_inside_the_table, tensor_as_object, payload_in_common, files_elsewhere, another_backend]


@pytest.fixture(params=PLANTS, ids=[plant.__name__ for plant in PLANTS])
def planted(request: pytest.FixtureRequest, saved: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy of a good checkpoint with something in it that must not be read."""
    folder, trace = tmp_path / "step_000001" / "trainer", tmp_path / "trace"
    shutil.copytree(saved, folder)
    request.param(folder / "model", trace)
    yield folder
    assert not trace.exists(), "code of the checkpoint ran"


def refused(opened: Callable[[], object]) -> None:
    with pytest.raises(UserError, match="is not a table that this program writes") as caught:
        opened()
    assert "made to run code" in str(caught.value.fix)


def test_resume_and_initial_checkpoint_refuse_it(planted: Path, trainer: MegatronTrainer) -> None:
    refused(lambda: trainer.load(planted))
    refused(lambda: initial_folder(str(planted)))
    cfg = megatron_config("dense", "single", **{"trainer.initial_checkpoint": str(planted.parent)})
    refused(lambda: MegatronTrainer(cfg))


@pytest.mark.parametrize("plant", [table_as_payload, tensor_as_object])
@pytest.mark.parametrize("way", ["load", "start_from", "export"])
def test_ranks_refuse_it_by_themselves(
    plant: Callable[[Path, Path], None], way: str, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the driver has looked at before."""
    shutil.copytree(saved, tmp_path / "trainer")
    plant(tmp_path / "trainer" / "model", tmp_path / "trace")
    monkeypatch.setattr(driver, "_check", lambda folder: None)
    cfg = megatron_config("dense", "single")
    if way == "export":
        refused(lambda: list(export._weights(cfg, tmp_path / "trainer")))
    else:
        with megatron(cfg) as trainer:
            refused(lambda: trainer.ranks.call(way, tmp_path / "trainer"))
    assert not (tmp_path / "trace").exists()


def test_the_payloads_do_run_where_nothing_guards(saved: Path, tmp_path: Path) -> None:
    """Otherwise the test above could not fail."""
    for plant, read in (
        (table_as_payload, lambda model: pickle.loads((model / ".metadata").read_bytes())),
        (payload_inside_the_table, lambda model: pickle.loads((model / ".metadata").read_bytes())),
        (tensor_as_object, lambda model: torch.load(model / "__9_0.distcp", weights_only=False)),
        (payload_in_common, lambda model: torch.load(model / "common.pt", weights_only=False)),
    ):
        model, trace = tmp_path / plant.__name__, tmp_path / f"{plant.__name__}_ran"
        shutil.copytree(saved / "model", model)
        plant(model, trace)
        read(model)
        assert trace.exists(), plant.__name__


def test_a_good_checkpoint_loads(saved: Path, trainer: MegatronTrainer) -> None:
    untrusted.check(saved / "model")
    trainer.load(saved)
    assert initial_folder(str(saved)) == saved.resolve()


@pytest.mark.parametrize("keep", [0, 1, 100])
def test_a_damaged_table_is_refused_in_words(saved: Path, tmp_path: Path, keep: int) -> None:
    shutil.copytree(saved / "model", tmp_path / "model")
    table = tmp_path / "model" / ".metadata"
    table.write_bytes(table.read_bytes()[:keep])
    with pytest.raises(UserError, match="is not a table"):
        untrusted.check(tmp_path / "model")
