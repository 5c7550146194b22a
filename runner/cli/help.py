"""The text of `python -m runner --help`."""

from __future__ import annotations

from runner.searchpath import groups

EXAMPLES = (
    ("python -m runner", "the whole loop on this machine's CPU, about a minute"),
    ("python -m runner precision=int4_qat model=qwen3_30b", "a complete 8 x H200 run"),
    ("python -m runner -m precision.group_size=32,64,128", "a sweep, one fresh process per job, with a summary table"),
    ("python -m runner plan recipe=kimi_k2_int4", "what goes on which GPU, what fits, what moves; no GPU needed"),
    ("python -m runner model=qwen3_4b trainer=torch rollout=local", "one GPU, neither Megatron nor SGLang needed"),
    ("python -m runner recipe=qwen3_235b_int4 scale=laptop", "the same recipe at toy size, on a CPU"),
)


def help_text(verbs: dict[str, str]) -> str:
    """Verbs, six commands to copy, every group with its options, and the flags."""
    lines = ["Low-precision reinforcement learning of language models from one YAML composition.", ""]
    lines += ["usage: python -m runner [verb] [key=value ...]", "", "verbs"]
    lines += [f"  {verb:<9}{text}" for verb, text in verbs.items()]
    width = max(len(command) for command, _ in EXAMPLES)
    lines += ["", "examples", *(f"  {command:<{width}}  # {text}" for command, text in EXAMPLES)]
    lines += ["", "groups: GROUP=OPTION, then any key below it: GROUP.key=value"]
    for group, options in groups().items():
        lines.append(f"  {group:<15}{', '.join(options)}")
    lines += [
        "",
        "flags",
        "  --cfg job [--resolve] [--package GROUP]  print the composed config and stop",
        "  --info [defaults|defaults-tree|...]      how Hydra composed it",
        "  -m, --multirun                           a sweep over every key=a,b,c",
        '  -sc install=bash                         Tab completion: eval "$(runner -sc install=bash)"',
        "  --version, --help",
    ]
    return "\n".join(lines)
