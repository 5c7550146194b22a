"""Tasks: deterministic data, held-out problems, grading, bad files."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.convert.calibration import read_tokens
from runner.errors import UserError
from runner.models.tokenizer import byte_tokenizer
from runner.models.vocabulary import FIRST_BYTE_ID
from runner.tasks import grading
from runner.tasks.dapo_math import DapoMathTask
from runner.tasks.gsm8k import Gsm8kTask
from runner.tasks.jsonl import JsonlTaskConfig
from runner.tasks.protocol import HasWorkedSolutions
from tests.answers import TOKENIZER, arithmetic

GSM8K = Path(os.environ.get("RUNNER_GSM8K", Path(__file__).parents[2] / "shared" / "data" / "gsm8k"))


def jsonl_config(path: Path | str | None, **fields: Any) -> JsonlTaskConfig:
    base: dict[str, Any] = {
        "name": "gsm8k",
        "train_path": None if path is None else str(path),
        "eval_path": None,
        "max_prompt_tokens": 4096,
        "reward_timeout_seconds": 1.0,
        "seed": 0,
        "prompt_template": "{question}",
        "max_train_problems": 0,
        "max_eval_problems": 0,
    }
    return JsonlTaskConfig(**(base | fields))


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def gsm_rows(count: int) -> list[dict[str, str]]:
    return [{"question": f"What is {i} + 1?", "answer": f"Add one.\n#### {i + 1}"} for i in range(count)]


# ---- arithmetic


@pytest.mark.parametrize(("operands", "digits"), [(2, 2), (2, 3), (3, 2), (10, 1), (4, 5)])
def test_worked_solutions_earn_the_reward_and_any_other_answer_does_not(operands: int, digits: int) -> None:
    task = arithmetic(operands=operands, digits=digits, eval_problems=16)
    assert isinstance(task, HasWorkedSolutions)
    by_text = {prompt.text: prompt for prompt in task.train_prompts(0, 200)}
    for prompt in by_text.values():
        solution = task.solution(tuple(prompt.info["numbers"]))
        assert task.reward(prompt, solution) == 1.0
        head, _, answer = solution.rpartition("=")
        for wrong in (int(answer) + 1, int(answer) * 10, int(answer) + 10**digits):
            assert task.reward(prompt, f"{head}={wrong}") == 0.0
    for bad in (
        "",
        "=",
        solution + "=",
        solution + " and more",
        answer,
        f"{head}=+{answer}",
        f"{head}={'9' * 10000}",
        f"{head}=²",
    ):
        assert task.reward(prompt, bad) == 0.0, bad


def test_every_column_of_a_solution_is_true_arithmetic() -> None:
    for prompt_text, solution in arithmetic(digits=4, operands=3).worked_solutions(100, seed=1):
        numbers = [int(n) for n in prompt_text.rstrip("=").split("+")]
        *columns, last = solution.split(",")
        last_column, answer = last.rsplit("=", 1)
        carry, digits = 0, ""
        for place, column in enumerate([*columns, last_column]):
            terms, total = column.split("=")
            *column_digits, carry_in = map(int, terms.split("+"))
            assert column_digits == [n // 10**place % 10 for n in numbers] and carry_in == carry
            assert int(total) == sum(column_digits) + carry_in
            carry, digits = int(total) // 10, total[1] + digits
        assert int(answer) == sum(numbers) == int(f"{carry}{digits}")


def test_solutions_are_long_enough_for_decoding_to_matter() -> None:
    _, solution = arithmetic().worked_solutions(1, seed=0)[0]
    assert len(TOKENIZER(solution).input_ids) >= 12


def test_training_data_depends_on_seed_step_and_round_alone() -> None:
    def draw(seed: int, step: int, round: int) -> list[str]:
        return [prompt.text for prompt in arithmetic(seed=seed, digits=3).train_prompts(step, 20, round)]

    reference = draw(0, 7, 0)
    task = arithmetic(digits=3)
    task.train_prompts(3, 11), task.worked_solutions(5, 2), task.eval_prompts(3)
    assert [prompt.text for prompt in task.train_prompts(7, 20)] == reference
    assert len({tuple(draw(*key)) for key in [(0, 7, 0), (1, 7, 0), (0, 8, 0), (0, 7, 1)]}) == 4
    ids = [p.prompt_id for step in range(5) for round in range(3) for p in task.train_prompts(step, 20, round)]
    assert len(set(ids)) == len(ids)


def test_held_out_problems_never_appear_in_training() -> None:
    task = arithmetic(digits=1, eval_problems=50)  # half of all problems that exist
    held_out = {prompt.text for prompt in task.eval_prompts(50)}
    assert len(held_out) == 50
    seen = {prompt.text for step in range(20) for prompt in task.train_prompts(step, 50)}
    seen |= {text for text, _ in task.worked_solutions(1000, seed=3)}
    assert len(seen) == 50 and not seen & held_out
    assert [p.text for p in task.eval_prompts(9)] == [
        p.text for p in arithmetic(digits=1, eval_problems=50, seed=9).eval_prompts(9)
    ]


def test_prompt_tokens_are_its_text() -> None:
    prompt = arithmetic().train_prompts(0, 1)[0]
    assert TOKENIZER.decode(prompt.tokens) == prompt.text and len(prompt.tokens) == len("58+67=")


@pytest.mark.parametrize(
    ("fields", "key"),
    [
        ({"digits": 1, "eval_problems": 51}, "task.eval_problems"),
        ({"max_prompt_tokens": 5}, "task.max_prompt_tokens"),
    ],
)
def test_impossible_arithmetic_is_a_user_error(fields: dict[str, Any], key: str) -> None:
    with pytest.raises(UserError) as caught:
        arithmetic(**fields)
    assert caught.value.key == key


# ---- gsm8k and dapo_math


@pytest.mark.skipif(not (GSM8K / "train.jsonl").exists(), reason="GSM8K is not here; RUNNER_GSM8K names its folder")
def test_every_gsm8k_reference_solution_grades_1_and_with_another_number_0() -> None:
    task = Gsm8kTask(jsonl_config(GSM8K, eval_path=str(GSM8K)), TOKENIZER)
    rows = [json.loads(line) for name in ("train", "test") for line in (GSM8K / f"{name}.jsonl").open()]
    prompts = {prompt.text: prompt for prompt in [*task._train, *task.eval_prompts(10**6)]}
    assert len(rows) == 8792 and len(task.eval_prompts(10**6)) == 1319
    graded = 0
    for row in rows:
        prompt = prompts[row["question"]]
        head, _, answer = row["answer"].rpartition("####")
        assert task.reward(prompt, row["answer"]) == 1.0, row
        value = int(answer.replace(",", ""))
        for wrong in (value + 1, -value - 1, value * 10 + 1):
            assert task.reward(prompt, f"{head}#### {wrong}") == 0.0, row
        graded += 1
    assert graded == 8792


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("#### 1234", 1.0),
        ("#### 1,234", 1.0),
        ("#### $1,234.00", 1.0),
        (r"so \boxed{1234}.", 1.0),
        ("#### 5\n#### 1234", 1.0),
        ("#### 1234\n#### 5", 0.0),
        (r"\boxed{1234} #### 5", 0.0),
        ("1234", 0.0),
        ("#### ", 0.0),
        ("#### 12,34", 0.0),
        ("#### __import__('os')", 0.0),
        ("#### 1233+1", 0.0),
        ("#### 2468/2", 1.0),
        ("#### 1234/0", 0.0),
        ("#### " + "1" * 5000, 0.0),
    ],
)
def test_gsm8k_reads_the_marked_answer_only(tmp_path: Path, text: str, reward: float) -> None:
    task = Gsm8kTask(jsonl_config(write(tmp_path / "t.jsonl", [{"question": "?", "answer": "x #### 1,234"}])), TOKENIZER)
    assert task.reward(task.train_prompts(0, 1)[0], text) == reward


@pytest.mark.parametrize(
    ("text", "answer", "reward"),
    [
        ("Answer: 34", "34", 1.0),
        ("Answer: $34$", "34", 1.0),
        (r"Answer: \boxed{34}", "34", 1.0),
        (r"thus \boxed{\frac{1}{2}}", "0.5", 1.0),
        (r"\boxed{\dfrac12}", r"\frac{1}{2}", 1.0),
        (r"\boxed{-\frac{3}{6}}", "-1/2", 1.0),
        (r"\boxed{\text{(B)}}", "(B)", 1.0),
        (r"\boxed{x^{2}+1}", "x^{2} + 1", 1.0),
        ("Answer: 34\nAnswer: 35", "34", 0.0),
        (r"\boxed{34} Answer: 35", "34", 0.0),
        (r"Answer: 35, no: \boxed{34}", "34", 1.0),
        (r"Answer: 35\n so \boxed{34}".replace(r"\n", "\n"), "34", 1.0),
        ("34", "34", 0.0),
        (r"\boxed{34", "34", 0.0),
        ("Answer:", "34", 0.0),
        ("**Answer**: 34", "34", 1.0),
    ],
)
def test_dapo_grading(tmp_path: Path, text: str, answer: str, reward: float) -> None:
    rows = [{"prompt": [{"role": "user", "content": "q"}], "reward_model": {"ground_truth": answer}}]
    task = DapoMathTask(jsonl_config(write(tmp_path / "t.jsonl", rows), name="dapo_math"), TOKENIZER)
    assert task.reward(task.train_prompts(0, 1)[0], text) == reward


@given(st.text(max_size=200))
def test_grading_survives_any_text(text: str) -> None:
    for extract in (grading.after_hashes, grading.last_boxed, grading.answer_line):
        extracted = extract(text)
        assert extracted is None or isinstance(extracted, str)
    grading.number(text)
    assert grading.same_answer(text, "not this \x00") is False or "not" in text


@given(st.fractions(-(10**12), 10**12, max_denominator=10**12))  # longer texts than MAX_DIGITS are no numbers
def test_numbers_read_back(value: Any) -> None:
    assert grading.number(f"{value.numerator}/{value.denominator}") == value
    sign = "-" if value < 0 else ""
    assert grading.number(rf"{sign}\frac{{{abs(value.numerator)}}}{{{value.denominator}}}") == value
    assert grading.number(f"{value.numerator:,}") == value.numerator


def test_epochs_visit_every_problem_once_and_rounds_draw_others(tmp_path: Path) -> None:
    task = Gsm8kTask(jsonl_config(write(tmp_path / "t.jsonl", gsm_rows(12))), TOKENIZER)
    for epoch in range(2):
        drawn = [p.answer for step in range(3) for p in task.train_prompts(3 * epoch + step, 4)]
        assert sorted(map(int, drawn)) == list(range(1, 13))
    rounds = [[p.answer for p in task.train_prompts(1, 4, round)] for round in range(3)]
    assert len({answer for answers in rounds for answer in answers}) == 12
    fresh = Gsm8kTask(task.cfg, TOKENIZER)
    assert [p.prompt_id for p in fresh.train_prompts(1, 4, 2)] == [p.prompt_id for p in task.train_prompts(1, 4, 2)]
    wrapped = task.train_prompts(1, 30)  # more than there are: problems repeat, ids do not
    assert len({p.prompt_id for p in wrapped}) == 30


def test_template_and_limits(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", gsm_rows(5))
    config = jsonl_config(
        path, eval_path=str(path), prompt_template="Q: {question} {braces}\nA:", max_eval_problems=3, max_train_problems=2
    )
    task = Gsm8kTask(config, TOKENIZER)
    assert task.eval_prompts(10)[0].text == "Q: What is 0 + 1? {braces}\nA:"
    assert len(task.eval_prompts(10)) == 3
    assert {p.answer for p in task.train_prompts(0, 10)} == {"1", "2"}


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        ('{"question": "a", "answer": "#### 1"}\n{"question": \n', r"t\.jsonl:2: not JSON"),
        ('{"question": "a", "answer": "#### 1"}\n\n[1]\n', r"t\.jsonl:3: a list"),
        ('{"question": "a"}\n', r"t\.jsonl:1: no field 'answer' among question"),
        ('{"question": "a", "answer": "no mark"}\n', r"t\.jsonl:1: .*####"),
        ('{"question": 3, "answer": "#### 1"}\n', r"t\.jsonl:1: .*a string or a list of messages, not int"),
        ("", "holds no problems"),
        ("\n\n", "holds no problems"),
        (json.dumps({"question": "long " * 50, "answer": "#### 1"}) + "\n", r"1 of 1 prompts are longer.*=64"),
    ],
)
def test_bad_data_is_named(tmp_path: Path, lines: str, problem: str) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(lines)
    with pytest.raises(UserError, match=problem) as caught:
        Gsm8kTask(jsonl_config(path, max_prompt_tokens=64), TOKENIZER)
    assert caught.value.key == "task.train_path" and caught.value.fix


def gsm_line(question: str, answer: str = "#### 1") -> str:
    return json.dumps({"question": question, "answer": answer}) + "\n"


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (gsm_line("a\ud800b"), r"t\.jsonl:2: .*lone surrogate \\ud800"),
        (gsm_line("a", "\udc80 #### 1 \udc80"), r"t\.jsonl:2: "),
        ("[" * 100_000 + "\n", r"t\.jsonl:2: nested too deeply"),
        ('{"question": "a", "answer": ' + "[" * 100_000 + "\n", r"t\.jsonl:2: nested too deeply"),
        ('{"question": ' + "9" * 10_000 + "}\n", r"t\.jsonl:2: not JSON"),
        (gsm_line("y" * 70_000_000), r"t\.jsonl:2: more than 64 MiB in one line"),
        (gsm_line("y" * 5_000_000), r"t\.jsonl:2: .*5000000 characters, far more than task.max_prompt_tokens=64"),
        (gsm_line("a\U000f0000"), r"t\.jsonl:2: .*U\+F0000"),
    ],
)
def test_hostile_lines_are_named_at_once(tmp_path: Path, line: str, problem: str) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(gsm_line("fine") + line)
    with pytest.raises(UserError, match=problem) as caught:
        Gsm8kTask(jsonl_config(path, max_prompt_tokens=64), TOKENIZER)
    assert caught.value.key == "task.train_path" and caught.value.fix


def test_an_answer_that_is_half_a_character_is_named(tmp_path: Path) -> None:
    row = {"prompt": "a", "label": "\ud800"}
    with pytest.raises(UserError, match=r"t\.jsonl:1: half a character"):
        DapoMathTask(jsonl_config(write(tmp_path / "t.jsonl", [row]), name="dapo_math"), TOKENIZER)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[5].content }}", "no element 5"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ nothing() }}", "'nothing' is undefined"),
        ("{% for %}", "."),
    ],
)
def test_a_chat_template_that_raises_names_the_line(tmp_path: Path, template: str, reason: str) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(UserError, match=rf"t\.jsonl:1: the chat template of the tokenizer refuses it: .*{reason}") as caught:
        Gsm8kTask(jsonl_config(write(tmp_path / "t.jsonl", gsm_rows(2))), tokenizer)
    assert caught.value.fix


@pytest.mark.parametrize(
    ("start", "kind"), [(b"BZh9", "a bzip2 archive"), (b"\x1f\x8b\x08", "a gzip archive"), (b"PK\x03\x04", "a zip archive")]
)
@pytest.mark.parametrize("name", ["data.jsonl", "train.parquet"])
def test_other_kinds_of_files_are_named(tmp_path: Path, start: bytes, kind: str, name: str) -> None:
    (tmp_path / name).write_bytes(start + bytes(100))
    with pytest.raises(UserError, match=f"{name}' is {kind}") as caught:
        Gsm8kTask(jsonl_config(tmp_path / name), TOKENIZER)
    assert caught.value.fix


def test_an_array_of_rows_is_told_to_be_lines(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps(gsm_rows(2), indent=1))
    with pytest.raises(UserError, match=r"t\.jsonl:1: not JSON") as caught:
        Gsm8kTask(jsonl_config(path), TOKENIZER)
    assert "array" in caught.value.fix


def test_special_tokens_in_data_are_text_and_in_templates_control_tokens(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<reserved_6>{{ m['content'] }}<reserved_7>{% endfor %}"
    question = "why <eos> and <e<pad>os>, <image>?"
    path = write(tmp_path / "t.jsonl", [{"question": question, "answer": "#### 1"}, {"question": "plain", "answer": "#### 2"}])
    task = Gsm8kTask(jsonl_config(path, prompt_template="<reserved_8>{question}"), tokenizer)
    odd, plain = sorted(task.train_prompts(0, 2), key=lambda prompt: prompt.answer)
    assert odd.text == f"<reserved_6><reserved_8>{question}<reserved_7>"
    assert list(odd.tokens) == [6, 8, *(FIRST_BYTE_ID + byte for byte in question.encode()), 7]
    assert list(plain.tokens) == tokenizer("<reserved_6><reserved_8>plain<reserved_7>").input_ids


def test_calibration_data_is_read_by_the_same_rules(tmp_path: Path) -> None:
    path = write(tmp_path / "c.jsonl", [{"text": "a<eos>b"}])
    tokens = [FIRST_BYTE_ID + byte for byte in b"a<eos>b"]
    assert read_tokens(path, TOKENIZER, 1, 64) == [tokens] and read_tokens(path, TOKENIZER, 1, 3) == [tokens[:3]]
    for bad in ({"text": "a\ud800"}, {"messages": [{"role": "user"}, 5]}):
        path = write(tmp_path / "bad.jsonl", [{"text": "fine"}, bad])
        with pytest.raises(UserError, match=r"bad\.jsonl:2: "):
            read_tokens(path, TOKENIZER, 2, 64)


def test_missing_data_is_a_user_error(tmp_path: Path) -> None:
    for source in (tmp_path / "none.jsonl", tmp_path, None):
        with pytest.raises(UserError):
            Gsm8kTask(jsonl_config(source), TOKENIZER)
    with pytest.raises(UserError, match="question"):
        Gsm8kTask(jsonl_config(write(tmp_path / "t.jsonl", gsm_rows(1)), prompt_template="no slot"), TOKENIZER)
    with pytest.raises(UserError, match="held-out"):
        Gsm8kTask(jsonl_config(tmp_path / "t.jsonl"), TOKENIZER).eval_prompts(1)
    binary = tmp_path / "b.jsonl"
    binary.write_bytes(b"\xff\xfe\x00{}\n")
    with pytest.raises(UserError, match=re.escape("b.jsonl:1")):
        Gsm8kTask(jsonl_config(binary), TOKENIZER)


def test_a_hub_id_without_the_package_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="datasets"):
        Gsm8kTask(jsonl_config("someone/some-data"), TOKENIZER)
