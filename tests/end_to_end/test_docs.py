"""The documentation: links, anchors, the reference, the method's sections, and what a page must not say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from runpy import run_path
from typing import Any

import pytest
import yaml
from markdown.extensions.toc import slugify

import cria_prune

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
TEXTS = [*sorted(ROOT.glob("*.md")), *PAGES]
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def prose(path: Path) -> str:
    """Return a page without its blocks of code."""
    return re.sub(r"^```.*?^```", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)


@cache
def anchors(path: Path) -> frozenset[str]:
    """Return what a link into a page may end with: its headings, and its entries of the reference."""
    titles = re.findall(r"^#+ +(.+)$", prose(path), re.MULTILINE)
    entries = re.findall(r"^::: cria_prune\.(?:\w+\.)*(\w+)$", prose(path), re.MULTILINE)
    return frozenset([slugify(re.sub(r"[`*]", "", title), "-") for title in titles] + entries)


@pytest.mark.parametrize("page", TEXTS, ids=name_of)
def test_relative_links_and_anchors_lead_somewhere(page: Path) -> None:
    for link in LINK.findall(re.sub(r"`[^`\n]*`", "", prose(page))):
        if re.match(r"[a-z]+:", link):
            continue
        place, _, anchor = link.partition("#")
        target = (page.parent / place).resolve() if place else page
        assert target.exists(), f"{name_of(page)} links to {link}"
        if page.is_relative_to(DOCS):
            assert target.is_relative_to(DOCS), f"{name_of(page)} links out of the site: {link}"
        if anchor:
            assert anchor in anchors(target), f"{name_of(page)} links to {link}"


def test_every_public_name_has_one_entry_in_the_reference() -> None:
    reference = "\n".join(path.read_text() for path in sorted((DOCS / "reference").glob("*.md")))
    entries = re.findall(r"^::: cria_prune\.(\w+)$", reference, re.MULTILINE)
    if "<!-- made: settings -->" in reference:  # an entry and a table for each, see docs/hooks.py
        entries += [name for name in cria_prune.__all__ if name.endswith("Config")]
    assert sorted(entries) == sorted(cria_prune.__all__)


def test_references_to_the_method_resolve() -> None:
    sections = set(re.findall(r"^## (\d+)\. ", (DOCS / "method.md").read_text(), re.MULTILINE))
    assert len(sections) >= 7
    cited = 0
    for folder in ("src", "tests", "benchmarks", "examples"):
        for path in (ROOT / folder).rglob("*.py"):
            if path == Path(__file__):
                continue
            text = path.read_text()
            assert "METHOD" not in text, f"{name_of(path)}: say docs/method.md, and the section"
            for numbers in re.findall(r"docs/method\.md,? sections? ([\d, and]*\d)", text):
                cited += 1
                assert set(re.findall(r"\d+", numbers)) <= sections, f"{name_of(path)} cites {numbers}"
    assert cited >= 10


def test_other_paths_into_docs_resolve_too() -> None:
    for folder in ("src", "tests", "benchmarks", "examples"):
        for path in (ROOT / folder).rglob("*.py"):
            for cited in re.findall(r"\bdocs/(?:\w+/)?[\w-]+(?:\.md)?\b", path.read_text()):
                found = cited if cited.endswith(".md") else f"{cited}*"
                assert list(ROOT.glob(found)), f"{name_of(path)} names {cited}"


def test_modules_that_the_source_names_exist() -> None:
    """In its docstrings and comments: `cria_prune.room.module`, `room.module.name` and `room/module.py`."""
    source = ROOT / "src" / "cria_prune"
    rooms = "|".join(path.name for path in source.iterdir() if path.is_dir() and path.name[0] != "_")
    dotted = re.compile(rf"`(?:cria_prune\.(\w+(?:\.\w+)*)|((?:{rooms})\.\w+(?:\.\w+)*))`")
    cited = 0
    for path in source.rglob("*.py"):
        text = path.read_text()
        for name in re.findall(r"`(?:src/cria_prune/)?(\w+/(?:\w+/)*\w+\.py)`", text):
            cited += 1
            assert (source / name).exists() or (ROOT / name).exists(), f"{name_of(path)} names {name}"
        for whole, short in dotted.findall(text):
            cited += 1
            parts = (whole or short).split(".")
            homes = [
                source.joinpath(*parts[:size]).with_suffix(".py") for size in (len(parts), len(parts) - 1)
            ]
            public = len(parts) == 1 and parts[0] in cria_prune.__all__
            assert public or any(home.exists() for home in homes), f"{name_of(path)} names {whole or short}"
    assert cited > 10


def pages_of(entry: Any) -> list[str]:
    if isinstance(entry, str):
        return [entry]
    return [
        page for part in (entry.values() if isinstance(entry, dict) else entry) for page in pages_of(part)
    ]


def test_the_navigation_holds_every_page_once() -> None:
    from mkdocs.config import load_config

    config = load_config(str(ROOT / "mkdocs.yml"))
    config = config.plugins.on_config(config)
    assert sorted(pages_of(config.nav)) == [path.relative_to(DOCS).as_posix() for path in PAGES]


def test_every_command_and_option_is_on_its_page() -> None:
    hooks = run_path(str(DOCS / "hooks.py"))
    text = hooks["command_line"]()
    for command in ("run", "inspect", "prune", "recover", "report", "bench", "eval"):
        assert f"\n## cria {command}\n" in f"\n{text}"
    prune = text.split("## cria prune\n")[1].split("\n## ")[0]
    for option in ("--calibration", "--reduce", "--criterion", "--repair", "--offload", "--quiet"):
        assert option in prune
    assert "| Arguments | |" in prune and "--epochs" not in prune and "\x1b" not in text
    settings = hooks["settings"]()
    assert "| `reduction` | <code>float</code> | `0.5` |" in settings
    assert "| `ranking` | `auto`, `measured`, `uniform`, `global`, `loss` | `'auto'` |" in settings
    assert "::: cria_prune.RecoverConfig" in settings
    assert hooks["entry"]("cria_prune", "prune").endswith("pipeline.prune")


def test_every_extra_is_named_where_one_installs() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    text = (DOCS / "start.md").read_text()
    for extra in extras.keys() - {"dev"}:
        assert f"pip install '.[{extra}]'" in text, extra


def test_no_text_names_a_workplace_or_an_index_of_packages() -> None:
    hosts = re.compile(
        r"https?://(?:localhost|127\.|10\.|[\w.-]*(?:simple|pypi|index|mirror|registry|artifactory))"
    )
    for path in [*TEXTS, ROOT / "mkdocs.yml", *sorted((ROOT / "examples").glob("*.py"))]:
        text = path.read_text()
        assert not hosts.search(text) and "/tmp/wt" not in text and "--index-url" not in text, name_of(path)


def test_contributing_shows_every_room_above_those_that_import_it() -> None:
    table = (DOCS / "contributing.md").read_text().split("| room | ")[1].split("\n\n")[0]
    order = [
        name for line in table.splitlines() for name in re.findall(r"`(\w+)(?:/|\.py)`", line.split("|")[1])
    ]
    source = ROOT / "src" / "cria_prune"
    paths = [path for path in source.iterdir() if path.name[0] != "_" and path.name != "py.typed"]
    assert sorted(order) == sorted(path.stem for path in paths)
    for path in paths:
        files = [path] if path.is_file() else path.rglob("*.py")
        found = {
            room
            for file in files
            for room in re.findall(r"(?:from|import) cria_prune\.(\w+)", file.read_text())
        }
        below = {room for room in found if order.index(room) > order.index(path.stem)}
        assert below <= {"recording": {"graph"}, "recovery": {"resume"}}.get(path.stem, set()), path.stem


def named_places() -> list[str]:
    """Return the paths that docs/contributing.md names where it says where a change goes."""
    text = (DOCS / "contributing.md").read_text().split("## Where does it go?")[1]
    return sorted(set(re.findall(r"`((?:src|tests|benchmarks|docs)/[\w/.-]+)`", text)))


def test_ten_changes_have_a_place() -> None:
    text = (DOCS / "contributing.md").read_text().split("## Where does it go?")[1]
    assert len(re.findall(r"^\| \*\*", text, re.MULTILINE)) == 10
    assert len(named_places()) > 12


@pytest.mark.parametrize("place", named_places())
def test_what_contributing_names_exists(place: str) -> None:
    assert (ROOT / place).exists()


@pytest.mark.parametrize(
    "page", [*DOCS.glob("guides/*.md"), DOCS / "start.md", DOCS / "reference/settings.md"], ids=name_of
)
def test_python_on_a_page_can_be_compiled(page: Path) -> None:
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
        compile(block, name_of(page), "exec")


@pytest.mark.parametrize("page", ["start.md", "guides/own-network.md", "reference/settings.md"])
def test_python_on_a_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for block in re.findall(r"^```python\n(.*?)^```", (DOCS / page).read_text(), re.DOTALL | re.MULTILINE):
        exec(compile(block, page, "exec"), {})


class _Assets(HTMLParser):
    """What a page loads when it is opened."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        said = dict(attrs)
        if tag in ("script", "img", "iframe"):
            self.found.append(said.get("src") or "")
        elif tag == "link":
            self.found.append(said.get("href") or "")


def test_the_site_builds_without_a_warning_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    """As `make docs` does. It takes a quarter of a minute: tests/support/slow.py lists it."""
    words = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(tmp_path)]
    said = subprocess.run(
        words, cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True
    )
    assert (said.returncode, said.stdout, said.stderr) == (0, "", "")
    built = sorted(tmp_path.rglob("*.html"))
    assert {f"{page.relative_to(DOCS).with_suffix('.html')}" for page in PAGES} <= {
        f"{path.relative_to(tmp_path)}" for path in built
    }
    for path in built:
        parser = _Assets()
        parser.feed(path.read_text())
        assert not [asset for asset in parser.found if re.match(r"(https?:)?//", asset)], path
    everything = "\n".join(path.read_text() for path in (tmp_path / "reference").glob("*.html"))
    for name in cria_prune.__all__:
        assert f'id="{name}"' in everything, name


def test_the_site_is_not_kept_in_the_repository() -> None:
    assert "/site/" in (ROOT / ".gitignore").read_text().splitlines()
    assert yaml.safe_load((ROOT / "mkdocs.yml").read_text())["theme"]["font"] is False
