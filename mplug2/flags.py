"""Command-line flags from frozen dataclasses: each field is a flag, and its docstring is the help text.

    max_steps: int = 100                        --max-steps 100
    epochs: float | None = None                 --epochs 2.5, no default
    save_every: int | str = 375                 --save-every 500 or --save-every 15min
    resume: bool = False                        --resume or --no-resume
    optimizer: Literal["muon", "adamw"] = ...   --optimizer adamw
    root: str                                   ROOT: a field without a default is a positional argument; one with
                                                metadata={"positional": True} may be left out

All commands of the repository are built this way. One with a single dataclass needs two lines:

    settings = parse(EvalSettings, __doc__, "eval.py", arguments)   # a wrong flag: one line, exit code 2
    with one_line_errors("eval.py"):                                # a wrong file: one line, exit code 1
        ...
"""

import argparse
import dataclasses
import math
import shutil
import sys
import textwrap
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NoReturn, TypeVar, get_args, get_origin

from mplug2.dataclass_tools import field_docs
from mplug2.did_you_mean import did_you_mean
from mplug2.distributed import first_to_report

T = TypeVar("T")


def number_or_text(value: str) -> int | str:
    """The value of a flag that is `int | str`."""
    return int(value) if value.isdecimal() else value


METAVARS = {int: "N", float: "X", str: "TEXT", number_or_text: "N"}


class Formatter(argparse.RawDescriptionHelpFormatter):
    """A flag and its text on the same line where they fit, so that a group of flags fits on a screen."""

    def __init__(self, prog: str):
        width = min(shutil.get_terminal_size(fallback=(110, 50)).columns, 120) - 2
        super().__init__(prog, max_help_position=30, width=width)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if isinstance(action, argparse.BooleanOptionalAction):
            return action.option_strings[0].replace("--", "--[no-]", 1)
        return super()._format_action_invocation(action)


class Parser(argparse.ArgumentParser):
    """argparse for dataclasses: without abbreviations, with one-line errors, and with defaults that `--help` resolves.

    `read` leaves out the flags that are not given, so that a preset or a checkpoint can fill them in.
    """

    def __init__(self, description: str, prog: str):
        super().__init__(prog, "%(prog)s [flags]", description, formatter_class=Formatter, allow_abbrev=False,
                         add_help=False)
        self.owners: dict[str, str] = {}
        self.docs: dict[str, str] = {}
        self.positional: dict[str, type] = {}
        self.required: list[str] = []

    def add(self, cls: type, title: str, only: Collection[str] = ()) -> None:
        """A titled group with a flag for each field of the dataclass `cls`, or for those named in `only`.

        A field with metadata={"title": ...} begins a further group, so that each group fits on a screen.
        """
        docs, positional = field_docs(cls), ""
        group = self.add_argument_group(title)
        for field in dataclasses.fields(cls):
            if only and field.name not in only:
                continue
            if "title" in field.metadata:
                group = self.add_argument_group(field.metadata["title"])
            kind, choices = value_type(field)
            doc = docs[field.name]
            if known := field.metadata.get("known"):
                doc = f"{doc} Known: {', '.join(known)}."
            self.owners[field.name], self.docs[field.name] = cls.__name__, doc
            flag = "--" + field.name.replace("_", "-")
            required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
            if required or field.metadata.get("positional"):
                self.positional[field.name] = kind
                self.required += [field.name] * required
                shown = field.name.upper() if required else f"[{field.name.upper()}]"
                self.usage = self.usage.replace(" [flags]", f" {shown} [flags]")
                positional += textwrap.fill(f"{field.name.upper()}: {doc}", 100) + "\n"
            elif kind is bool:
                group.add_argument(flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS)
            else:
                group.add_argument(flag, type=kind, choices=choices or None, default=argparse.SUPPRESS,
                                   metavar=None if choices else METAVARS[kind])
        group.description = positional.strip() or None
        self._show_defaults({
            field.name: field.default for field in dataclasses.fields(cls) if field.name in self.owners
        })

    def read(self, arguments: list[str] | None = None, defaults: Callable[[dict], dict] | None = None
             ) -> dict[str, dict[str, Any]]:
        """The flags that were given, by the name of their dataclass. A wrong flag ends the program with one line.

        `--help` prints the flags and ends the program. The defaults that it shows come from the fields, and from
        `defaults`: it maps the flags that were given (such as a task or a preset) to the values of the others.
        """
        arguments = sys.argv[1:] if arguments is None else [str(argument) for argument in arguments]
        wants_help = any(argument in ("-h", "--help") for argument in arguments)
        found, others = self.parse_known_args([one for one in arguments if one not in ("-h", "--help")])
        given = vars(found)
        if unknown := next((one for one in others if one.startswith("-")), None):
            known = did_you_mean(unknown.split("=")[0], self._option_string_actions)
            self.error(f"unknown argument {unknown}{known}")
        for name, value in zip(self.positional, others):
            kind = self.positional[name]
            try:
                given[name] = kind(value)
            except ValueError:
                self.error(f"{name.upper()}: expected an {kind.__name__}, found {value!r}")
        if len(others) > len(self.positional):
            stray = others[len(self.positional)]
            meant = f" (did you mean '--{stray}'?)" if f"--{stray}" in self._option_string_actions else ""
            self.error(f"unknown argument {stray}{meant or ': expected a flag before it'}")
        if wants_help:
            if defaults:
                try:
                    self._show_defaults(defaults(given))
                except (ValueError, OSError) as error:
                    self.error(str(error))
            self.print_help()
            self.exit()
        if missing := [name.upper() for name in self.required if name not in given]:
            self.error(f"{' and '.join(missing)}: not given")
        by_owner: dict[str, dict] = {owner: {} for owner in self.owners.values()}
        for name, value in given.items():
            by_owner[self.owners[name]][name] = value
        return by_owner

    def error(self, message: str) -> NoReturn:
        """One line in place of argparse's usage, which would list every flag."""
        line = f"{self.prog}: {message} (help: {self.prog} --help)\n"
        self.exit(2, line if first_to_report(line) else None)

    def _show_defaults(self, defaults: dict[str, Any]) -> None:
        for action in self._actions:
            if action.dest in defaults:
                value = defaults[action.dest]
                shown = "" if value is None or value == "" else f" (default: {value})"
                action.help = f"{self.docs[action.dest]}{shown}".replace("%", "%%")


