"""Weight updates that are verified, inside the server.

The client asks through SGLang's own endpoint /update_weights_from_ipc, whose body is a plain dictionary of strings: the
key "runner" holds our request as JSON. Tensors come by the transport that it names (weights/transports); nothing is ever
unpickled. SGLang's update session (begin and end) is opened and closed by the client around `load`.

    load       check the digest of every part on arrival, then hand all of them to the model's own loader
    check      residency: what is resident is what was received (residency.py)
    describe   which on-disk weights this engine computes with in which format
    commit     nothing; the call carries the new version and flushes the caches

SGLang hands every request to the target model and then to each draft model that has weights of its own. `draft` names the parts
of the policy's export that belong to the draft (its multi-token-prediction layers): the target leaves those out, the draft takes
only those. Without such parts a draft is left as it started.

Answers are JSON too: {"problems": [...], ...}.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import torch
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from runner.rollout.sglang.plugin import residency
from runner.weights.stream import digest
from runner.weights.transports import TRANSPORTS, Rank

Answer = dict[str, Any]
NamedTensors = Iterator[tuple[str, torch.Tensor]]
_last: Answer = {}  # the target's answer, which the draft's is added to


def register() -> None:
    HookRegistry.register(
        "sglang.srt.model_executor.model_runner_components.weight_updater.WeightUpdater.update_weights_from_ipc",
        _update_weights_from_ipc,
        HookType.AROUND,
    )


def _update_weights_from_ipc(original: Any, self: Any, recv_req: Any) -> tuple[bool, str]:
    """The last answer of a request is the one that SGLang sends; a target that reports problems is the last."""
    global _last
    if "runner" not in recv_req.zmq_handles:
        return original(self, recv_req)
    request = json.loads(recv_req.zmq_handles["runner"])
    is_draft = self.get_model_runner().is_draft_worker
    if is_draft and not request.get("draft"):
        return True, json.dumps(_last)
    try:
        with torch.no_grad():
            answer = ACTIONS[request["action"]](self, {**request, "is_draft": is_draft})
    except Exception as error:  # SGLang would take the whole server down
        answer = {"problems": [f"{request['action']}: {type(error).__name__}: {error}"]}
    answer = _of_all_ranks(answer)
    _last = _together(_last, answer) if is_draft else answer
    return not _last["problems"], json.dumps(_last)


def _together(target: Answer, draft: Answer) -> Answer:
    problems = [*target["problems"], *(f"draft: {problem}" for problem in draft["problems"])]
    together = {**target, "problems": problems}
    for key in ("arrived", "checked"):
        if key in target:
            together[key] = target[key] + draft.get(key, 0)
    return together


def _of_all_ranks(answer: Answer) -> Answer:
    """Only the first rank of an engine answers the client: it must know what the others found, and what all hold together."""
    from sglang.srt.runtime_context import get_parallel

    answers: list[Any] = [answer]
    if get_parallel().tp_size > 1:
        answers = [None] * get_parallel().tp_size
        torch.distributed.all_gather_object(answers, answer, group=get_parallel().tp_group.cpu_group)
    ranked = len(answers) > 1
    problems = [f"rank {rank}: {text}" if ranked else text for rank, each in enumerate(answers) for text in each["problems"]]
    problems += residency.of_all_ranks([each["held"] for each in answers if "held" in each])
    together = {key: value for key, value in answer.items() if key != "held"} | {"problems": problems}
    if "formats" in answer:  # with expert parallelism every rank has experts of its own
        together["formats"] = {name: form for each in answers for name, form in each["formats"].items()}
    return together


def _load(updater: Any, request: Answer) -> Answer:
    arrived = _arriving(updater, request)
    problems: list[str] = []
    digests = {name: value for name, value in request["digests"].items() if _is_ours(name, request)}
    expecting = len(digests)

    def checked() -> NamedTensors:
        for name, tensor in arrived:
            expected = digests.pop(name, None)
            if expected is None:
                problems.append(f"{name}: arrived without a hash, or twice")
            elif (found := digest(tensor)) != expected:
                problems.append(f"{name}: bytes differ from what the trainer sent (hash {found}, expected {expected})")
            else:
                yield name, tensor

    updater.get_model().load_weights(checked())
    problems += [f"{name}: did not arrive" for name in digests]
    return {"problems": problems, "arrived": expecting - len(digests)}


def _is_ours(name: str, request: Answer) -> bool:
    """Whether a part belongs to the model that is asked: target or draft."""
    return bool((name in request.get("draft", [])) == request["is_draft"])


def _arriving(updater: Any, request: Answer, only: set[str] | None = None) -> NamedTensors:
    """This model's tensors of a request, by the transport that it names."""
    from sglang.srt.runtime_context import get_parallel, get_server_args

    def wanted(name: str) -> bool:
        return _is_ours(name, request) and (only is None or name in only)

    parallel = get_parallel()
    group = parallel.tp_group.device_group if parallel.tp_size > 1 else None
    rank = Rank(get_server_args().host, torch.device(updater.device), parallel.tp_rank, group, request["is_draft"])
    yield from TRANSPORTS[request["transport"]].receive(request["offer"], rank, wanted)


