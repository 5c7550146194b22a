"""The arguments of one SGLang server, from the config alone. Imports neither torch nor SGLang: golden files check it.

`server_arguments` is the only place where an option of SGLang is decided. What a process learns only when it starts (ports,
folders, the key) is added by server.py and listed in RUNTIME.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Any

from runner.config.choices import Drafting, KvDtype, PauseMode
from runner.config.schema import Config
from runner.errors import UserError
from runner.rollout.sglang.config import layout, on_cpu, settings
from runner.rollout.sglang.option_table import options, problem_of
from runner.weights.transports import TRANSPORTS

Arguments = dict[str, Any]
# Known when the process starts. The pool sets them; nobody else can.
RUNTIME = ("model_path", "tokenizer_path", "host", "port", "nccl_port", "base_gpu_id", "api_key", "admin_api_key", "random_seed")
# Options, and beginnings of options, that would make a server less safe than this project promises, or change what it relies on.
REFUSED = {
    "trust_remote_code": "code of a checkpoint is never run inside an engine",
    "forward_hooks": "it would run code of a file inside the engine",
    "stat_loggers": "it would run code of a file inside the engine",
    "sidecar": "it would run another program beside the engine",
    "enable_custom_logit_processor": "it would execute code sent with a request",
    "checkpoint_engine_wait_weights_before_ready": "the pool brings the weights itself",
    "custom_weight_loader": "weights are loaded and verified by runner's plugin",
    "remote_instance_weight_loader_": "it hands out addresses of the weights to anybody; rollout.weight_transport=p2p reads them",
    "weight_cache_": "weights are loaded and verified by runner's plugin",
    "delete_ckpt_after_loading": "weights are loaded and verified by runner's plugin",
    "json_model_override_args": "the model group says what the model is",
    "quantization": "the precision group says what is quantized",
    "quantize_and_serve": "the precision group says what is quantized",
    "modelopt_": "the precision group says what is quantized",
    "rl_quant_profile": "the precision group says what is quantized",
    "speculative_algorithm": "the speculative group says how drafts are made",
    "speculative_draft_model_path": "the speculative group says how drafts are made",
    "speculative_num_": "the speculative group says how drafts are made",
    "speculative_accept_threshold_": "it accepts drafts that the policy would not have sampled",
    "preferred_sampling_params": "rollout.sampling says how tokens are sampled",
    "watermark_": "it changes what is sampled",
    "enable_watermark": "it changes what is sampled",
    "enable_lora": "the pool serves the policy alone",
    "lora_paths": "the pool serves the policy alone",
    "disaggregation_mode": "the pool sends all of a request to one engine",
    "encoder_": "the pool sends all of a request to one engine",
    "dp_size": "the pool starts one server per engine and balances them itself",
    "pp_size": "engines are tensor and expert parallel (parallelism.gpus_per_engine, engine_ep)",
    "dist_init_addr": "the pool starts the processes of an engine",
    "node_rank": "the pool starts the processes of an engine",
    "ssl_": "servers talk plain HTTP, with a key, on one interface (cluster.interface)",
    "use_ray": "the cluster group starts processes",
    "skip_tokenizer_init": "tokens go in and come out",
}
HARMLESS = {"dp_size": 1, "pp_size": 1, "node_rank": 0, "disaggregation_mode": "null"}  # values that change nothing
ATTENTION = {"cpu": "torch_native", "cuda": "fa3"}  # of rollout.attention_backend=auto
ALGORITHMS = {Drafting.ngram: "NGRAM", Drafting.draft: "STANDALONE", Drafting.mtp: "NEXTN", Drafting.eagle: "EAGLE"}
CONTEXT_SLACK = 8  # SGLang takes inputs of at most context_length - 6 tokens; the pool itself ends samples at the model's context
CPU_MEMORY_FRACTION = 0.3  # SGLang asks for one; max_total_tokens is what bounds the cache there


def server_arguments(cfg: Config) -> Arguments:
    """Options of SGLang's ServerArgs for every server of this run, without those of RUNTIME; sorted by name."""
    rollout, par = settings(cfg), cfg.parallelism
    device = "cpu" if on_cpu(cfg) else "cuda"
    decided: Arguments = {
        "attention_backend": ATTENTION[device] if rollout.attention_backend == "auto" else rollout.attention_backend,
        "chunked_prefill_size": rollout.chunked_prefill_tokens,
        "context_length": cfg.model.max_context_tokens + CONTEXT_SLACK,
        "device": device,
        "dtype": cfg.precision.base_dtype.value,
        "enable_return_routed_experts": cfg.router_replay.rollout,
        "kv_cache_dtype": "auto" if cfg.precision.kv_cache == KvDtype.bf16 else cfg.precision.kv_cache.value,
        "load_format": "dummy",  # the first weight sync brings the weights
        "log_level": "info",
        "log_level_http": "warning",  # not a line per request
        "max_running_requests": rollout.max_concurrency,
        "skip_server_warmup": True,
        "skip_tokenizer_init": True,  # tokens go in and come out
        "tp_size": layout(cfg).ranks,
        "trust_remote_code": False,
    }
    if layout(cfg).nodes > 1:
        decided["nnodes"] = layout(cfg).nodes
    if par.engine_ep > 1:
        decided["ep_size"] = par.engine_ep
    if rollout.pause_mode == PauseMode.in_place:
        decided["disable_radix_cache"] = True  # it cannot be flushed under running requests, and old entries must not be met
    if device == "cpu":
        decided |= {
            "disable_cuda_graph": True,
            "max_total_tokens": rollout.max_concurrency * (cfg.model.max_context_tokens + CONTEXT_SLACK),
            "mem_fraction_static": CPU_MEMORY_FRACTION,
            "sleep_on_idle": True,  # a scheduler without work would take a whole core from the trainer and the other servers
        }
    else:
        decided |= {
            "cuda_graph_max_bs_decode": rollout.cuda_graph_max_batch,
            "enable_memory_saver": layout(cfg).shares_gpus,
            "mem_fraction_static": rollout.memory_fraction,
            "sampling_backend": "pytorch",  # the one whose every way of sampling takes a request's seed
        }
    decided |= _speculation(cfg)
    return dict(sorted({**decided, **rollout.server_args}.items()))


