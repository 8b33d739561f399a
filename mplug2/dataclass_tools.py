"""Two helpers for settings: the docstring under each field of a dataclass, and a dataclass from a dictionary."""

import ast
import dataclasses
import inspect
import textwrap


def field_docs(cls: type) -> dict[str, str]:
    """The docstring under each field of the dataclass `cls`, by field name. It is the help text of the field's flag."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body
    docs = {}
    for field, doc in zip(body, body[1:]):
        if isinstance(field, ast.AnnAssign) and isinstance(doc, ast.Expr) and isinstance(doc.value, ast.Constant):
            docs[field.target.id] = " ".join(doc.value.value.split())
    return docs


def from_dict(cls: type, values: dict, source: str = "settings"):
    """Build the dataclass `cls` from a dictionary that `source` contains.

    Raises ValueError with the names of unknown or missing fields.
    """
    known = {field.name for field in dataclasses.fields(cls)}
    if unknown := sorted(set(values) - known):
        raise ValueError(f"{source}: unknown settings {', '.join(unknown)}; known are {', '.join(sorted(known))}")
    if missing := sorted(known - set(values)):
        raise ValueError(f"{source}: no settings {', '.join(missing)}; expected all of {', '.join(sorted(known))}")
    return cls(**values)
