"""The command line made of the requests: an option for each of their fields, and --help in groups."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from inspect import Parameter, Signature, get_annotations, getdoc
from typing import Annotated, Any, NamedTuple, TypeVar, cast, get_args, get_origin

import typer
from pydantic.fields import FieldInfo
from typer.core import TyperCommand

from cria_prune.base.errors import ConfigError
from cria_prune.cli.output import answering
from cria_prune.cli.settings import GROUPS, OUTPUT, RUNNING, Request, Scoring, extra_of, flags_of
from cria_prune.config import Choices, StageConfig

EPILOG = "The defaults are Cria's own; those of a recipe, of --preset and of --config come before them."
FIRST_COLUMN = 30  # characters of --help for the option itself
WIDEST = 110
METAVAR = {"ignore": "PATTERN", "share": "PATTERN=SHARE", "keep": "PATTERN=UNITS"}
Kind = TypeVar("Kind", bound=Request)


class Item(NamedTuple):
    """One option or argument of a command.

    Attributes:
        name: of the parameter: of the field that it comes from.
        field: with its default, its text, its choices.
        group: its heading in --help.
        holder: the field of the request for the configuration that it is a setting of; `` if it is its own.
        config: that configuration.
    """

    name: str
    field: FieldInfo
    group: str
    holder: str = ""
    config: type[StageConfig] | None = None

    @property
    def choices(self) -> Choices | None:
        """The values that it can take, if they are few."""
        return next((item for item in self.field.metadata if isinstance(item, Choices)), None)

    def parameter(self) -> Parameter:
        """Return the parameter of a function that typer makes it from."""
        if "argument" in extra_of(self.field):
            what: Any = typer.Argument(help=self.field.description, show_default=False)
            return Parameter(self.name, Parameter.KEYWORD_ONLY, annotation=Annotated[self._type, what])
        flags = flags_of(self.name, self.field)
        if self.config is not None and self._type is bool:
            flags = [f"{flags[0]}/--no-{flags[0][2:]}"]
        listed = get_args(self._type)
        what = typer.Option(
            *flags, help=self._help(), show_default=False, rich_help_panel=self.group,
            metavar=(METAVAR.get(self.name) or f"<{listed[0].__name__}>") if listed else None,
        )  # fmt: skip
        default = None if self.config is not None or self.field.default == () else self.field.default
        kind = self._type if default is not None else self._type | None
        return Parameter(self.name, Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, what])

    def value(self, given: Any) -> Any:
        """Return what was given as the field has it.

        Raises:
            ConfigError: it is out of bounds, or none of the choices.
        """
        if self.config is not None:
            return self.config.setting(self.name, given)
        if self.choices is not None and given not in self.choices.texts:
            known = f"Known {self.choices.plural}: {', '.join(self.choices.texts)}"
            raise ConfigError(flags_of(self.name, self.field)[0], f"found {given!r}", known)
        return given

    @property
    def _type(self) -> Any:
        """What typer reads it as; a setting that is more than a number is read by its configuration."""
        kinds = [kind for kind in get_args(self.field.annotation) if kind is not type(None)]
        if get_origin(self.field.annotation) is tuple:
            return list[kinds[0]]  # type: ignore[valid-type]
        if get_origin(self.field.annotation) is dict:  # PATTERN=NUMBER
            return list[str]
        if self.config is not None and kinds:
            return str
        return kinds[0] if kinds else self.field.annotation

    def _help(self) -> str:
        text = self.field.description or ""
        if self.choices is not None:
            texts = self.choices.texts.items()
            text += ": " + ", ".join(value if value == said else f"{value} ({said})" for value, said in texts)
        default: Any = extra_of(self.field)["option"]["shown"] or self.field.default
        if isinstance(default, bool):
            default = "" if self.config is None else "yes" if default else "no"
        elif isinstance(default, (int, float)):
            default = f"{default:g}"
        return f"{text}. [default: {default}]" if default else f"{text}."


def items(kind: type[Request]) -> Iterator[Item]:
    """Give the options of a command, in the order of its sections, its own last."""
    first = {
        name: section
        for section in kind.__mro__ if issubclass(section, Request)
        for name in get_annotations(section) if name in kind.model_fields
    }  # fmt: skip
    for section in (*kind.__mro__[1:], kind):
        for name in [name for name in get_annotations(section) if first.get(name) is section]:
            field = kind.model_fields[name]
            extra, config = extra_of(field), cast("type[StageConfig]", field.annotation)
            for setting in extra.get("options", ()):
                yield Item(setting, config.model_fields[setting], config.group, name, config)
            if "argument" in extra or "option" in extra:
                group = extra.get("option", {}).get("group") or vars(section).get("group", OUTPUT)
                yield Item(name, field, group)


def request_of(kind: type[Kind], context: typer.Context) -> Kind:
    """Return what was asked on a command line.

    Raises:
        ConfigError: a value is out of bounds, or none of its choices.
    """
    values: dict[str, Any] = {"command": command_line(context)}
    given: dict[str, dict[str, Any]] = {}
    configs: dict[str, type[StageConfig]] = {}
    for item in items(kind):
        found = context.params[item.name]
        if found is None or (item.config is not None and found in ((), [])):
            continue
        into = given.setdefault(item.holder, {}) if item.config else values
        into[item.name] = item.value(found)
        if item.config:
            configs[item.holder] = item.config
    return kind(**values, **{name: configs[name].model_construct(**given[name]) for name in given})


def command_line(context: typer.Context) -> list[str]:
    """Return the command with the options that were given, as it would be typed."""
    words = ["cria", str(context.info_name)]
    for parameter in context.command.params:
        name = str(parameter.name)
        source = context.get_parameter_source(name)
        if source is None or source.name != "COMMANDLINE":
            continue
        value = context.params[name]
        if parameter.param_type_name == "argument":
            words.append(str(value))
        elif value is False:
            words += parameter.secondary_opts[:1]
        elif value is True:
            words += parameter.opts[:1]
        else:
            for item in value if isinstance(value, (list, tuple)) else (value,):
                words += [parameter.opts[0], str(item)]
    return words


class Grouped(TyperCommand):
    """A command whose --help has a heading for every group of options; plain text, at any width."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the options under their headings."""
        rows: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            alone = GROUPS[0] if parameter.param_type_name == "argument" else RUNNING
            record = parameter.get_help_record(ctx)
            if record is not None:
                rows.setdefault(getattr(parameter, "rich_help_panel", None) or alone, []).append(record)
        width = min(FIRST_COLUMN, max(len(left) for group in rows.values() for left, _ in group))
        for group in sorted(rows, key=GROUPS.index):
            with formatter.section(group):
                formatter.write_dl([(left.ljust(width), text) for left, text in rows[group]], FIRST_COLUMN)


def add_command(app: typer.Typer, kind: type[Request]) -> None:
    """Make a command of a request: an option for each field, its text for --help, and the work on it."""

    def called(context: typer.Context, **_: Any) -> None:
        with answering(kind.shared) as out:
            request = request_of(kind, context)
            out.quiet |= request.quiet
            module, name = kind.work.split(".")  # heavy imports begin here
            getattr(import_module(f"cria_prune.cli.{module}"), name)(request, out)

    found = sorted(
        (item.parameter() for item in items(kind)), key=lambda item: item.default is not Parameter.empty
    )
    context = Parameter("context", Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)
    called.__signature__ = Signature([context, *found])  # type: ignore[attr-defined]
    text = getdoc(kind) or ""
    app.command(
        kind.__name__.lower(), cls=Grouped, help=text, short_help=text.partition("\n")[0],
        epilog=EPILOG if issubclass(kind, Scoring) else None,
        context_settings={"max_content_width": WIDEST},
    )(called)  # fmt: skip
