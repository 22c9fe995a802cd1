"""What of the site is made from the code: the command line, the settings, the list of decisions.

mkdocs calls `on_config` and `on_page_markdown`. A page asks for what is made by a comment,
`<!-- made: NAME -->`, and for the docstring of a public name by a line `::: cria_prune.NAME`; `#NAME` is then
its anchor on the page.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import typer
from pydantic import BaseModel

DOCS = Path(__file__).parent
MADE = re.compile(r"^<!-- made: (\w+) -->$", re.MULTILINE)
ENTRY = re.compile(r"^::: (cria_prune(?:\.\w+)*)\.(\w+)$", re.MULTILINE)
ARGUMENTS, OPTIONS = "Arguments", "Options"


def decisions() -> dict[str, str]:
    """Return page -> title of every decision, in their order."""
    found = sorted((DOCS / "decisions").glob("[0-9]*.md"))
    return {f"decisions/{path.name}": path.read_text().splitlines()[0].removeprefix("# ") for path in found}


def decision_list() -> str:
    """Return the decisions as a list of links from docs/decisions/index.md."""
    return "\n".join(f"- [{title}]({Path(page).name})" for page, title in decisions().items())


def command_line() -> str:
    """Return one section per command: usage, what it does, its options in the groups of `--help`."""
    from cria_prune.cli.main import app

    group: Any = typer.main.get_command(app)
    context = group.context_class(group, info_name="cria")
    commands = {name: group.get_command(context, name) for name in group.list_commands(context)}
    return "\n\n".join(_command(command, f"cria {name}") for name, command in commands.items())


def _command(command: Any, name: str) -> str:
    context = command.context_class(command, info_name=name)
    usage = command.get_usage(context).removeprefix("Usage: ")
    text = [f"## {name}", _prose(command.help or ""), f"```\n{' '.join(usage.split())}\n```"]
    groups: dict[str, list[str]] = {}
    for parameter in command.get_params(context):
        # A hidden option has no record, nor has an argument without help.
        if (record := parameter.get_help_record(context)) and "--help" not in parameter.opts:
            row = f"| `{record[0]}` | {_prose(record[1]).replace('|', '&#124;')} |"
            title = ARGUMENTS if parameter.param_type_name == "argument" else OPTIONS
            groups.setdefault(getattr(parameter, "rich_help_panel", None) or title, []).append(row)
    for title, rows in groups.items():
        text.append("\n".join([f"| {title} | |", "| --- | --- |", *rows]))
    return "\n\n".join(text)


def _prose(text: str) -> str:
    """Return a text of the command line as Markdown: its options and names of files as code."""
    return re.sub(r"(?<![\w`])(--[a-z][a-z-]*|\w+\.(?:json|png|html|txt|csv))(?![\w`])", r"`\1`", text)


def entry(package: str, name: str) -> str:
    """Return the line of mkdocstrings for a public name, by the module that defines it, and its anchor.

    mkdocstrings reads the source; a name that is imported lazily, or that a module has too, it would miss.
    """
    item = getattr(import_module(package), name)
    home = getattr(item, "__module__", None) or next(
        module.__name__
        for module in list(sys.modules.values())
        if module.__name__.startswith(f"{package}.")
        and getattr(module, name, None) is item
        and re.search(rf"^{name}\b.*=", Path(module.__file__ or "").read_text(), re.MULTILINE)
    )
    plain = isinstance(item, type) and issubclass(item, BaseModel)  # its fields stand in a table
    options = "\n    options: {show_signature: false, separate_signature: false}" if plain else ""
    return f'<a id="{name}"></a>\n\n::: {home}.{name}{options}'


def settings() -> str:
    """Return a table per public configuration: field, type, default, meaning."""
    import cria_prune

    named = [(name, getattr(cria_prune, name)) for name in cria_prune.__all__ if name.endswith("Config")]
    parts = []
    for name, config in sorted(named, key=lambda item: item[0] != "PruneConfig"):
        rows = [f"::: cria_prune.{name}", "", "| field | values | default | |", "| --- | --- | --- | --- |"]
        properties = config.model_json_schema()["properties"]
        for key, field in config.model_fields.items():
            plain = field.annotation.__name__ if isinstance(field.annotation, type) else str(field.annotation)
            kind = f"<code>{plain.replace('typing.', '').replace('|', '&#124;')}</code>"
            if choices := properties[key].get("enum"):
                kind = ", ".join(f"`{choice}`" for choice in choices)
            default: Any = field.get_default(call_default_factory=True)
            shown = f"`{type(default).__name__}()`" if isinstance(default, BaseModel) else f"`{default!r}`"
            rows.append(f"| `{key}` | {kind} | {shown} | {field.description or ''} |")
        parts.append("\n".join(rows))
    return "\n\n".join(parts)


MAKERS: dict[str, Callable[[], str]] = {
    "decisions": decision_list,
    "commands": command_line,
    "settings": settings,
}


def on_config(config: Any) -> Any:
    """Put the decisions into the navigation."""
    for entry in config["nav"]:
        if isinstance(entry, dict) and "Decisions" in entry:
            entry["Decisions"] = ["decisions/index.md", *decisions()]
    return config


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put what is made from the code in the place of its comment or line."""
    markdown = MADE.sub(lambda found: MAKERS[found[1]](), markdown)
    return ENTRY.sub(lambda found: entry(found[1], found[2]), markdown)
