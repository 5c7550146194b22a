"""Cases that look inside one rank, each a function that raises; the program prints a line per case.

They run in their own process (`python -m tests.megatron_trainer.one_rank CASE ...`): the CPU shim changes torch.cuda.
"""

from __future__ import annotations

import sys
import tempfile
import traceback
from collections.abc import Callable

import torch

from runner.config.schema import Config, Role
from runner.data import Batch
from runner.errors import UserError
from runner.precision.codec import quantize_dequantize
from runner.routing.routes import RouteError
from runner.trainer.megatron.shares import Division
from runner.trainer.share import steps
from tests.megatron_trainer.configs import megatron_config
from tests.megatron_trainer.scenario import batch

QAT: dict[str, object] = {"format": "int4", "router_replay.trainer": True}


def _worker(**changes: object):  # type: ignore[no-untyped-def]
    from megatron.core import parallel_state

    from runner.trainer.megatron import worker

    cfg = megatron_config(str(changes.pop("model", "moe")), "single", **QAT | changes)
    if not parallel_state.is_initialized():
        worker.initialize(cfg, 0, f"file://{tempfile.mkdtemp()}/rendezvous")
    return worker.Worker(cfg)


def _batch(cfg: Config, seed: int = 0) -> Batch:
    return batch(cfg, seed=seed)


def _share(batch: Batch, worker):  # type: ignore[no-untyped-def]
    """The batch, and how it is divided: this rank computes all of it."""
    (share,) = Division(worker.cfg).divide([len(sample.tokens) for sample in batch.samples])
    return batch, share


def _update(worker, batch: Batch):  # type: ignore[no-untyped-def]
    (mine,) = steps(worker.cfg, batch, Division(worker.cfg).divide)
    return worker.updates(mine)


def _assert_quantized(worker) -> None:  # type: ignore[no-untyped-def]
    """Every weight is bf16(master), and qdq of it where the plan says so."""
    worker.quantization.settle()
    quantized = worker.quantization.quantized
    assert quantized
    for owned in worker.masters.owned:
        plain = owned.tensors()["param"].to(torch.bfloat16)
        expected = torch.zeros(owned.parameter.shape, dtype=torch.bfloat16)
        expected.view(-1)[owned.start : owned.stop] = plain
        if owned.parameter in quantized:
            chosen = quantized[owned.parameter]
            expected, _ = quantize_dequantize(expected, chosen.format, name=chosen.place.name)
            assert not torch.equal(expected.view(-1), plain), "the grid must move some weight"
        assert torch.equal(owned.parameter.data, expected)


def weights_are_quantized_at_every_moment() -> None:
    worker = _worker()
    _assert_quantized(worker)
    _update(worker, _batch(worker.cfg))
    _assert_quantized(worker)
    worker.logprobs(*_share(_batch(worker.cfg), worker), "master", "own")
    _assert_quantized(worker)
    list(worker.export("bf16"))
    _assert_quantized(worker)


def mxfp4_experts_with_biases_are_quantized_at_every_moment() -> None:
    worker = _worker(model="gpt_oss", format="mxfp4")
    names = {chosen.place.name.rpartition(".")[2] for chosen in worker.quantization.quantized.values()}
    assert names == {"weight"}, names
    _assert_quantized(worker)
    _update(worker, _batch(worker.cfg))
    _assert_quantized(worker)
    packed = {name: part for tensor in worker.export("rollout") for name, part in tensor.parts.items()}
    assert {str(part.dtype) for name, part in packed.items() if ".experts." in name} == {"torch.uint8", "torch.bfloat16"}


def roles_decide_what_is_quantized() -> None:
    worker = _worker(model="dense", **{"precision.roles": [Role.attention, Role.dense_mlp]})
    names = {chosen.place.name.split(".", 3)[-1] for chosen in worker.quantization.quantized.values()}
    attention = {"self_attention.linear_qkv.weight", "self_attention.linear_proj.weight"}
    assert names == attention | {"mlp.linear_fc1.weight", "mlp.linear_fc2.weight"}, names
    _update(worker, _batch(worker.cfg))
    _assert_quantized(worker)