def _speculation(cfg: Config) -> Arguments:
    """`num_draft_tokens` is what is proposed per step; SGLang counts the verified root as well."""
    spec = cfg.speculative
    if spec.method == Drafting.none:
        return {}
    verified = spec.num_draft_tokens + 1
    decided: Arguments = {"speculative_algorithm": ALGORITHMS[spec.method], "speculative_num_draft_tokens": verified}
    if spec.method == Drafting.ngram:
        # Breadth 1 is a chain: with a tree, recorded routes of accepted nodes were wrong for 3% of the tokens.
        return decided | {
            "speculative_ngram_max_bfs_breadth": 1,
            "speculative_ngram_max_trie_depth": max(spec.ngram_max + spec.num_draft_tokens, verified),
            "speculative_ngram_min_bfs_breadth": 1,
        }
    decided |= {"speculative_eagle_topk": 1, "speculative_num_steps": spec.num_draft_tokens}
    if spec.method in (Drafting.draft, Drafting.eagle):
        decided["speculative_draft_model_path"] = spec.draft_model
        decided["speculative_draft_load_format"] = "auto"  # its weights are its own and do not change
    elif cfg.precision.rollout.format != "bf16":
        decided["speculative_draft_model_quantization"] = "unquant"  # multi-token-prediction layers never are
    return decided


def problems(cfg: Config) -> Iterator[UserError]:
    """Options in rollout.server_args that SGLang does not have, that are decided elsewhere, or that are refused."""
    rollout = settings(cfg)
    known = options()
    decided = server_arguments(_without_extra(cfg))
    for name, value in rollout.server_args.items():
        key = f"rollout.server_args.{name}"
        if name not in known:
            near = difflib.get_close_matches(name.replace("-", "_"), known, n=1)
            hint = f"rollout.server_args.{near[0]}=..." if near else "the options are those of `sglang serve --help`"
            yield UserError("SGLang 0.5.23 has no such option", key=key, fix=hint)
        elif name in RUNTIME:
            yield UserError("the pool sets this for every server it starts", key=key, fix="leave it out")
        elif (reason := _refusal(name)) and value not in (decided.get(name, False), None, HARMLESS.get(name)):
            yield UserError(f"refused: {reason}", key=key, fix="leave it out")
        elif problem := problem_of(name, value):
            yield UserError(problem, key=key, fix=f"rollout.server_args.{name}=<another value>")
        elif name in decided and decided[name] != value:
            yield UserError(
                f"{value!r} contradicts {decided[name]!r}, which follows from the rest of the config",
                key=key,
                fix=f"leave it out, or change {SOURCES.get(name, 'what it follows from')}",
            )


def _refusal(name: str) -> str:
    return REFUSED.get(name) or next(
        (why for start, why in REFUSED.items() if start.endswith("_") and name.startswith(start)), ""
    )


# Where the value of an option comes from, for messages.
SOURCES = {
    "attention_backend": "rollout.attention_backend",
    "chunked_prefill_size": "rollout.chunked_prefill_tokens",
    "context_length": "model.max_context_tokens",
    "cuda_graph_max_bs_decode": "rollout.cuda_graph_max_batch",
    "device": "parallelism",
    "dtype": "precision.base_dtype",
    "enable_memory_saver": "parallelism.colocate",
    "enable_return_routed_experts": "router_replay",
    "ep_size": "parallelism.engine_ep",
    "kv_cache_dtype": "precision.kv_cache",
    "max_running_requests": "rollout.max_concurrency",
    "mem_fraction_static": "rollout.memory_fraction",
    "tp_size": "parallelism.gpus_per_engine",
}


def warnings(cfg: Config) -> list[str]:
    """What is allowed but probably not meant; the pool prints them when it starts, and `plan` may."""
    rollout = settings(cfg)
    found = []
    prompts = cfg.algorithm.prompts_per_step + cfg.algorithm.oversample_prompts
    asked = -(-prompts * cfg.algorithm.samples_per_prompt // layout(cfg).engines)
    asked = min(rollout.max_concurrency, asked)
    graphs = rollout.server_args.get("cuda_graph_bs_decode") or [rollout.cuda_graph_max_batch]
    if not on_cpu(cfg) and not rollout.server_args.get("disable_cuda_graph") and max(graphs) < asked:
        found.append(
            f"CUDA graphs are captured for up to {max(graphs)} sequences, but this run decodes up to {asked} at a time in each "
            f"engine: larger batches run without graphs, several times slower per step (rollout.cuda_graph_max_batch={asked})"
        )
    if on_cpu(cfg) and cfg.precision.rollout.format == "fp8":
        found.append("the CPU twin computes with dequantized FP8 weights and leaves activations in bf16")
    if cfg.speculative.method == Drafting.draft:
        found.append("SGLang 0.5.23 shows a draft model the text without its first token, so even an equal model misses some")
    found += TRANSPORTS[rollout.weight_transport].warnings(cfg)
    return found


def _without_extra(cfg: Config) -> Config:
    import dataclasses

    return dataclasses.replace(cfg, rollout=dataclasses.replace(settings(cfg), server_args={}))