def _check(updater: Any, request: Answer) -> Answer:
    """Residency of `parts` (names of on-disk tensors), of which `repacked` do not lie as they were loaded: see residency.py."""
    wanted = {name for name in request["parts"] if _is_ours(name, request)}
    tensors = list(_arriving(updater, request, wanted))
    again = {residency.layer_of(name) for name in wanted & set(request["repacked"])}
    problems, held = residency.check(updater.get_model(), [item for item in tensors if residency.layer_of(item[0]) not in again])
    for layer in sorted(again):
        of_layer = [item for item in tensors if residency.layer_of(item[0]) == layer]
        problems += residency.check_repacked(updater.get_model(), layer, of_layer, torch.device(updater.device))
    return {"problems": problems, "held": held, "checked": len(tensors)}


def _commit(updater: Any, request: Answer) -> Answer:
    return {"problems": []}


def _describe(updater: Any, request: Answer) -> Answer:
    """Formats by on-disk weight name, of quantized weights only, and the engine's own facts."""
    from sglang.srt.runtime_context import get_exec

    model = updater.get_model()
    formats: dict[str, str] = {}
    for name, module in model.named_modules():
        if found := _format_of(module):
            formats |= dict.fromkeys(_disk_names(name, module), found)
    backend = get_exec().kernel.attention_backend
    return {"problems": [], "formats": formats, "attention_backend": backend, "device": str(updater.device)}


def _format_of(module: Any) -> str | None:
    own = dict(module.named_parameters(recurse=False))
    if "weight_packed" in own or "w13_weight_packed" in own:
        return "int4"
    for key in ("weight", "w13_weight"):
        if key in own and own[key].dtype == torch.float8_e4m3fn:
            return "fp8"
    return None


FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "fused_qkv_a_proj_with_mqa": ("q_a_proj", "kv_a_proj_with_mqa"),
}


def _disk_names(name: str, module: Any) -> list[str]:
    """On-disk weight names of one of SGLang's modules, which stack projections and the experts of their rank."""
    own = dict(module.named_parameters(recurse=False))
    if any(key.startswith("w13_weight") for key in own):
        count = next(iter(own.values())).shape[0]
        first = getattr(module, "moe_ep_rank", 0) * count
        experts = range(first, first + count)
        return [f"{name}.{expert}.{piece}.weight" for expert in experts for piece in ("gate_proj", "up_proj", "down_proj")]
    head, _, last = name.rpartition(".")
    return [f"{head}.{piece}.weight" for piece in FUSED.get(last, (last,))]


ACTIONS = {"load": _load, "check": _check, "describe": _describe, "commit": _commit}
