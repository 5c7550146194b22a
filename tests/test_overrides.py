"""Overrides as text: what the schema makes of them, and that what is written or printed reads back, in Hydra and in a shell."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf

from runner.config import compose, overrides
from runner.config.recorded import find_run
from runner.errors import UserError, UserErrors

TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\n\r"), min_size=1, max_size=12)
HARD = st.text(st.sampled_from("a1.e'\"\\${}[](),=: ~ü实🚀!`#;|&"), min_size=1, max_size=10)


def composed(text: str, key: str = "tracking.project") -> object:
    return OmegaConf.select(typed(text), key)


def typed(*texts: str) -> DictConfig:
    """The config as the program uses it, in which keys can be looked up."""
    return OmegaConf.structured(compose.to_config(compose.compose_raw(compose.readable(list(texts)))))


@settings(max_examples=60, deadline=None)
@given(st.one_of(TEXTS, HARD))
def test_a_written_override_reads_back_through_shell_and_hydra(value: str) -> None:
    if value.strip() == "???":
        return  # the mark of a missing value
    for item in (overrides.override("tracking.project", value), overrides.typed("tracking.project", value)):
        assert overrides.given([shlex.split(overrides.command(item))[3]], "tracking.project") == value
    strict = overrides.parse(overrides.override("tracking.project", value))
    assert strict is not None and not strict.is_sweep_override()


@pytest.mark.parametrize("value", ["12e4567", "1_1_1", "true", "1e5", "-7", "nan", "0x10", "2026-11-28", "3.10", "no", "1_"])
def test_texts_that_look_like_numbers_stay_what_was_typed(value: str) -> None:
    found = typed(f"run_name={value}", f"tracking.tags=[a,{value}]", f"++tracking.project={value}")
    assert (found.run_name, found.tracking.tags, found.tracking.project) == (value, ["a", value], value)


def test_null_numbers_and_quoted_texts_keep_their_meaning() -> None:
    assert composed("run_name=null", "run_name") is None
    assert composed("run_name='null'", "run_name") == "null"
    assert composed("seed=1_000", "seed") == 1000
    assert composed("tracking.tags=['1e5','a,b',c]", "tracking.tags") == ["1e5", "a,b", "c"]


@pytest.mark.parametrize("value", ["läufe/实验", "a(b", "{question} 🚀", "x: y", "[1]", "a=b", "50%!"])
def test_texts_beyond_hydras_grammar_need_no_quotes(value: str) -> None:
    assert composed(f"outputs_dir={value}", "outputs_dir") == value


def test_an_override_that_cannot_be_read_is_shown_quoted_for_the_shell() -> None:
    with pytest.raises(UserErrors) as caught:
        compose.load(["model=tiny_dense", 'task.prompt_template="{question}, now'])
    (problem,) = caught.value.errors
    shown = (problem.fix or "").partition(": ")[2]
    assert composed(shlex.split(shown)[0].replace("task.prompt_template", "tracking.project")) == '"{question}, now'


def test_several_values_of_a_text_key_may_be_one_text() -> None:
    with pytest.raises(UserErrors) as caught:
        compose.load(["outputs_dir=/a,b"])
    fix = caught.value.errors[0].fix or ""
    assert "-m outputs_dir=/a,b" in fix
    assert composed(shlex.split(fix.rpartition("one text ")[2])[0], "outputs_dir") == "/a,b"


def test_integers_of_thousands_of_digits_are_a_problem_and_no_traceback() -> None:
    with pytest.raises(UserErrors) as caught:
        compose.load(["seed=" + "9" * 5000])
    assert caught.value.errors[0].key == "seed"


def test_home_and_newlines_mean_what_they_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    cfg = compose.load(["outputs_dir=~/runs", "watch.baseline_run=~/old", 'model.hf_checkpoint="~/m"'], check_rules=False).config
    assert (cfg.outputs_dir, cfg.watch.baseline_run) == (f"{tmp_path}/runs", f"{tmp_path}/old")
    assert cfg.model.hf_checkpoint == f"{tmp_path}/m"
    given = ["task=gsm8k", "model=qwen3_4b", r'task.prompt_template="{question}\nAnswer: \boxed{\neq \nu} \\n \now"']
    template = compose.load(given, check_rules=False).config.task.prompt_template
    assert template == "{question}\nAnswer: \\boxed{\\neq \\nu} \\\\n \now"


def run_folder(path: Path, text: str) -> Path:
    (path / ".hydra").mkdir(parents=True)
    (path / ".hydra" / "overrides.yaml").write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "name", ["with blank", "a,b", "läufe", "实验", "🚀", "back\\slash", "$HOME ${x}", "it's", 'a"b', "12e4567"]
)
def test_runs_are_found_again_under_any_name(name: str, tmp_path: Path) -> None:
    folder = run_folder(tmp_path / name, '- "seed=7"\n')
    for item in (overrides.override("resume", str(folder)), overrides.override("resume", name)):
        config = compose.load([item, overrides.override("outputs_dir", str(tmp_path))]).config
        assert config.resume == str(folder) and find_run(config.resume, config.outputs_dir) == folder and config.seed == 7


@pytest.mark.parametrize("ascii_only", [True, False])
def test_texts_survive_the_runs_folder(ascii_only: bool, tmp_path: Path) -> None:
    text = 'task.prompt_template="{question} 🚀 请 answer:"'
    given = ["task=gsm8k", "model=qwen3_4b", text]
    folder = run_folder(tmp_path / "r", "".join(f"- {json.dumps(item, ensure_ascii=ascii_only)}\n" for item in given))
    assert compose.load([f"resume={folder}"], check_rules=False).config.task.prompt_template == "{question} 🚀 请 answer:"


def test_bytes_that_are_no_text_are_refused() -> None:
    with pytest.raises(UserError, match="not UTF-8"):
        compose.load(["run_name=\udcff"])


@pytest.mark.parametrize(
    ("item", "words"),
    [
        ("outputs_dir=~nosuchuser/runs", "begins with ~nosuchuser, whose home folder is not known here"),
        ("task.train_path=~nosuchuser/x.jsonl", "begins with ~nosuchuser"),
        ("outputs_dir=", "outputs_dir: is empty"),
        ("tracking.tags=a", "fix: 'tracking.tags=[a]'"),
        ("tracking.tags=[a,null]", "fix: give it a text"),
        ("tracking.project=${oc.env:RUNNER_NO_SUCH_VARIABLE}", "name a key or an environment variable that there is"),
    ],
)
def test_what_means_something_else_than_it_says_is_refused_with_a_fix(item: str, words: str) -> None:
    with pytest.raises(UserErrors) as caught:
        compose.load(["model=tiny_dense", "tracking=wandb", item])
    (problem,) = caught.value.errors
    assert words in str(problem) and problem.fix


@pytest.mark.parametrize(
    ("text", "problem", "fix"),
    [
        ("rollout.sampling.stop_token_ids=5", "5 is one value, and this is a list", "'rollout.sampling.stop_token_ids=[5]'"),
        ("precision.roles=[norm,atention]", "atention is none of embedding", "'precision.roles=[norm,attention]'"),
        ("rollout.sampling.stop_token_ids=[1,x]", "x is not a whole number", "give it a whole number"),
        ("tracking.tags=null", "may not be null", "tracking.tags=[]"),
        ("watch.rules=4", "4 is one value, and this is a group of named ones", "+watch.rules.<name>=<value>"),
        ("trainer.optimizer=3", "3 is one value, and this is a group of keys", "trainer.optimizer.lr=<value>"),
        ("algorithm.schedule=asink", "asink is none of sync, one_step_off, async", "algorithm.schedule=async"),
        ("trainer.device=tpu", "tpu is none of auto, cpu, cuda", None),
        ("steps=[1]", "[1] is not a whole number", "give it a whole number"),
    ],
)
def test_a_value_of_the_wrong_kind_says_what_to_type(text: str, problem: str, fix: str | None) -> None:
    with pytest.raises(UserErrors) as caught:
        compose.load([text])
    (error,) = (error for error in caught.value.errors if error.key == text.partition("=")[0])
    assert error.problem.startswith(problem) and error.fix and (fix is None or error.fix == fix)
