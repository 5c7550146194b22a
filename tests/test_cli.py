"""The command line as a user meets it: verbs, flags, exit codes, completion."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import runner.__main__ as cli

ROOT = Path(__file__).parent.parent


def run(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "runner", *arguments], cwd=ROOT, capture_output=True, text=True, env={**os.environ, **(env or {})}
    )


def test_cfg_job_prints_yaml_and_imports_neither_torch_nor_ray() -> None:
    code = (
        "import sys; from runner.__main__ import main; code = main(['--cfg', 'job', '--resolve']);"
        "heavy = {'torch', 'ray', 'transformers', 'wandb', 'rich', 'numpy'} & set(sys.modules); "
        "sys.exit(str(heavy) if heavy else code)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load(done.stdout)["model"]["name"] == "tiny_moe"


def test_rules_import_no_torch_either() -> None:
    code = "import sys; from runner import compose, preflight; compose.load([]); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_bad_config_exits_with_2_and_no_traceback() -> None:
    done = run("precision.gruop_size=3", "model=qwen")
    assert done.returncode == 2 and "Traceback" not in done.stderr and done.stdout == ""
    assert done.stderr.startswith("2 problems; nothing was started.")


def test_a_machine_that_cannot_run_it_says_what_can(tmp_path: Path) -> None:
    done = run("precision=int4_qat", "model=qwen3_30b", f"outputs_dir={tmp_path}", env={"CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "needs 8 GPUs" in done.stderr and "python -m runner plan precision=int4_qat model=qwen3_30b" in done.stderr
    assert "scale=laptop" in done.stderr and list(tmp_path.iterdir()) == []


def test_completion_offers_options_and_verbs() -> None:
    def complete(line: str) -> list[str]:
        environment = {"COMP_LINE": line, "COMP_POINT": str(len(line)), "COMP_CWORD": str(len(line.split()))}
        return run("-sc", "query=bash", env=environment).stdout.split()

    assert {"model=qwen3_30b", "model=qwen3_4b"} <= set(complete("runner model=qwen3"))
    assert "recipe=kimi_k2_int4" in complete("runner plan recipe=kimi")
    assert "plan" in complete("runner pl")


def test_help_names_verbs_examples_and_groups(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert sum(line.strip().startswith("python -m runner") for line in text.splitlines()) == 6
    for word in (*cli.VERBS, "qwen3_235b", "kimi_k2_int4", "--cfg job"):
        assert word in text


@pytest.mark.parametrize("command", [c for c, _ in __import__("runner.cli.help", fromlist=["EXAMPLES"]).EXAMPLES])
def test_help_examples_compose(command: str) -> None:
    from runner import compose

    parsed = cli.parse(command.split()[3:])
    if "multirun" in parsed.flags:
        jobs = [["precision.group_size=32"], ["precision.group_size=64"]]
    else:
        jobs = [parsed.overrides]
    for overrides in jobs:
        assert compose.load(overrides).config.steps > 0


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["plam"], "did you mean plan?"),
        (["--resolv"], "did you mean --resolve?"),
        (["doctor", "engin"], "machine, engine"),
        (["plan", "stray"], "key=value"),
        (["--cfg"], "--cfg job"),
        (["--cfg", "jab"], "--cfg job"),
        (["plan", "-m", "seed=1,2"], "runs a sweep"),
        (["resume=nowhere", "outputs_dir=nothing_here"], "no run lies under"),
        (["--cfg", "job", "--package", "modle"], "model"),
    ],
)
def test_mistakes_on_the_command_line(arguments: list[str], hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 2
    assert hint in capsys.readouterr().err


def test_package_and_resolve(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--cfg", "job", "--package", "precision", "--resolve"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["group_size"] == 32
    assert cli.main(["--cfg", "job", "-p", "precision.train.group_size"]) == 0
    assert capsys.readouterr().out.strip() == "32"


def test_verbs_get_what_they_need(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, tuple[object, ...]]] = []
    monkeypatch.setattr(cli, "_call", lambda verb, *arguments: calls.append((verb, arguments)) or 0)
    cli.main([])
    cli.main(["plan", "recipe=kimi_k2_int4"])
    cli.main(["doctor", "engine"])
    cli.main(["report", "outputs/a", "--out", "x.html"])
    cli.main(["-m", "seed=1,2"])
    cli.main(["recipe=laptop_r3"])
    cli.main(["convert", "source=a", "target=b", "convert.workers=1"])
    verbs = [verb for verb, _ in calls]
    assert verbs == ["run", "plan", "doctor", "report", "sweep", "sweep", "convert"]
    config, overrides = calls[0][1]
    assert config.model.name == "tiny_moe" and overrides == []  # type: ignore[attr-defined]
    assert calls[1][1][0].model.name == "kimi_k2_thinking"  # type: ignore[attr-defined]
    assert calls[2][1][1] == "engine" and calls[3][1][0] == ["outputs/a", "--out", "x.html"]
    assert calls[4][1][0] == ["seed=1,2"] and "hydra.mode=RUN" in calls[5][1][0]  # type: ignore[operator]
    assert calls[6][1][0].convert.source == "a" and calls[6][1][0].convert.workers == 1  # type: ignore[attr-defined]
