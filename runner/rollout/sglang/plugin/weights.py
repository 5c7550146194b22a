"""Weight updates that are verified, inside the server.

The client asks through SGLang's own endpoint /update_weights_from_ipc, whose body is a plain dictionary of strings: the
key "runner" holds our request as JSON. Tensors come in safetensors files (in shared memory or on a disk), by a broadcast, or are
read out of the driver's memory; nothing is ever unpickled. SGLang's update session (begin and end) is opened and closed by the
client around `load`.

    load       check the digest of every part on arrival, then hand all of them to the model's own loader
    check      residency: load named tensors again and compare bits with what is resident
    describe   which on-disk weights this engine computes with in which format
    commit     nothing; the call carries the new version and flushes the caches

SGLang hands every request to the target model and then to each draft model that has weights of its own. `draft` names the parts
of the policy's export that belong to the draft (its multi-token-prediction layers): the target leaves those out, the draft takes
only those. Without such parts a draft is left as it started.

Answers are JSON too: {"problems": [...], ...}.
"""

from __future__ import annotations

import functools
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from safetensors import safe_open
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from runner.weights import broadcast, buckets, p2p
from runner.weights.stream import digest
from runner.weights.transfer_engine import Endpoint

Answer = dict[str, Any]
NamedTensors = Iterator[tuple[str, torch.Tensor]]
_last: Answer = {}  # the target's answer, which the draft's is added to
_received: list[tuple[str, torch.Tensor]] = []  # the draft's part of a broadcast, which only the target can receive


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
    """Only the first rank of a tensor-parallel engine answers the client: it must know what the others found."""
    from sglang.srt.runtime_context import get_parallel

    if get_parallel().tp_size == 1:
        return answer
    answers: list[Any] = [None] * get_parallel().tp_size
    torch.distributed.all_gather_object(answers, answer, group=get_parallel().tp_group.cpu_group)
    problems = [f"rank {rank}: {problem}" for rank, other in enumerate(answers) for problem in other["problems"]]
    return {**answer, "problems": problems}


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


