"""The command line as a user meets it: verbs, flags, exit codes, completion."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from runner.__main__ import main
from runner.cli import convert as convert_verb
from runner.cli.main import VERBS
from runner.cli.verb import Verb, parse
from runner.config import compose, preflight
from runner.config.schema import ConvertConfig
from runner.errors import Failure, UserError
from runner.sweep import jobs, sweep_overrides

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
    code = "import sys; from runner.config import compose, preflight; compose.load([]); sys.exit('torch' in sys.modules)"
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


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from runner.__main__ import main; "
        "codes = [main(['--help']), *(main([verb, '--help']) for verb in ('run', 'plan', 'sweep', 'report', 'doctor', 'convert', "
        "'export', 'audit'))]; heavy = {'torch', 'ray', 'transformers', 'wandb', 'rich', 'numpy'} & set(sys.modules); "
        "sys.exit(str(heavy) if heavy else max(codes))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_help_names_verbs_examples_and_groups(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for word in (
        *VERBS,
        "qwen3_235b",
        "kimi_k2_int4",
        "--cfg job",
        *(f"python -m runner {name} " for name in VERBS if name != "run"),
    ):
        assert word in text


@pytest.mark.parametrize("verb", VERBS.values(), ids=lambda verb: verb.name)
def test_help_of_a_verb_says_what_it_takes(verb: Verb, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb.name, "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: python -m runner {verb.name} ") and verb.usage in text and "Exit code 0" in text
    for word in (
        *(f"  {key}=" for key in verb.own()),
        *(verb.words or ()),
        *(f"python -m runner {line}" for line, _ in verb.examples),
    ):
        assert word in text
    assert ("--cfg" in text) == (verb.name in ("run", "plan", "submit", "doctor", "convert"))


def test_own_keys_of_convert_are_the_schemas_with_the_comments_of_conf() -> None:
    keys = convert_verb.own_keys()
    assert list(keys) == [field.name for field in fields(ConvertConfig)]
    assert keys["workers"] == "threads over the weights of a shard; default 2" and keys["source"] == "folder of an HF checkpoint"
    assert keys["calibration_samples"] == "default 512"


@pytest.mark.parametrize(
    ("verb", "line"), [(verb, line) for verb in VERBS.values() for line, _ in verb.examples], ids=lambda value: str(value)[:40]
)
def test_help_examples_are_right(verb: Verb, line: str) -> None:
    words = shlex.split(line.replace("<", "").replace(">", ""))
    command = parse(verb, words[1:] if words and words[0] == verb.name else words, VERBS.values())
    if verb.name == "sweep" or getattr(command.flags, "multirun", False):
        _, planned = jobs.plan(sweep_overrides(command.overrides, multirun=True) or [], compose.load_config)
        assert len(planned) > 1
    elif verb.config:
        assert compose.load(command.overrides, check_rules=verb.groups).config.steps > 0


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["plam"], "did you mean plan?"),
        (["steps=3", "plan"], "the verb comes first: python -m runner plan"),
        (["plan", "--precision=bf16"], "keys have no dashes: precision=bf16"),
        (["report", "--cfg", "job"], "report has no flag --cfg"),
        (["report", "--uot", "x"], "did you mean --out?"),
        (["report", "--out"], "--out file of the comparison"),
        (["report"], "report outputs/<run>"),
        (["audit", "only_one"], "audit DIR DIR"),
        (["doctor", "machine", "engine"], "takes one of: machine, engine"),
        (["sweep", "seed=1", "stray"], "[key=a,b,c ...]"),
        (["--resolv"], "did you mean --resolve?"),
        (["doctor", "engin"], "did you mean engine?"),
        (["plan", "stray"], "key=value"),
        (["--cfg"], "--cfg job"),
        (["--cfg", "jab"], "--cfg job"),
        (["plan", "-m", "seed=1,2"], "runs a sweep"),
        (["resume=nowhere", "outputs_dir=nothing_here"], "no run lies under"),
        (["--cfg", "job", "--package", "modle"], "model"),
        (["-p", "precision", "steps=3"], "--cfg job --package precision"),
        (["plan", "--resolve"], "--cfg job --resolve"),
        (["export", "run=nowhere", "target=x", "outputs_dir=nothing_here"], "run: no run named"),
        (["step s=3"], "steps=3"),
        (["steps="], "'' is not a whole number"),
    ],
)
def test_mistakes_on_the_command_line(arguments: list[str], hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert hint in capsys.readouterr().err


def test_package_and_resolve(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--cfg", "job", "--package", "precision", "--resolve"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["group_size"] == 32
    assert main(["--cfg", "job", "-p", "precision.train.group_size"]) == 0
    assert capsys.readouterr().out.strip() == "32"


def test_flags_stand_anywhere_and_info_needs_no_part(capsys: pytest.CaptureFixture[str]) -> None:
    command = parse(VERBS["report"], ["outputs/a", "--out", "x.html", "outputs/seed=1"])
    assert command.words == ["outputs/a", "outputs/seed=1"] and command.flags.out == Path("x.html")
    assert main(["plan", "-p", "seed", "seed=3", "--cfg=job"]) == 0 and capsys.readouterr().out == "3\n"
    assert main(["convert", "source=a", "--cfg", "job", "-p", "convert.source"]) == 0 and capsys.readouterr().out == "a\n"
    done = run("--info", "seed=3")
    assert done.returncode == 0 and "Config search path" in done.stdout and "seed: 3" in done.stdout


def test_texts_reach_the_config_as_typed() -> None:
    typed = ["run_name='a \"b\" c'", "outputs_dir=läufe/实验", "~watch", "+rollout.server_args.x=-1", "tracking.tags=[a,'b=c']"]
    assert parse(VERBS["run"], typed).overrides == typed


def test_a_folder_with_an_equals_sign_is_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "seed=1"
    folder.mkdir()
    command = parse(VERBS["audit"], [str(folder), "precision=bf16"])
    assert (command.words, command.overrides) == ([str(folder)], ["precision=bf16"])


COMMANDS = {  # verb -> (its command line, the function that does the work)
    "run": (["run", "steps=3"], "runner.run.supervise.main"),
    "plan": (["plan", "recipe=kimi_k2_int4"], "runner.planner.tables.show"),
    "submit": (["submit", "recipe=kimi_k2_int4", "cluster=slurm"], "runner.cluster.jobs.render"),
    "doctor cluster": (["doctor", "cluster", "cluster=ray"], "runner.doctor.cluster.check_cluster"),
    "sweep": (["sweep", "seed=1,2"], "runner.sweep.supervise.Sweep.run"),
    "report": (["report", "RUN"], "runner.tracking.report.write_report"),
    "watch": (["watch", "RUN"], "runner.tracking.live.serve"),
    "show": (["show", "RUN"], "runner.tracking.folder.rollout_files"),
    "doctor": (["doctor"], "runner.doctor.machine.check_machine"),
    "doctor engine": (["doctor", "engine"], "runner.doctor.engine.check_engine"),
    "convert": (["convert", "source=a", "target=b"], "runner.convert.command.run"),
    "export": (["export", "run=RUN", "target=TARGET"], "runner.run.export.export"),
    "audit": (["audit", "a", "b"], "runner.convert.audit.two_folders"),
    "audit config": (["audit", "a", "precision=bf16"], "runner.convert.audit.against_config"),
}


def interrupted() -> None:
    signal.raise_signal(signal.SIGINT)


def failed() -> None:
    raise Failure("the disk is full")


def mistaken() -> None:
    raise UserError("no such thing", fix="another")


def test_every_verb_is_among_the_commands() -> None:
    assert {name.split()[0] for name in COMMANDS} == set(VERBS)


@pytest.mark.parametrize(
    ("act", "code", "words"), [(interrupted, 130, "interrupted"), (failed, 1, "full"), (mistaken, 2, "another")]
)
@pytest.mark.parametrize("name", COMMANDS)
def test_how_each_verb_ends(
    name: str,
    act: Callable[[], None],
    code: int,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Ctrl-C, something that broke and a mistake while a verb works: its exit code, a line, no traceback."""
    run_folder = tmp_path / "run"
    (run_folder / ".hydra").mkdir(parents=True)
    (run_folder / ".hydra" / "overrides.yaml").write_text("- seed=7\n")
    (run_folder / "status.json").write_text("{}")
    command, function = COMMANDS[name]
    monkeypatch.setattr(function, lambda *_, **__: act())
    places = {"RUN": str(run_folder), "TARGET": str(tmp_path / "target")}
    for place, path in places.items():
        command = [word.replace(place, path) for word in command]
    assert main(command) == code
    shown = capsys.readouterr()
    assert words in shown.err and "Traceback" not in shown.err