def an_optimizer_that_skips_the_copy_leaves_quantized_weights() -> None:
    """A precision-aware optimizer writes the bf16 weights itself, inside its step, and Megatron's copy returns at once."""
    plain = _worker()
    _update(plain, _batch(plain.cfg))
    worker = _worker()
    for optimizer in worker.masters.optimizers:
        optimizer._copy_main_params_to_model_params = lambda: None
        inner = optimizer.optimizer.step

        def step(inner: Callable[[], None] = inner, optimizer: object = optimizer) -> None:
            inner()
            for owned in worker.masters.owned:
                if owned.optimizer is optimizer:
                    owned.view.copy_(owned.tensors()["param"])

        optimizer.optimizer.step = step
    _update(worker, _batch(worker.cfg))
    _assert_quantized(worker)
    for ours, theirs in zip(worker.masters.owned, plain.masters.owned, strict=True):
        assert torch.equal(ours.tensors()["param"], theirs.tensors()["param"])


def masters_are_never_filled_from_quantized_weights() -> None:
    worker = _worker()
    try:
        worker.optimizer.reload_model_params()
    except RuntimeError as error:
        assert "quantized" in str(error)
    else:
        raise AssertionError("reload_model_params ran")


def a_weight_is_quantized_once_per_step() -> None:
    """Whatever the number of micro-batches and recomputed forwards."""
    from runner.trainer.megatron import qat

    worker = _worker(**{"trainer.recompute": "full", "trainer.max_tokens_per_gpu": 30})
    calls: list[str] = []
    original = qat.quantize_dequantize_

    def counted(weight, tensor_format, *, name):  # type: ignore[no-untyped-def]
        calls.append(name)
        return original(weight, tensor_format, name=name)

    qat.quantize_dequantize_ = counted
    try:
        for seed in range(2):
            _update(worker, _batch(worker.cfg, seed))
        worker.quantization.settle()
    finally:
        qat.quantize_dequantize_ = original
    assert len(_share(_batch(worker.cfg), worker)[1].micro_batches) > 3
    assert len(calls) == 2 * len(worker.quantization.quantized)


def routes_of_a_no_grad_pass_are_forgotten() -> None:
    """RouterReplay queues targets for a backward; a later recomputation must not find an older pass's."""
    worker = _worker(**{"trainer.recompute": "full"})
    worker.logprobs(*_share(_batch(worker.cfg, 1), worker), "quantized", "replayed")
    for _, router in worker.replay.routers:
        replay = router.router_replay
        assert replay.replay_backward_list == [] and replay.target_topk_idx is None and replay.router_replay_action is None
    after_logprobs = _update(worker, _batch(worker.cfg))
    fresh = _update(_worker(**{"trainer.recompute": "full"}), _batch(worker.cfg))
    assert after_logprobs.metrics == fresh.metrics


def recomputation_replays_the_same_routes() -> None:
    """none, selective and full: the same gradient, with routes that the router would not have chosen."""
    norms = []
    for recompute in ("none", "selective", "full"):
        worker = _worker(**{"trainer.recompute": recompute, "trainer.max_tokens_per_gpu": 40})
        metrics = _update(worker, _batch(worker.cfg)).metrics
        assert metrics["router_replay/disagreement"] > 0.3
        norms.append(metrics["train/grad_norm"])
    assert norms[0] == norms[1] == norms[2], norms


def a_router_that_disobeys_is_found() -> None:
    worker = _worker()
    _, router = worker.replay.routers[1]
    router.router_replay.get_replay_topk = lambda scores, topk, *rest: torch.topk(scores, topk)
    try:
        _update(worker, _batch(worker.cfg))
    except RouteError as error:
        assert "differ from the recorded routes" in str(error)
    else:
        raise AssertionError("a disobeying router went unnoticed")


def routes_that_no_recomputation_used_are_found() -> None:
    """The next step's recomputation would take them for its own."""
    worker = _worker(**{"trainer.recompute": "full"})
    _update(worker, _batch(worker.cfg))
    _, router = worker.replay.routers[0]
    assert router.router_replay.replay_backward_list == []
    router.router_replay.replay_backward_list.append(torch.zeros(1, 2, dtype=torch.int64))
    try:
        worker.replay.end_of_step()
    except RouteError as error:
        assert "never used" in str(error) and router.router_replay.replay_backward_list == []
    else:
        raise AssertionError("routes left over went unnoticed")


