"""Command-line flags from frozen dataclasses: every field is a flag, its docstring is the help text.

A field `max_steps: int = 100` becomes `--max-steps 100`, a field `resume: bool = False` `--resume` / `--no-resume`.
Flags that are not given are left out of the result, so that a preset or a checkpoint can fill them in.
"""

import argparse
import dataclasses
import difflib

from mplug2.dataclass_tools import field_docs


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations, and with a guess at what an unknown flag was meant to be."""

    def __init__(self, description: str):
        super().__init__(
            description=description, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        self.fields: dict[str, str] = {}

    def add(self, cls: type, title: str, defaults: str = "") -> None:
        """A flag for each field of the dataclass `cls`; `defaults` says in the help where other defaults come from."""
        group, docs = self.add_argument_group(title), field_docs(cls)
        for field in dataclasses.fields(cls):
            flag, choices = "--" + field.name.replace("_", "-"), getattr(field.type, "__args__", None)
            default = defaults or f"default: {field.default if field.default != '' else 'none'}"
            text = f"{docs[field.name]} ({default})".replace("%", "%%")
            self.fields[field.name] = cls.__name__
            if field.type is bool:
                group.add_argument(flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text)
            else:
                group.add_argument(
                    flag, type=str if choices else field.type, choices=choices, default=argparse.SUPPRESS, help=text,
                    metavar=None if choices else field.type.__name__.upper(),
                )

    def read(self, arguments: list[str] | None = None) -> dict[str, dict]:
        """The flags that were given, by the name of their dataclass; exits with a message for an unknown one."""
        found, unknown = self.parse_known_args(arguments)
        if unknown:
            name = unknown[0].split("=")[0]
            near = difflib.get_close_matches(name, self._option_string_actions, n=1)
            self.error(f"unknown argument {unknown[0]}" + (f"; did you mean {near[0]}?" if near else ""))
        given: dict[str, dict] = {owner: {} for owner in self.fields.values()}
        for name, value in vars(found).items():
            given[self.fields[name]][name] = value
        return given