def test_a_run_whose_reader_is_gone_did_not_end_well(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def lost(*_: object) -> int:
        raise BrokenPipeError

    monkeypatch.setattr("runner.run.supervise.main", lost)
    assert main(["steps=1"]) == 1 and "nobody reads" in capsys.readouterr().err


def test_verbs_get_what_they_need(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[object, ...]] = []

    def record(function: str, code: int = 0) -> None:
        monkeypatch.setattr(function, lambda *arguments: calls.append(arguments) or code)

    record("runner.run.supervise.main")
    record("runner.planner.tables.show", 1)
    record("runner.doctor.engine.check_engine")
    record("runner.convert.command.run")
    record("runner.sweep.run")
    monkeypatch.setattr(preflight, "check", lambda config: None)
    assert main([]) == 0 and main(["plan", "recipe=kimi_k2_int4"]) == 1 and main(["doctor", "engine"]) == 0
    assert calls[0][0].model.name == "tiny_moe" and calls[0][1] == []  # type: ignore[attr-defined]
    assert calls[1][0].model.name == "kimi_k2_thinking"  # type: ignore[attr-defined]
    assert calls[2][0].model.name == "tiny_moe"  # type: ignore[attr-defined]
    calls.clear()
    for command in (["-m", "seed=1,2"], ["sweep", "seed=1,2"], ["recipe=laptop_r3"], ["sweep", "recipe=laptop_r3"]):
        assert main(command) == 0
    assert calls[0] == calls[1] == (["seed=1,2"],) and calls[2] == calls[3] and "hydra.mode=RUN" in calls[2][0]  # type: ignore[operator]
    assert main(["convert", "source=a", "target=b", "convert.workers=1"]) == 0
    config, overrides = calls[-1]
    assert (config.convert.source, config.convert.workers) == ("a", 1)  # type: ignore[attr-defined]
    assert overrides == ["convert.source=a", "convert.target=b", "convert.workers=1"]
