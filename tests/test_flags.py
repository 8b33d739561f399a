"""Flags from dataclasses: their help, their values, and the one line that a wrong flag gets."""

import dataclasses
import importlib
import sys
from dataclasses import dataclass, field
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval import GROUPS as EVALUATION
from mplug2.comma_list import comma_list
from mplug2.config import ModelConfig
from mplug2.dataclass_tools import field_docs
from mplug2.did_you_mean import did_you_mean
from mplug2.flags import Parser, check_range, one_line_errors, parse
from mplug2.training.settings import GROUPS

TRAINING = [cls for cls, _ in GROUPS.values()]


def strip(text):
    """Without blanks and line breaks: argparse wraps its help."""
    return "".join(text.split())


@dataclass(frozen=True)
class Example:
    max_steps: int = 3
    """How long it
    takes, 100% of it."""
    epochs: float | None = None
    """Instead of steps."""
    name: str = ""
    """Name of the run."""
    rate: float = 0.5
    """How fast."""
    resume: bool = False
    """Continue."""
    mode: Literal["slow", "fast"] = "slow"
    """Which way."""
    task: str = field(default="read", metadata={"known": ("read", "write")})
    """What to do."""

    def __post_init__(self):
        check_range(self, "max_steps", 1)
        check_range(self, "epochs rate", 0, 1)


@dataclass(frozen=True)
class Copy:
    root: str
    """Folder to read."""
    parts: int
    """Number of parts."""
    out: str = "out"
    """Folder to write."""


def parser_of(*classes):
    parser = Parser("What it does.\n\n    an example", "program")
    for cls in classes:
        parser.add(cls, cls.__name__)
    return parser


def refusal(capsys, parser, arguments):
    """The one line that refuses `arguments`, without the pointer to --help at its end."""
    with pytest.raises(SystemExit) as stopped:
        parser.read(arguments)
    assert stopped.value.code == 2
    line = capsys.readouterr().err
    assert line.startswith("program: ") and line.endswith(" (help: program --help)\n") and line.count("\n") == 1
    return line.removeprefix("program: ").removesuffix(" (help: program --help)\n")


def help_of(capsys, parser, arguments=(), defaults=None):
    with pytest.raises(SystemExit) as stopped:
        parser.read([*arguments, "--help"], defaults)
    assert stopped.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("cls", [ModelConfig, *EVALUATION, *TRAINING])
def test_every_setting_has_a_flag_and_a_help_text(cls):
    docs, parser = field_docs(cls), parser_of(cls)
    help_text = strip(parser.format_help())
    assert list(docs) == [field.name for field in dataclasses.fields(cls)]
    for name, doc in docs.items():
        flag = "--" + name.replace("_", "-")
        assert flag in parser._option_string_actions
        assert len(doc) > 5 and strip(doc) in help_text, name


def test_help_shows_the_examples_the_defaults_and_the_known_names(capsys):
    text = help_of(capsys, parser_of(Example))
    for words in ("How long it takes, 100% of it. (default: 3)", "--name TEXT Name of the run. --rate",
                  "(default: slow)", "--epochs X Instead of steps. --name",
                  "What to do. Known: read, write. (default: read)",
                  "--[no-]resume"):
        assert strip(words) in strip(text), words
    assert "What it does.\n\n    an example" in text and text.startswith("usage: program [flags]\n")


@dataclass(frozen=True)
class Titled:
    root: str = "here"
    """Where."""
    parts: int = field(default=2, metadata={"title": "division"})
    """How many."""
    overlap: int = 0
    """How much."""


def test_a_field_with_a_title_begins_another_group_of_the_help(capsys):
    text = help_of(capsys, parser_of(Titled, Example))
    groups = {lines[0]: "\n".join(lines[1:]) for lines in map(str.splitlines, text.split("\n\n"))}
    assert [flag for flag in ("--root", "--parts", "--overlap") if flag in groups["Titled:"]] == ["--root"]
    assert "--parts" in groups["division:"] and "--overlap" in groups["division:"]
    assert strip("How much. (default: 0)") in strip(groups["division:"])
    assert "--name" in groups["Example:"] and "--root" not in groups["Example:"]
    assert parser_of(Titled).read(["--overlap", "3"]) == {"Titled": {"overlap": 3}}


