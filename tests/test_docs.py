"""docs/ and README: every code block is run here, or its title says what it needs; the site builds without a warning."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from runner.__main__ import main
from runner.config import compose
from runner.config.searchpath import groups
from runner.errors import UserErrors
from tests.docs_pages import ELSEWHERE, KINDS, NOT_RUN, PRINTS, ROOT, Block, Command, all_blocks, blocks, pages, run

BLOCKS = all_blocks()
QUICK = [block for block in BLOCKS if block.kind == "sh" and block.is_run and all(command.quick for command in block.commands)]
LONG = sorted({block.page for block in BLOCKS if block.kind == "sh" and block.is_run and block not in QUICK})
IN_CI = ("quickstart.md", "tracking.md", "sweeps.md")  # the runs of the others are of the night


SEEN: dict[str, tuple[int, str]] = {}  # line -> exit code, what it printed


def write_files(page: str, folder: Path) -> None:
    for block in BLOCKS:
        if block.page == page and block.file:
            (folder / block.file).parent.mkdir(parents=True, exist_ok=True)
            (folder / block.file).write_text(block.body.partition("\n")[2])


def squeezed(text: str) -> str:
    return re.sub(r"\s+", " ", text)


def assert_shown(block: Block, printed: str) -> None:
    """Each line that the page shows, as far as its first `...`, is part of what was printed."""
    for line in block.shows.splitlines():
        part = squeezed(line.split("...")[0]).strip()
        assert part in squeezed(printed), f"{block} shows {part!r}, printed was\n{printed}"


def test_every_block_is_of_a_kind_that_is_run_or_says_what_it_needs() -> None:
    assert len(BLOCKS) > 40 and len(QUICK) > 10
    for block in BLOCKS:
        assert block.kind in KINDS, f"{block}: {block.body[:60]!r}"
        titled = (*NOT_RUN, PRINTS)
        assert not block.title or block.kind == "text" or block.title.startswith(titled), f"{block}: {block.title!r}"
        if block.kind == "yaml" and not block.title:
            assert block.file, f"{block} names no file"
        if block.kind == "text" and not block.title:
            before = blocks(ROOT / "docs" / block.page if block.page != "README.md" else ROOT / block.page)[block.number - 1]
            assert before.shows == block.body, f"{block} stands behind no command"
    for path in pages():
        fences = re.findall(r"^ *```", path.read_text(), flags=re.MULTILINE)
        assert len(fences) == 2 * len(blocks(path)), f"{path.name}: a fence that is not read here"
        if path.name in ELSEWHERE:
            assert path.name in (ROOT / ELSEWHERE[path.name]).read_text()


@pytest.mark.parametrize("block", QUICK, ids=str)
def test_commands_that_start_nothing(
    block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_files(block.page, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    printed = ""
    for command in block.commands:
        for name, value in command.environment.items():
            monkeypatch.setenv(name, value)
        if command.line not in SEEN:  # several pages show the same plan
            SEEN[command.line] = main(command.arguments), "".join(capsys.readouterr())
        code, text = SEEN[command.line]
        printed += text
        assert (code != 0) == block.title.startswith(PRINTS), f"{command.line}: exit code {code}\n{printed}"
    assert printed
    assert_shown(block, printed)


def composable() -> list[str]:
    """Lines of blocks that are not run, whose keys can be held against the schema."""
    found = []
    for block in BLOCKS:
        if block.kind == "sh" and not block.is_run:
            for command in block.commands:
                composes = command.arguments and command.verb in ("run", "plan") and "resume=RUN" not in command.arguments
                if composes and "model=auto" not in command.arguments:
                    found.append(command.line)
    return found


@pytest.mark.parametrize("line", composable())
def test_commands_that_need_something_compose(line: str, tmp_path: Path) -> None:
    arguments = [word for word in Command(line).arguments if "=" in word]
    checkpoint = [word for word in arguments if word.endswith("=DIR")]  # whose config.json is not here
    composed = compose.load([word for word in arguments if word not in checkpoint], check_rules=not checkpoint)
    assert composed.config


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("page", [pytest.param(page, marks=[] if page in IN_CI else pytest.mark.night) for page in LONG])
def test_the_runs_of_a_page(page: str, tmp_path: Path) -> None:
    """One after the other, as a reader types them, in few steps of small batches."""
    write_files(page, tmp_path)
    steps = 0
    for block in BLOCKS:
        if block.page != page or not block.is_run or block.file:
            continue
        if block.kind == "sh" and block not in QUICK:
            for command in block.commands:
                steps += 1  # a run that is made longer has something to do
                assert run(command, tmp_path, steps)
        elif block.kind == "python":
            assert run(Command("python program.py"), _program(tmp_path, block.body), steps)


def _program(folder: Path, body: str) -> Path:
    (folder / "program.py").write_text(body)
    return folder


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_site_builds_without_a_warning_and_needs_no_network(tmp_path: Path) -> None:
    for module in ("mkdocs", "material", "mkdocstrings"):
        pytest.importorskip(module, reason="make docs installs it")
    command = [sys.executable, "-m", "mkdocs", "build", "-q", "--strict", "-d", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    built = {path.name: path.read_text() for path in tmp_path.rglob("*.html")}
    assert {f"{path.stem}.html" for path in (ROOT / "docs").glob("*.md")} <= set(built)
    for name, text in built.items():
        loads = re.findall(r'<(?:script|img|iframe)[^>]*src="([^"]+)"|<link[^>]*rel="stylesheet"[^>]*href="([^"]+)"', text)
        assert not [url for pair in loads for url in pair if url.startswith(("http", "//"))], name
    assert "staleness" in (tmp_path / "search" / "search_index.js").read_text()
    assert "TrainerLayout" in built["api.html"]


def runs(precision: str, trainer: str, rollout: str, model: str, *, gpu: bool) -> bool:
    """Whether the rules allow it, on one GPU or on CPU ranks."""
    cpu = ["parallelism=cpu2", "parallelism.tp=1"] if trainer == "megatron" else []
    words = [f"precision={precision}", f"trainer={trainer}", f"rollout={rollout}", f"model={model}", "speculative=none"]
    words.append("model.num_kv_heads=4")  # FP8 blocks of 128 rows in every projection that SGLang merges
    try:
        compose.load([*words, *(["parallelism=h200x1"] if gpu else cpu)])
    except UserErrors:
        return False
    return True


@pytest.mark.slow
@pytest.mark.parametrize("sides", [("torch", "local"), ("torch", "sglang"), ("megatron", "local"), ("megatron", "sglang")])
def test_the_matrix_of_readme_is_what_the_rules_say(sides: tuple[str, str]) -> None:
    rows = re.findall(r"^\| (`.*?) \| (.*?) \| (.*?) \| (.*?) \| (.*?) \|$", (ROOT / "README.md").read_text(), flags=re.MULTILINE)
    column = 1 + [("torch", "local"), ("torch", "sglang"), ("megatron", "local"), ("megatron", "sglang")].index(sides)
    told = {name: row[column] for row in rows for name in re.findall(r"`(\w+)`", row[0])}
    assert set(told) == set(groups()["precision"])
    for precision, cell in told.items():
        allowed = {gpu: runs(precision, *sides, "tiny_moe", gpu=gpu) for gpu in (False, True)}
        assert cell.startswith("text") == allowed[True], f"{precision}: {cell}"
        assert (allowed[True] and not allowed[False]) == ("GPU" in cell), f"{precision}: {cell}"
        assert ("images" in cell) == runs(precision, *sides, "tiny_vlm", gpu=False), f"{precision}: {cell}"


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "examples/README.md"])
def test_links_of_pages_beside_the_site_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text()
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not link.startswith(("http", "#"))]
    for link in links:
        path, _, anchor = link.partition("#")
        there = (ROOT / page).parent / path
        assert there.exists(), f"{page}: {link}"
        titles = re.findall(r"^#+ (.*)$", there.read_text(), flags=re.MULTILINE) if anchor else []
        assert not anchor or anchor in [title.lower().replace(" ", "-") for title in titles], f"{page}: {link}"