def logits_never_exist_for_more_than_a_chunk() -> None:
    from runner.trainer.megatron import scores

    fp32 = {"format": "bf16", "precision.base_dtype": "float32"}
    rows: list[int] = []
    original = scores.VocabularySoftmax.__call__

    def seen(self, logits, targets, entropy_grad):  # type: ignore[no-untyped-def]
        rows.append(len(logits))
        return original(self, logits, targets, entropy_grad)

    scores.VocabularySoftmax.__call__ = seen  # type: ignore[method-assign]
    try:
        first = _worker(**fp32)
        whole = first.logprobs(*_share(_batch(first.cfg), first), "quantized", "own")
        most = max(rows)
        rows.clear()
        worker = _worker(**fp32, **{"trainer.logprob_chunk_tokens": 7})
        parts = worker.logprobs(*_share(_batch(worker.cfg), worker), "quantized", "own")
        _update(worker, _batch(worker.cfg))
    finally:
        scores.VocabularySoftmax.__call__ = original  # type: ignore[method-assign]
    assert most > 7 and max(rows) <= 7
    assert all((whole[index] - parts[index]).abs().max() < 1e-5 for index in whole)


def updates_that_are_not_finite_are_skipped_and_named() -> None:
    worker = _worker(**{"trainer.max_nan_steps": 2})
    before = [owned.tensors()["param"].clone() for owned in worker.masters.owned]
    poisoned = _batch(worker.cfg)
    poisoned.advantages[3][:] = float("nan")
    result = _update(worker, poisoned)
    assert result.version == 0 and result.metrics["train/nan_steps"] == 1.0
    assert all(torch.equal(a, owned.tensors()["param"]) for a, owned in zip(before, worker.masters.owned, strict=True))
    _assert_quantized(worker)
    try:
        _update(worker, poisoned)
    except UserError as error:
        assert "decoder.layers" in str(error) and "loss" in str(error)
    else:
        raise AssertionError("two bad updates in a row were accepted")


def reference_logprobs_come_from_full_precision_weights() -> None:
    """After updates the reference is still the first bf16(master), and the policy's own weights are back afterwards."""
    worker = _worker(**{"algorithm.kl_coef": 0.1})
    first = worker.logprobs(*_share(_batch(worker.cfg), worker), "master", "own")
    _update(worker, _batch(worker.cfg, 1))
    policy = worker.logprobs(*_share(_batch(worker.cfg), worker), "quantized", "own")
    reference = worker.reference_logprobs(*_share(_batch(worker.cfg), worker))
    assert all(torch.equal(reference[index], first[index]) for index in first)
    again = worker.logprobs(*_share(_batch(worker.cfg), worker), "quantized", "own")
    assert all(torch.equal(policy[index], again[index]) for index in policy)
    assert any(not torch.equal(policy[index], first[index]) for index in policy)
    assert all(tensor.device.type == "cpu" for tensor in worker.reference)
    _assert_quantized(worker)


CASES: tuple[Callable[[], None], ...] = (
    weights_are_quantized_at_every_moment,
    mxfp4_experts_with_biases_are_quantized_at_every_moment,
    roles_decide_what_is_quantized,
    an_optimizer_that_skips_the_copy_leaves_quantized_weights,
    masters_are_never_filled_from_quantized_weights,
    a_weight_is_quantized_once_per_step,
    routes_of_a_no_grad_pass_are_forgotten,
    recomputation_replays_the_same_routes,
    a_router_that_disobeys_is_found,
    routes_that_no_recomputation_used_are_found,
    logits_never_exist_for_more_than_a_chunk,
    updates_that_are_not_finite_are_skipped_and_named,
    reference_logprobs_come_from_full_precision_weights,
)


def main(chosen: list[str]) -> None:
    for case in CASES:
        if chosen and case.__name__ not in chosen:
            continue
        try:
            case()
        except Exception:
            text = traceback.format_exc().replace("\n", "\\n")
            print(f"{case.__name__} FAILED {text}", flush=True)
        else:
            print(f"{case.__name__} passed", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