def value_type(field: dataclasses.Field) -> tuple[Callable[[str], Any], tuple[str, ...]]:
    """The type of a flag's value, and its choices if it has a fixed set of them."""
    kind = field.type
    if get_args(kind) == (int, str):
        return number_or_text, ()
    if get_origin(kind) is not Literal:
        kind = next((one for one in get_args(kind) if one is not type(None)), kind)  # of `float | None`
    return (str, get_args(kind)) if get_origin(kind) is Literal else (kind, ())


def parse(cls: type[T], description: str, prog: str, arguments: list[str] | None = None, title: str = "flags") -> T:
    """The settings of a command with one dataclass. A wrong flag, or a ValueError of `cls`, ends the program."""
    parser = Parser(description, prog)
    parser.add(cls, title)
    given = parser.read(arguments)[cls.__name__]
    try:
        return cls(**given)
    except ValueError as error:
        parser.error(str(error))


@contextmanager
def one_line_errors(prog: str) -> Iterator[None]:
    """Within it, a ValueError or OSError ends the program with one line on stderr and exit code 1, no traceback."""
    try:
        yield
    except (ValueError, OSError) as error:
        print(f"{prog}: {error}", file=sys.stderr)
        raise SystemExit(1) from error


@contextmanager
def warning_only(what: str) -> Iterator[None]:
    """Within it, any error becomes a warning on stderr: for reports and plots, which must not cost a result."""
    try:
        yield
    except Exception as error:
        print(f"warning: {what} failed: {type(error).__name__}: {error}", file=sys.stderr)


def check_range(settings: Any, names: str, least: float = -math.inf, most: float = math.inf) -> None:
    """ValueError for the first of these fields (`names`, with blanks between) that lies outside `least` to `most`."""
    for name in names.split():
        value = getattr(settings, name)
        if value is not None and not least <= value <= most:
            expected = f"from {least:g} to {most:g}" if most < math.inf else f"of at least {least:g}"
            raise ValueError(f"{name}={value}: expected a number {expected}")
