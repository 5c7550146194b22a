"""Parquet, Arrow and folders of them; columns by other names; chat messages; what is wrong with a row is named with its place."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from runner.config import compose, preflight
from runner.convert.calibration import read_tokens
from runner.errors import UserError, UserErrors
from runner.models.tokenizer import byte_tokenizer
from runner.tasks import files
from runner.tasks.dapo_math import DapoMathTask
from runner.tasks.files import Split, needs_arrow
from runner.tasks.gsm8k import Gsm8kTask
from runner.tasks.jsonl import ColumnsConfig
from tests.answers import TOKENIZER
from tests.test_geo3k import geo3k, png
from tests.test_tasks import gsm_rows, jsonl_config, write

pa = pytest.importorskip("pyarrow", reason="make setup")
pq = pytest.importorskip("pyarrow.parquet")

TRAIN = Split("train.jsonl", "train", ("train",))
TEST = Split("test.jsonl", "test", ("test", "validation"))


def parquet(path: Path, rows: list[dict[str, Any]], **how: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, **how)
    return path


def saved(folder: Path, shards: list[list[dict[str, Any]]]) -> Path:
    """As `datasets` 5.2 saves a data set: Arrow streams, and a state that names them in order."""
    folder.mkdir(parents=True)
    names = [f"data-{index:05}-of-{len(shards):05}.arrow" for index in range(len(shards))]
    for name, rows in zip(names, shards, strict=True):
        table = pa.Table.from_pylist(rows)
        with pa.OSFile(str(folder / name), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (folder / "dataset_info.json").write_text("{}")
    return folder


def read(source: Path, split: Split = TRAIN) -> list[Any]:
    return [row["question"] for _, row in files.rows(str(source), "task.train_path", split)]


def numbered(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [{"question": f"q{index}", "answer": f"#### {index}"} for index in range(start, start + count)]


def test_the_same_rows_are_the_same_problems_in_every_kind_of_file(tmp_path: Path) -> None:
    rows = gsm_rows(150)  # more than are read at once
    table = pa.Table.from_pylist(rows)
    with pa.OSFile(str(tmp_path / "file.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=40)
    sources = [
        write(tmp_path / "t.jsonl", rows),
        parquet(tmp_path / "t.parquet", rows, row_group_size=70, compression="zstd"),
        tmp_path / "file.arrow",
        saved(tmp_path / "saved", [rows[:100], rows[100:]]),
    ]
    tasks = [Gsm8kTask(jsonl_config(source), TOKENIZER) for source in sources]
    texts = [[prompt.text for prompt in task.train_prompts(1, 40)] for task in tasks]
    assert all(found == texts[0] for found in texts) and len(set(texts[0])) == 40
    assert len({task.data_state(0, 1)["contents"] for task in tasks}) == 1, "a run goes on with a converted file"
    places = {prompt.info["place"] for prompt in tasks[1].train_prompts(0, 150)}
    assert places == {f"{sources[1]}:{row}" for row in range(1, 151)}


def test_folders_of_splits_and_shards(tmp_path: Path) -> None:
    hub = tmp_path / "hub"
    for split, shard, start in (("train", 0, 0), ("train", 1, 3), ("test", 0, 9)):
        parquet(hub / "data" / f"{split}-{shard:05}-of-00002.parquet", numbered(3, start))
    assert read(hub) == [f"q{i}" for i in range(6)] and read(hub, TEST) == ["q9", "q10", "q11"]
    plain = tmp_path / "plain"
    for split in ("train", "validation"):
        parquet(plain / f"{split}.parquet", numbered(2, 5 * (split != "train")))
    assert read(plain) == ["q0", "q1"] and read(plain, TEST) == ["q5", "q6"]
    unnamed = tmp_path / "unnamed"
    parquet(unnamed / "part-1.parquet", numbered(1, 1))
    parquet(unnamed / "part-0.parquet", numbered(1, 0))
    parquet(unnamed / ".cache" / "part-9.parquet", numbered(1, 9))
    assert read(unnamed) == ["q0", "q1"], "the whole folder, in the order of names"
    both = tmp_path / "both"
    saved(both / "train", [numbered(2)]), saved(both / "test", [numbered(1, 7)])
    (both / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert read(both) == ["q0", "q1"] and read(both, TEST) == ["q7"]
    configs = tmp_path / "configs"
    for config in ("main", "socratic"):
        parquet(configs / config / "train-00000-of-00001.parquet", numbered(1, len(config)))
    assert read(configs, Split("train.jsonl", "train", ("train",), "main")) == ["q4"]
    with pytest.raises(UserError, match="lie in main, socratic"):
        read(configs)


def test_a_folder_is_not_evaluated_on_what_it_trains(tmp_path: Path) -> None:
    parquet(tmp_path / "unnamed" / "part-0.parquet", numbered(4))
    with pytest.raises(UserError, match=r"4 problems of .* are trained on, too; the first is .*part-0.parquet:1") as caught:
        Gsm8kTask(jsonl_config(tmp_path / "unnamed", eval_path=str(tmp_path / "unnamed")), TOKENIZER)
    assert caught.value.key == "task.eval_path"
    for split, start in (("train", 0), ("test", 4)):
        parquet(tmp_path / "named" / f"{split}.parquet", numbered(4, start))
    task = Gsm8kTask(jsonl_config(tmp_path / "named", eval_path=str(tmp_path / "named")), TOKENIZER)
    assert [prompt.text for prompt in task.eval_prompts(9)] == ["q4", "q5", "q6", "q7"]


def test_folders_without_what_is_asked_for_say_what_there_is(tmp_path: Path) -> None:
    parquet(tmp_path / "a" / "train.parquet", numbered(1))
    with pytest.raises(UserError, match="holds train; wanted is test or validation"):
        read(tmp_path / "a", TEST)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no train\.jsonl, no Parquet files and no saved data set"):
        read(tmp_path / "empty")
    index = saved(tmp_path / "index", [numbered(1)])
    (index / "state.json").write_text('{"_data_files": [], "_indices_data_files": [{"filename": "i.arrow"}]}')
    with pytest.raises(UserError, match="under an index") as caught:
        read(index)
    assert "flatten_indices" in str(caught.value.fix)
    for text in ("{", "[]", "{}", '{"_data_files": 3}'):
        (index / "state.json").write_text(text)
        with pytest.raises(UserError, match=r"state\.json"):
            read(index)


VERL = {
    "data_source": "math",
    "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"}],
    "ability": "math",
    "reward_model": {"style": "rule", "ground_truth": "2"},
    "extra_info": {"index": 0, "split": "train"},
}


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_columns_of_other_programs(tmp_path: Path, kind: str) -> None:
    def written(name: str, rows: list[dict[str, Any]]) -> Path:
        path = tmp_path / f"{name}.{kind}"
        return parquet(path, rows) if kind == "parquet" else write(path, rows)

    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<reserved_6>{{ m['role'] }}:{{ m['content'] }}<reserved_7>{% endfor %}"
    verl = ColumnsConfig("prompt", "reward_model.ground_truth")
    task = Gsm8kTask(jsonl_config(written("verl", [VERL]), columns=verl, prompt_template="Q: {question}"), tokenizer)
    (prompt,) = task.train_prompts(0, 1)
    assert prompt.text == "<reserved_6>system:Be brief.<reserved_7><reserved_6>user:Q: 1+1?<reserved_7>"
    assert prompt.answer == "2" and task.reward(prompt, "#### 2") == 1.0 and task.reward(prompt, "#### 3") == 0.0
    (as_it_is,) = DapoMathTask(jsonl_config(tmp_path / f"verl.{kind}", name="dapo_math"), tokenizer).train_prompts(0, 1)
    assert as_it_is.text.endswith("user:1+1?<reserved_7>") and as_it_is.answer == "2"
    slime = written("slime", [{"messages": VERL["prompt"], "label": 2, "a.b": "not this one"}])
    task = Gsm8kTask(jsonl_config(slime, columns=ColumnsConfig("messages", "label")), tokenizer)
    assert task.train_prompts(0, 1)[0].answer == "2"
    dotted = written("dotted", [{"messages": "1+1?", "a.b": "2"}])
    assert (
        Gsm8kTask(jsonl_config(dotted, columns=ColumnsConfig("messages", "a.b")), tokenizer).train_prompts(0, 1)[0].answer == "2"
    )


@pytest.mark.parametrize(
    ("columns", "problem"),
    [
        (("text", None), r":1: no column 'text': there are question, answer, meta$"),
        (("meta.text", None), r":1: no column 'meta.text': meta has id$"),
        (("question.text", None), r":1: no column 'question.text': question is str, without fields"),
        (("meta", None), r":1: `question` must be a string or a list of messages, not dict"),
        ((None, "meta"), r":1: `answer` must be a string or an integer"),
    ],
)
def test_a_column_that_is_not_there_is_told_with_those_that_are(
    tmp_path: Path, columns: tuple[str | None, str | None], problem: str
) -> None:
    path = parquet(tmp_path / "t.parquet", [{"question": "a", "answer": "#### 1", "meta": {"id": 3}}])
    with pytest.raises(UserError) as caught:
        Gsm8kTask(jsonl_config(path, columns=ColumnsConfig(*columns)), TOKENIZER)
    assert re.search(problem, caught.value.problem) and caught.value.key == "task.train_path" and caught.value.fix


@pytest.mark.parametrize(
    ("prompt", "problem"),
    [
        ([], "no messages"),
        ([{"role": "user", "content": None}], "every message"),
        ([{"role": "user"}], "every message"),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "ends with an answer"),
        (None, "a string or a list of messages, not NoneType"),
        ({"role": "user"}, "not dict"),
    ],
)
def test_conversations_that_are_none(tmp_path: Path, prompt: Any, problem: str) -> None:
    path = write(tmp_path / "t.jsonl", [{"prompt": "fine", "label": "1"}, {"prompt": prompt, "label": "1"}])
    with pytest.raises(UserError, match=rf"t\.jsonl:2: .*{problem}"):
        DapoMathTask(jsonl_config(path, name="dapo_math"), TOKENIZER)


def table(question: pa.Array, answer: pa.Array) -> pa.Table:
    return pa.table({"question": question, "answer": answer})


BROKEN = pa.array([b"fine", b"a\xed\xa0\x80b"]).view(pa.string()) if hasattr(pa, "array") else None
ONES = pa.array(["#### 1", "#### 1"])


@pytest.mark.parametrize(
    ("columns", "problem"),
    [
        ((BROKEN, ONES), r"t\.parquet:2: .*(utf-8|UTF8|Invalid)"),  # half a character, written as three bytes
        ((pa.array(["fine", "y" * (65 << 20)]), ONES), r"t\.parquet:2: more than 64 MiB in one row"),
        ((pa.array(["fine", "y" * 5_000_000]), ONES), r"t\.parquet:2: .*far more than task.max_prompt_tokens=64"),
        ((pa.array(["fine", "a\U000f0000"]), ONES), r"t\.parquet:2: .*U\+F0000"),
        ((pa.array(["fine", None]), ONES), r"t\.parquet:2: .*not NoneType"),
        ((pa.array([1.5, 2.5]), ONES), r"t\.parquet:1: .*not float"),
        ((pa.array([b"fine", b"fine"]), ONES), r"t\.parquet:1: .*not bytes"),
        ((pa.array(["fine", "fine"]), pa.array([[1], [2]])), r"t\.parquet:1: `answer` must be a string or an integer"),
        ((pa.array(["fine", "fine"]), pa.array([True, False])), r"t\.parquet:1: `answer` must be a string or an integer"),
    ],
    ids=["utf8", "huge", "long", "private", "null", "float", "bytes", "list", "bool"],
)
def test_hostile_rows_are_named(tmp_path: Path, columns: tuple[pa.Array, pa.Array], problem: str) -> None:
    pq.write_table(table(*columns), tmp_path / "t.parquet")
    with pytest.raises(UserError, match=problem) as caught:
        Gsm8kTask(jsonl_config(tmp_path / "t.parquet", max_prompt_tokens=64), TOKENIZER)
    assert caught.value.key == "task.train_path" and caught.value.fix


def test_control_tokens_of_a_table_are_text(tmp_path: Path) -> None:
    path = parquet(tmp_path / "t.parquet", [{"question": "why <eos>?", "answer": "#### 1"}])
    (prompt,) = Gsm8kTask(jsonl_config(path), TOKENIZER).train_prompts(0, 1)
    assert prompt.text == "why <eos>?" and TOKENIZER.eos_token_id not in prompt.tokens


@pytest.mark.parametrize("cut", [5, 40, -9, -1])
@pytest.mark.parametrize("name", ["t.parquet", "t.arrow"])
def test_damaged_files_are_told(tmp_path: Path, name: str, cut: int) -> None:
    whole = parquet(tmp_path / "whole.parquet", numbered(9)).read_bytes()
    if name.endswith("arrow"):
        whole = (saved(tmp_path / "s", [numbered(9)]) / "data-00000-of-00001.arrow").read_bytes()
        cut = cut if cut > 0 else 200
    path = tmp_path / name
    path.write_bytes(whole[:cut])
    with pytest.raises(UserError, match=rf"{name}'"):
        read(path)


def test_missing_files_of_a_saved_set(tmp_path: Path) -> None:
    folder = saved(tmp_path / "s", [numbered(1), numbered(1)])
    (folder / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(UserError, match="cannot read .*data-00001.*No such file"):
        read(folder)


def test_pyarrow_is_asked_for_where_a_file_needs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tables, lines = parquet(tmp_path / "d" / "train.parquet", gsm_rows(2)), write(tmp_path / "t.jsonl", gsm_rows(2))
    assert needs_arrow(str(tables)) and needs_arrow(str(tables.parent)) and not needs_arrow(str(lines))
    monkeypatch.setattr(preflight, "installed", lambda module: module != "pyarrow")
    given = ["task=gsm8k", "model=tiny_dense", "task.max_prompt_tokens=64", f"task.eval_path={lines}", "warm_start.enabled=false"]
    with pytest.raises(UserErrors, match=r"(?s)pyarrow, which is not installed.*pip install 'runner\[data\]'"):
        preflight.check(compose.load([*given, f"task.train_path={tables}"]).config)
    preflight.check(compose.load([*given, f"task.train_path={lines}"]).config)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="not installed") as caught:
        read(tables)
    assert caught.value.fix == files.INSTALL


def test_calibration_reads_tables_too(tmp_path: Path) -> None:
    path = parquet(tmp_path / "c.parquet", [{"text": "abc"}, {"text": "defg"}])
    assert [len(tokens) for tokens in read_tokens(path, TOKENIZER, 2, 64)] == [3, 4]


def test_images_in_a_table_are_those_beside_it(tmp_path: Path) -> None:
    """As `datasets` keeps images, and as verl's Geometry3K asks with chat messages."""
    (tmp_path / "1.png").write_bytes(png(seed=1))
    held = {"bytes": (tmp_path / "1.png").read_bytes(), "path": "elsewhere.png"}
    rows = [
        {"problem": "<image>Find x.", "answer": "12", "images": [held]},
        {"problem": "<image>Find x.", "answer": "12", "images": [{"bytes": None, "path": "1.png"}]},
    ]
    path = parquet(tmp_path / "t.parquet", rows)
    chat = parquet(
        tmp_path / "chat.parquet", [{"prompt": [{"role": "user", "content": "<image>Find x."}], "answer": "12", "images": [held]}]
    )
    tasks = [
        geo3k(tmp_path, [{"problem": "<image>Find x.", "answer": "12", "image": "1.png"}]),
        geo3k(tmp_path, [], f"task.train_path={path}", f"task.eval_path={path}"),
        geo3k(tmp_path, [], f"task.train_path={chat}", f"task.eval_path={chat}", "task.columns.prompt=prompt"),
    ]
    (beside,), (inside, named), (asked,) = (task.eval_prompts(9) for task in tasks)
    for prompt in (inside, named, asked):
        assert (prompt.text, prompt.tokens) == (beside.text, beside.tokens)
        assert (prompt.images[0].pixels == beside.images[0].pixels).all()