@pytest.mark.parametrize("command", [
    "train", "train --preset large --recipe msrvtt_caption", "eval", "mplug2.tools.memory_plan", "mplug2.tools.bench",
    "mplug2.tools.report", "mplug2.data.__main__", "mplug2.data.__main__ pack", "mplug2.data.__main__ check",
    "mplug2.pretrained.__main__", "mplug2.demo.__main__", "tiny_data.__main__", "tiny_data.emoji",
])
def test_each_group_of_the_help_fits_on_a_screen(capsys, monkeypatch, command):
    """Of 40 lines, with 110 columns for the flags."""
    monkeypatch.setenv("COLUMNS", "110")
    module, *arguments = command.split()
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module(module).main([*arguments, "--help"])
    assert stopped.value.code == 0
    groups = [group.strip("\n").splitlines() for group in capsys.readouterr().out.split("\n\n")]
    assert len(groups) > 2
    assert {group[0]: len(group) for group in groups if len(group) > 40} == {}


def test_help_resolves_the_defaults_that_other_flags_decide(capsys):
    def defaults(given: dict) -> dict:
        assert given == {"mode": "fast", "max_steps": 9}
        return {"rate": 0.25, "name": "quick", "max_steps": 9}

    text = strip(help_of(capsys, parser_of(Example), ["--mode", "fast", "--max-steps", "9"], defaults))
    for words in ("How fast. (default: 0.25)", "Name of the run. (default: quick)", "100% of it. (default: 9)"):
        assert strip(words) in text, words

    def impossible(given: dict) -> dict:
        raise ValueError("no such mode")

    with pytest.raises(SystemExit) as stopped:
        parser_of(Example).read(["--help"], impossible)
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "program: no such mode (help: program --help)\n"


def test_flags_not_given_are_left_out():
    assert parser_of(Example, ModelConfig).read([]) == {"Example": {}, "ModelConfig": {}}


def test_a_group_can_have_some_of_the_fields_only(capsys):
    parser = Parser("", "program")
    parser.add(Example, "some", {"name", "rate"})
    assert parser.read(["--name", "a"]) == {"Example": {"name": "a"}}
    assert refusal(capsys, parser, ["--max-steps", "3"]) == "unknown argument --max-steps"


@given(given_values=st.fixed_dictionaries({}, optional={
    "max_steps": st.integers(0, 10**9), "epochs": st.floats(0, 1e3),
    "name": st.text("ab -/é", max_size=5).map("x".__add__),
    "rate": st.floats(0, 1e9), "resume": st.booleans(), "mode": st.sampled_from(["slow", "fast"]),
}), heads=st.integers(1, 9))
def test_flags_given_arrive_with_their_type_under_their_dataclass(given_values, heads):
    arguments = ["--heads", str(heads)]
    for name, value in given_values.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            arguments.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            arguments += [f"--{flag}", str(value)]
    found = parser_of(Example, ModelConfig).read(arguments)
    assert found == {"Example": given_values, "ModelConfig": {"heads": heads}}
    assert all(type(found["Example"][name]) is type(value) for name, value in given_values.items())


@dataclass(frozen=True)
class Saving:
    every: int | str = 375
    """Steps or minutes."""


def test_a_flag_may_be_a_number_or_a_text(capsys):
    """A number stays a number: settings.json keeps what was given."""
    for text, value in (("500", 500), ("15min", "15min"), ("-1", "-1")):
        assert parser_of(Saving).read([f"--every={text}"]) == {"Saving": {"every": value}}
    assert strip("--every N Steps or minutes. (default: 375)") in strip(help_of(capsys, parser_of(Saving)))


def test_an_unknown_flag_is_refused_with_a_guess(capsys):
    parser = parser_of(Example)
    assert refusal(capsys, parser, ["--max-step", "3"]) == "unknown argument --max-step (did you mean '--max-steps'?)"
    assert refusal(capsys, parser, ["--max_steps=3"]) == "unknown argument --max_steps=3 (did you mean '--max-steps'?)"
    text = f"--max_steps={'9' * 40}"  # the value does not count for the guess
    assert refusal(capsys, parser, [text]) == f"unknown argument {text} (did you mean '--max-steps'?)"
    assert refusal(capsys, parser, ["--zzzzzzzz"]) == "unknown argument --zzzzzzzz"
    assert refusal(capsys, parser, ["--max-steps", "3", "stray"]) == "unknown argument stray: expected a flag before it"
    assert refusal(capsys, parser, ["max-steps", "3"]) == "unknown argument max-steps (did you mean '--max-steps'?)"


