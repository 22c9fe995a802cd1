"""The README: short, readable, and true. Its code runs; its output, commands and figures are real."""

from __future__ import annotations

import contextlib
import io
import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer
from PIL import Image

import figure
from cria_prune.cli.main import app

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
LINES, LONG = 200, 28
"""At most so many lines; and nine sentences of ten have at most so many words."""
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
ELSEWHERE = {"93.46", "93.53", "93.77", "2.11", "2.57", "3.11"}
"""Numbers of no table here: DepGraph's own on ResNet-56, how many times fewer MACs, and Python's version."""


def prose(text: str) -> list[str]:
    """Return the sentences of a page: no code, table, heading or picture, and of a link its words."""
    text = re.sub(r"<!--.*?-->", "", BLOCK.sub("\n\n", text), flags=re.DOTALL)
    text = re.sub(r"!\[.*?\]\(.*?\)", "", text)
    text = re.sub(r"\[(.*?)\]\(.*?\)", r"\1", text)
    lines = ["" if line.startswith(("#", "|")) else line for line in text.splitlines()]
    text = re.sub(r"^ *([-*]|\d\.) ", "\n\n", "\n".join(lines), flags=re.MULTILINE)
    paragraphs = (" ".join(part.split()) for part in text.split("\n\n"))
    return [said for part in paragraphs for said in re.split(r"(?<=[.!?])\*{0,2}\s+", part) if said]


def test_it_is_short() -> None:
    assert len(README.splitlines()) <= LINES


@pytest.mark.parametrize("page", ["README.md", "docs/findings.md", "docs/criteria.md"])
def test_sentences_are_short(page: str) -> None:
    words = sorted(len(said.split()) for said in prose((ROOT / page).read_text()))
    assert len(words) > 30
    assert words[int(0.9 * len(words))] <= LONG
    assert sum(words) / len(words) <= 20


def test_sentences_are_counted_as_a_reader_does() -> None:
    page = "# Title\n\nOne two. Three [four five](x.md):\n- **Six.** Seven\n  eight\n\n"
    page += "```\nnot this\n```\n| nor | this |\n"
    assert prose(page) == ["One two.", "Three four five:", "**Six.", "Seven eight"]


def test_the_first_python_block_runs_and_prints_what_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (kind, code), (_, shown) = ((found[1], found[2]) for found in list(BLOCK.finditer(README))[1:3])
    assert kind == "python" and len(code.strip().splitlines()) <= 12
    monkeypatch.chdir(tmp_path)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(code, "README.md", "exec"), {})
    assert (tmp_path / "small" / "model.safetensors").exists()
    assert blanked(shown) == blanked(printed.getvalue())


def blanked(text: str) -> list[str]:
    """What was printed, but for the size of a rounding error, which differs between machines."""
    return [re.sub(r"\d\.?\d*e-1\d", "…", line).rstrip() for line in text.strip().splitlines()]


def test_every_command_and_option_exists() -> None:
    group: Any = typer.main.get_command(app)
    context = typer.Context(group)
    shown = [line for found in BLOCK.finditer(README) for line in found[2].splitlines()]
    commands = [line.split("#")[0].split() for line in shown if line.startswith("cria ")]
    assert {words[1] for words in commands} == set(group.list_commands(context))
    for words in commands:
        known = {flag for item in group.get_command(context, words[1]).params for flag in item.opts}
        assert {word for word in words if word.startswith("--")} <= known, words


def test_every_extra_is_named() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = set(re.findall(r"`([\w-]+)`", README.split("| extra |")[1].split("\n\n")[0]))
    assert set(project["optional-dependencies"]) - {"dev", "docs"} <= named


def test_figures_in_the_text_stand_in_the_tables() -> None:
    """Every number with two decimals of the README and the findings is one of a table, or the peer's own."""
    pages = [(ROOT / "docs" / name).read_text() for name in ("results.md", "scale.md")]
    rows = [line for page in pages for line in page.splitlines() if line.startswith(("|", "Dense"))]
    known = set(re.findall(r"\d+\.\d\d\b", "\n".join(rows))) | ELSEWHERE
    for page in (README, (ROOT / "docs" / "findings.md").read_text()):
        said = set(re.findall(r"(?<![.\d])\d+\.\d\d(?!\d)(?= |,|;|:|\.|\)|$)", "\n".join(prose(page))))
        assert len(said) > 5
        assert said - known == set()


def test_the_picture_is_drawn_from_the_result_files() -> None:
    kept = figure.NUMBERS.read_text()
    assert json.loads(kept) == figure.numbers() and kept == figure.text(figure.numbers())
    with Image.open(figure.PICTURE) as picture:
        assert picture.info["Description"] == figure.signature(kept)
        assert picture.width >= 1600 and picture.getpixel((2, 2))[:3] == (255, 255, 255)
