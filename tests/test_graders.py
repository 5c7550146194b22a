"""What each grader takes for right, what it refuses, and that code of a model is judged by what it does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from runner.config import compose
from runner.errors import UserError, UserErrors
from runner.tasks.dataset import DatasetTask, DatasetTaskConfig
from runner.tasks.jsonl import ColumnsConfig, SetConfig
from tests.answers import TOKENIZER
from tests.test_tasks import write


def task(path: Path | None, grader: str, **fields: Any) -> DatasetTask:
    base: dict[str, Any] = {
        "name": "dataset",
        "train_path": None if path is None else str(path),
        "eval_path": None,
        "max_prompt_tokens": 4096,
        "reward_timeout_seconds": 60.0,
        "seed": 0,
        "prompt_template": "{question}",
        "max_train_problems": 0,
        "max_eval_problems": 0,
        "grader": grader,
        "test_seconds": 4.0,
        "test_memory_mib": 512,
    }
    return DatasetTask(DatasetTaskConfig(**(base | fields)), TOKENIZER)


def grade(folder: Path, grader: str, text: str, **row: Any) -> float:
    of = task(write(folder / "t.jsonl", [{"prompt": "q"} | row]), grader)
    return of.reward(of.train_prompts(0, 1)[0], text)


def refused(folder: Path, grader: str, **row: Any) -> str:
    with pytest.raises(UserError) as caught:
        grade(folder, grader, "", **row)
    assert "t.jsonl:1: " in caught.value.problem and caught.value.fix
    return caught.value.problem


# ---- numbers and mathematics: the graders of gsm8k and dapo_math, whose own tests say more


@pytest.mark.parametrize(
    ("grader", "answer", "text", "reward"),
    [
        ("number", "so it is\n#### 1,234", "#### 1234", 1),
        ("number", 1234, r"\boxed{1234}", 1),
        ("number", "1234", "#### 1235", 0),
        ("math", r"\frac{1}{2}", r"\boxed{0.5}", 1),
        ("math", "x+1", r"Answer: $1 + x$", 1),
        ("math", 3, r"\boxed{4}", 0),
    ],
)
def test_numbers_and_mathematics(tmp_path: Path, grader: str, answer: Any, text: str, reward: float) -> None:
    assert grade(tmp_path, grader, text, answer=answer) == reward


def test_references_that_are_no_numbers(tmp_path: Path) -> None:
    assert "nor is a number" in refused(tmp_path, "number", answer="many")
    assert "not float" in refused(tmp_path, "math", answer=1.5)
    assert "not bool" in refused(tmp_path, "math", answer=True)
    assert "not str" in refused(tmp_path, "exact", answer="  ")


# ---- multiple choice

CITIES = ["Rome", "Paris", "A dog", "Oslo"]


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("B", 1),
        ("(b)", 1),
        ("B. Paris", 1),
        ("**B**", 1),
        ("Paris", 1),
        ("The answer is B.", 1),
        ("The answer is (B).", 1),
        ("The answer is Paris.", 1),
        ("A looks right.\nNo.\nAnswer: B", 1),
        ("Answer: (B) Paris", 1),
        ("**Answer:** B) Paris", 1),
        (r"so \boxed{B}", 1),
        (r"so \boxed{\text{(B)}}", 1),
        (r"so $\boxed{\text{B. Paris}}$", 1),
        ("Answer: option B", 1),
        ("Answer: A\nAnswer: B", 1),
        ("Answer: B\nAnswer: A", 0),
        ("Answer: A", 0),
        ("Answer: A dog", 0),
        ("Answer: A, B", 0),
        ("Answer: A and B", 0),
        ("Answer: B, C", 0),
        ("Answer: B or C", 0),
        ("B. Let us see.\nIt may be C, too.", 0),  # reasoning without a mark
        ("", 0),
        ("Answer:", 0),
        ("Berlin", 0),
    ],
)
def test_choices(tmp_path: Path, text: str, reward: float) -> None:
    assert grade(tmp_path, "choice", text, answer="B", choices=CITIES) == reward


@pytest.mark.parametrize("answer", ["B", "(B)", 1, "paris", "Paris"])
def test_the_same_choice_in_other_forms(tmp_path: Path, answer: Any) -> None:
    assert grade(tmp_path, "choice", "Answer: B", answer=answer, choices=CITIES) == 1
    assert grade(tmp_path, "choice", "Answer: C", answer=answer, choices=CITIES) == 0


def test_an_option_that_begins_with_a_letter_is_its_text(tmp_path: Path) -> None:
    assert grade(tmp_path, "choice", "Answer: A dog", answer="C", choices=CITIES) == 1
    assert grade(tmp_path, "choice", "Answer: A", answer="A") == 1, "without a list of options"


def test_choices_stand_in_the_prompt_and_labels_are_letters(tmp_path: Path) -> None:
    arc = {"text": ["ice", "fire"], "label": ["1", "2"]}
    of = task(write(tmp_path / "t.jsonl", [{"prompt": "Hot?", "answer": "2", "choices": arc}]), "choice")
    (prompt,) = of.train_prompts(0, 1)
    assert prompt.text == "Hot?\nA. ice\nB. fire" and prompt.answer == "B" and of.reward(prompt, "fire") == 1
    named = task(write(tmp_path / "n.jsonl", [{"q": "?", "key": "A", "options": ["x", "y"]}]), "choice",
                 columns=ColumnsConfig("q", "key", "options"))  # fmt: skip
    assert named.train_prompts(0, 1)[0].text == "?\nA. x\nB. y"


def test_choices_that_are_none(tmp_path: Path) -> None:
    assert "option 4, counted from 0, of 4" in refused(tmp_path, "choice", answer=4, choices=CITIES)
    assert "option 0, counted from 0, of 0" in refused(tmp_path, "choice", answer=0)
    assert "none of the 4 choices" in refused(tmp_path, "choice", answer="E", choices=CITIES)
    assert "no `choices`" in refused(tmp_path, "choice", answer="Paris")
    assert "none of the 2 choices" in refused(tmp_path, "choice", answer="x", choices=["x", "X"])
    assert "list of strings" in refused(tmp_path, "choice", answer="A", choices=[1, 2])
    assert "1 choices" in refused(tmp_path, "choice", answer="A", choices=["x"])


# ---- exact match


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("New  York\n", 1),
        ("Answer: New York", 1),
        (r"\boxed{New York}", 1),
        ("I think so.\nAnswer: NYC", 1),
        ("new york", 0),
        ("New York City", 0),
        ("It is New York", 0),
        ("", 0),
    ],
)
def test_exact_match(tmp_path: Path, text: str, reward: float) -> None:
    assert grade(tmp_path, "exact", text, answer=["New York", "NYC"]) == reward


def test_exact_match_knows_unicodes_forms(tmp_path: Path) -> None:
    assert grade(tmp_path, "exact", "cafe\u0301", answer="caf\u00e9") == 1
    assert "empty" in refused(tmp_path, "exact", answer=[])


# ---- code

ADD = "Here:\n```python\ndef add(a, b):\n    return a + b\n```\nDone."
ECHO = "```py\nimport sys\na, b = map(int, sys.stdin.readline().split())\nprint(a + b)\n```"
ASSERTS = ["assert add(1, 2) == 3", "assert add('a', 'b') == 'ab'"]
PRINTS = {"inputs": ["1 2\n", "-5 5"], "outputs": ["3\n", "0"]}
CALLS = {"inputs": [[1, 2], [[1], [2]]], "outputs": [3, [1, 2]], "fn_name": "add"}
SOLUTION = "```python\nclass Solution:\n    def add(self, a, b):\n        print('noise')\n        return a + b\n```"


@pytest.mark.parametrize(
    ("tests", "text", "reward"),
    [
        (ASSERTS, ADD, 1),
        ("\n".join(ASSERTS), ADD, 1),
        (json.dumps(ASSERTS), ADD, 1),
        (ASSERTS, ADD.replace("a + b", "3"), 0),
        (ASSERTS, ADD.replace("def add", "def sub"), 0),
        (ASSERTS, ADD.replace("return a + b", "return ("), 0),
        (ASSERTS, "```python\nimport os\nos._exit(0)\n```", 0),  # ends before the tests, without an error
        (ASSERTS, "```python\nraise SystemExit\n```", 0),
        (ASSERTS, "```python\nimport sys\nsys.stdout = None\n" + ADD.partition("```python\n")[2], 1),
        (ASSERTS, "def add(a, b):\n    return a + b", 0),  # no block
        (ASSERTS, ADD + "\nBetter:\n```python\ndef add(a, b):\n    return 3\n```", 0),  # the last one counts
        (ASSERTS, "```python\ndef add(a, b):\n    return a + b\n", 0),  # cut off
        (PRINTS, ECHO, 1),
        (json.dumps(PRINTS), ECHO, 1),
        (PRINTS, ECHO.replace("a + b", "3"), 0),
        (PRINTS, "```\nprint(sum(map(int, input().split())), end='  \\n\\n')\n```", 1),  # blanks at ends do not count
        (PRINTS, "```\nimport sys\nprint(sum(map(int, sys.stdin.buffer.read().split())))\n```", 1),
        (CALLS, ADD, 1),
        (CALLS, SOLUTION, 1),
        (CALLS, SOLUTION.replace("a + b", "1"), 0),
        (CALLS, "```python\nclass Any:\n    __eq__ = lambda self, other: True\ndef add(a, b):\n    return Any()\n```", 0),
        ({"inputs": [[]], "outputs": [1], "fn_name": "f"}, "```python\ndef f():\n    return True\n```", 0),
        ({"inputs": [[]], "outputs": [[1, 2]], "fn_name": "f"}, "```python\ndef f():\n    return 1.0, 2\n```", 1),
    ],
)
def test_code(tmp_path: Path, tests: Any, text: str, reward: float) -> None:
    assert grade(tmp_path, "code", text, answer=tests) == reward


def test_code_that_runs_away_is_wrong_within_its_time(tmp_path: Path) -> None:
    of = task(write(tmp_path / "t.jsonl", [{"prompt": "q", "answer": PRINTS}]), "code", test_seconds=0.5)
    (prompt,) = of.train_prompts(0, 1)
    assert of.reward(prompt, "```python\nwhile True: pass\n```") == 0
    assert of.reward(prompt, "```python\nwhile True: print('x' * 10**5)\n```") == 0
    assert of.reward(prompt, "```python\nimport socket\nsocket.socket()\nprint(3)\n```") == 0


def test_unit_tests_that_are_none(tmp_path: Path) -> None:
    assert "no Python: " in refused(tmp_path, "code", answer=["assert ("])
    assert "no Python: " in refused(tmp_path, "code", answer=["(" * 5000])
    assert "begin like JSON" in refused(tmp_path, "code", answer='{"inputs": ')
    assert "as many `outputs`" in refused(tmp_path, "code", answer={"inputs": ["1"], "outputs": []})
    assert "lists of arguments" in refused(tmp_path, "code", answer={"inputs": ["1"], "outputs": ["1"], "fn_name": "f"})
    assert "no name of a function" in refused(tmp_path, "code", answer={"inputs": [[1]], "outputs": [1], "fn_name": "f()"})
    assert "201 unit tests" in refused(tmp_path, "code", answer={"inputs": ["1"] * 201, "outputs": ["1"] * 201})
    assert "1 to 200 texts" in refused(tmp_path, "code", answer=[])
    assert "not int" in refused(tmp_path, "code", answer=3)


# ---- as a task


def test_sets_of_a_mixture_have_graders_of_their_own(tmp_path: Path) -> None:
    maths = write(tmp_path / "maths.jsonl", [{"prompt": "1/2?", "answer": "0.5"}])
    quiz = write(tmp_path / "quiz.jsonl", [{"prompt": "B?", "answer": "B", "choices": ["x", "0.5"]}])
    mix = {"maths": SetConfig(str(maths), 1), "quiz": SetConfig(str(quiz), 1)}
    of = task(None, "math", mix=mix, graders={"quiz": "choice"})
    first, second = sorted(of.train_prompts(0, 2), key=lambda prompt: prompt.text)
    assert [of.reward(first, text) for text in (r"\boxed{\frac12}", "Answer: B")] == [1, 0]
    assert [of.reward(second, text) for text in ("Answer: 0.5", "Answer: B", "Answer: A")] == [1, 1, 0]


def test_what_it_refuses() -> None:
    given = ["task=dataset", "task.train_path=a.jsonl", "task.eval_path=b.jsonl", "task.max_prompt_tokens=64", "model=tiny_dense"]
    with pytest.raises(UserErrors) as caught:
        compose.load([*given, "task.grader=chioce", "+task.graders.math=maths", "task.test_seconds=60"])
    told = str(caught.value)
    assert "task.grader=choice" in told and "'math' is none of the data sets" in told and "'maths' is none of number" in told
    with pytest.raises(UserErrors, match="one test may take 60 s"):
        compose.load([*given, "task.grader=code", "task.test_seconds=60"])