def _from_files(files: Iterable[str], wanted: Callable[[str], bool]) -> NamedTensors:
    for path in files:
        with safe_open(path, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a dict
                if wanted(name):
                    yield name, opened.get_tensor(name)


def _arriving(updater: Any, request: Answer, only: set[str] | None = None) -> NamedTensors:
    """This model's tensors of a request: from files, by broadcast from the driver, or out of its memory."""

    def wanted(name: str) -> bool:
        return _is_ours(name, request) and (only is None or name in only)

    if "offer" in request:
        yield from _from_memory(updater, request["offer"], wanted)
    elif "meeting" not in request:
        yield from _from_files(request["files"], wanted)
    elif request["is_draft"]:
        yield from (item for item in _received if wanted(item[0]))
    else:
        yield from _from_broadcast(updater, request, wanted)


def _from_broadcast(updater: Any, request: Answer, wanted: Callable[[str], bool]) -> NamedTensors:
    from sglang.srt.runtime_context import get_parallel, get_server_args

    meeting = broadcast.Meeting(**request["meeting"])
    group = broadcast.join(meeting, request["rank"] + get_parallel().tp_rank, get_server_args().host)
    _received.clear()
    for bucket in request["buckets"]:
        pieces = [buckets.Piece(**piece) for piece in bucket]
        for name, tensor in broadcast.receive(group, pieces, torch.device(updater.device)):
            if wanted(name):
                yield name, tensor
            elif not _is_ours(name, request):
                _received.append((name, tensor))


def _from_memory(updater: Any, offer: Answer, wanted: Callable[[str], bool]) -> NamedTensors:
    """Target and draft each read what is theirs."""
    from sglang.srt.runtime_context import get_parallel

    lent = [[p2p.Lent(**piece) for piece in bucket if wanted(piece["name"])] for bucket in offer["buckets"]]
    group = get_parallel().tp_group.device_group if get_parallel().tp_size > 1 else None
    endpoint = _endpoint(offer["protocol"], tuple(offer["devices"]))
    yield from p2p.receive(endpoint, offer["session"], lent, torch.device(updater.device), group)


@functools.cache
def _endpoint(protocol: str, devices: tuple[str, ...]) -> Endpoint:
    from sglang.srt.runtime_context import get_server_args

    return Endpoint(get_server_args().host, protocol, devices)


def _check(updater: Any, request: Answer) -> Answer:
    """Residency of `parts` (names of on-disk tensors), layer by layer.

    Loading a tensor with every bit inverted must change exactly as many resident values as the tensor has, which proves that
    the loader knows the name; loading the tensor itself must then give back the bits that were resident before. Values that
    the engine derived from resident ones (effective weights of the CPU twin) are derived again and compared.
    On CUDA quantized weights lie repacked for their kernel and are not loadable again: they are named in `unchecked`.
    """
    model = updater.get_model()
    wanted = {name for name in request["parts"] if _is_ours(name, request)}
    unchecked = sorted(wanted & set(request["repacked"])) if torch.device(updater.device).type == "cuda" else []
    layers: dict[str, list[tuple[str, torch.Tensor]]] = defaultdict(list)
    for name, tensor in _arriving(updater, request, wanted - set(unchecked)):
        layers[_layer_of(name)].append((name, tensor))
    problems: list[str] = []
    for layer, tensors in layers.items():
        problems += _check_layer(model, layer, tensors)
    return {"problems": problems, "checked": sum(map(len, layers.values())), "unchecked": unchecked}


def _layer_of(name: str) -> str:
    """`model.layers.3.` of `model.layers.3.mlp.up_proj.weight`; "" outside of layers."""
    head, marker, rest = name.partition(".layers.")
    return f"{head}{marker}{rest.partition('.')[0]}." if marker else ""


def _check_layer(model: Any, layer: str, tensors: list[tuple[str, torch.Tensor]]) -> list[str]:
    resident = {name: parameter for name, parameter in _tensors_of(model) if _layer_of(name) == layer}
    problems = []
    before = {name: parameter.detach().clone() for name, parameter in resident.items()}
    for pieces in _loadable_alone(tensors):
        model.load_weights((name, _inverted(tensor)) for name, tensor in pieces)
        written = sum(_values_that_differ(resident[name], before[name]) for name in resident)
        model.load_weights(iter(pieces))
        names = " + ".join(name for name, _ in pieces)
        expected = sum(tensor.numel() for _, tensor in pieces)
        if written != expected:
            problems.append(f"{names}: has {expected} values, but {written} resident values follow it")
        wrong = [name for name in resident if _values_that_differ(resident[name], before[name])]
        if wrong:
            problems.append(f"{names}: resident {', '.join(wrong)} differ from what was received")
            for name in wrong:
                before[name] = resident[name].detach().clone()
    for name, module in model.named_modules():
        if hasattr(module, "derive_effective") and _layer_of(name + ".") == layer:
            again = module.derive_effective()
            wrong = [key for key in again if _values_that_differ(module.effective[key], again[key])]
            problems += [f"{name}: resident effective {key} differs from resident integers and scales" for key in wrong]
    return problems


def _tensors_of(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _loadable_alone(tensors: list[tuple[str, torch.Tensor]]) -> list[list[tuple[str, torch.Tensor]]]:
    """DeepSeek's loader fuses the two low-rank projections and waits for both: they go together."""
    fused = [item for item in tensors if ".q_a_proj." in item[0] or ".kv_a_proj_with_mqa." in item[0]]
    alone = [[item] for item in tensors if item not in fused]
    return [*alone, fused] if fused else alone


def _inverted(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.contiguous().reshape(-1)
    return torch.bitwise_not(flat.view(torch.uint8)).view(flat.dtype).reshape(tensor.shape)


def _values_that_differ(a: torch.Tensor, b: torch.Tensor) -> int:
    """Compares bits, so that NaN equals itself and -0.0 is not 0.0."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return max(a.numel(), b.numel())
    width = a.element_size()
    bytes_a, bytes_b = (t.detach().contiguous().reshape(-1).view(torch.uint8).view(-1, width) for t in (a, b))
    return int((bytes_a != bytes_b).any(-1).sum())


def _commit(updater: Any, request: Answer) -> Answer:
    _received.clear()
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
    """On-disk weight names of one of SGLang's modules, which stack projections and experts."""
    own = dict(module.named_parameters(recurse=False))
    if any(key.startswith("w13_weight") for key in own):
        experts = range(next(iter(own.values())).shape[0])
        return [f"{name}.{expert}.{piece}.weight" for expert in experts for piece in ("gate_proj", "up_proj", "down_proj")]
    head, _, last = name.rpartition(".")
    return [f"{head}.{piece}.weight" for piece in FUSED.get(last, (last,))]


ACTIONS = {"load": _load, "check": _check, "describe": _describe, "commit": _commit}