def test_a_flag_is_not_abbreviated(capsys):
    assert refusal(capsys, parser_of(Example), ["--na", "a"]).startswith("unknown argument --na")


def test_a_value_that_does_not_fit_is_refused(capsys):
    parser = parser_of(Example)
    assert "argument --max-steps: invalid int value: '3.5'" in refusal(capsys, parser, ["--max-steps", "3.5"])
    assert "argument --mode: invalid choice: 'quick'" in refusal(capsys, parser, ["--mode", "quick"])
    assert "argument --rate: expected one argument" in refusal(capsys, parser, ["--rate"])


def test_fields_without_a_default_are_positional_arguments(capsys):
    for arguments in (["a", "3", "--out", "b"], ["--out", "b", "a", "3"], ["a", "--out", "b", "3"]):
        assert parser_of(Copy).read(arguments) == {"Copy": {"root": "a", "parts": 3, "out": "b"}}
    assert refusal(capsys, parser_of(Copy), ["a"]) == "PARTS: not given"
    assert refusal(capsys, parser_of(Copy), []) == "ROOT and PARTS: not given"
    assert refusal(capsys, parser_of(Copy), ["a", "many"]) == "PARTS: expected an int, found 'many'"
    assert refusal(capsys, parser_of(Copy), ["a", "3", "c"]) == "unknown argument c: expected a flag before it"
    text = help_of(capsys, parser_of(Copy))
    assert text.startswith("usage: program ROOT PARTS [flags]\n") and "ROOT: Folder to read." in text


@dataclass(frozen=True)
class Conversion:
    file: str = field(default="", metadata={"positional": True})
    """File to read."""
    out: str = "there"
    """Folder."""


def test_a_positional_argument_with_a_default_may_be_left_out(capsys):
    assert parse(Conversion, "", "convert", ["--out", "x"]) == Conversion("", "x")
    assert parse(Conversion, "", "convert", ["a.pt", "--out", "x"]) == Conversion("a.pt", "x")
    with pytest.raises(SystemExit):
        parse(Conversion, "", "convert", ["--help"])
    printed = capsys.readouterr().out
    assert "convert [FILE] [flags]" in printed and "FILE: File to read." in printed


def test_a_command_with_one_dataclass_is_parsed_and_refused_at_once(capsys, monkeypatch):
    assert parse(Example, "What it does.", "program", ["--rate", "1"]) == Example(rate=1.0)
    monkeypatch.setattr(sys, "argv", ["program", "--name", "a"])
    assert parse(Example, "What it does.", "program") == Example(name="a")
    for arguments, message in ((["--max-steps", "0"], "max_steps=0: expected a number of at least 1"),
                               (["--rate", "1.5"], "rate=1.5: expected a number from 0 to 1"),
                               (["--epochs", "nan"], "epochs=nan: expected a number from 0 to 1")):
        with pytest.raises(SystemExit) as stopped:
            parse(Example, "What it does.", "program", arguments)
        assert stopped.value.code == 2
        assert capsys.readouterr().err == f"program: {message} (help: program --help)\n"


@pytest.mark.parametrize("error", [ValueError("no such task"), FileNotFoundError("no such file")])
def test_an_error_of_the_user_s_is_one_line(capsys, error):
    with pytest.raises(SystemExit) as stopped, one_line_errors("program"):
        raise error
    assert stopped.value.code == 1
    assert capsys.readouterr().err == f"program: {error}\n"
    with pytest.raises(TypeError), one_line_errors("program"):
        raise TypeError("a bug keeps its traceback")


def test_a_list_of_names_is_read_without_blanks_and_its_mistakes_are_counted_from_one():
    assert comma_list("task", " a, b ,c") == ["a", "b", "c"]
    with pytest.raises(ValueError, match="^task='a,,b': name 2 of the list is empty"):
        comma_list("task", "a,,b")
    with pytest.raises(ValueError, match="^task='a, b,a': 'a' is named twice$"):
        comma_list("task", "a, b,a")


def test_a_misspelled_name_gets_a_hint_if_one_is_close():
    assert did_you_mean("captoins", ["video", "captions"]) == " (did you mean 'captions'?)"
    assert did_you_mean("xyz", ["video", "captions"]) == ""
