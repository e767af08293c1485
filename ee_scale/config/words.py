"""Words of the command line: what is text by the schema is taken as it was typed, the rest is Hydra's grammar.

Hydra would read a name such as 1e5, 007 or a=b as a number or as syntax, and OmegaConf `${` as a reference.
"""

import re
from collections.abc import Iterator
from dataclasses import Field, fields, is_dataclass
from itertools import pairwise
from typing import Any, get_args, get_origin

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from ee_scale.errors import UserError

QUOTES = "'\""


def find_field(schema: type, key: str) -> Any:
    """The dataclass field of a dotted key, with Hydra's + or ++ in front or without; None if there is none."""
    *groups, name = key.lstrip("+").split(".")
    for group in groups:
        found = {field.name: field.default_factory for field in fields(schema)}.get(group)
        if not is_dataclass(found):
            return None
        schema = found
    return next((field for field in fields(schema) if field.name == name), None)


def is_text(field: Field[Any] | None) -> bool:
    """Whether the values of a field (None: no setting) are text: one, or a list of them."""
    return field is not None and (field.type in (str, str | None, list[str]) or "texts" in field.metadata)


def read_word(key: str, value: str, field: Field[Any] | None) -> str:
    """`key=value` for Hydra; `field` is the key's (None: of no setting). Text becomes a quoted string, as it was typed.

    Quotes around the whole value, or around an item of a list, do not belong to it; `null` is none where that is the
    default. Raises `UserError` for a name that is empty.
    """
    kind, texts, default = (
        (None, None, None) if field is None else (field.type, field.metadata.get("texts"), field.default)
    )
    if texts == "prose":
        items = None if kind is str else _list_of_hydra(value)
        return f"{key}={quote(value) if items is None else _quote_list(items)}"
    items = read_list(value) if kind == list[str] or texts else None
    if items or (items is not None and kind == list[str]):
        return f"{key}={_quote_list(items)}"
    if (kind in (str, str | None) or texts) and not (value == "null" and default is None):
        text = unquote(value)
        if not text:
            raise UserError(f"{key}=: empty; give a name")
        return f"{key}={quote(text)}"
    if get_origin(kind) is list and is_dataclass(get_args(kind)[0]):
        return f"{key}={_quote_names(value, get_args(kind)[0])}"
    # Hydra's grammar gives meaning to many characters; lists and quotes stay as they are.
    plain = not value or value[0] in "[{'\"" or value.replace(".", "").replace("-", "").isalnum()
    return f"{key}={value if plain else quote(value)}"


def write_word(key: str, text: str) -> str:
    """The word that `read_word` reads as this text."""
    plain = text != "null" and unquote(text) == text and read_list(text) is None
    return f"{key}={text if plain else quote(text)}"


def quote(text: str) -> str:
    """Any text as a quoted value: Hydra reads backslashes in front of a quote."""
    text = literal(text)
    return "'" + re.sub(r"(\\*)'", r"\1\1\\'", re.sub(r"(\\+)$", r"\1\1", text)) + "'"


def literal(text: str) -> str:
    """Text that OmegaConf reads as this text: it would follow `${`, and reads the backslashes in front of it."""
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", text)


def unquote(value: str) -> str:
    """The text inside quotes, or the value itself if it is not one quoted string."""
    found = _hydra_value(value) if value[:1] in ("'", '"') else None
    if not isinstance(found, str):
        return value
    return re.sub(r"(\\+)\$\{", lambda found: found[1][: len(found[1]) // 2] + "${", found)  # as `literal` writes it


def read_list(value: str) -> list[str] | None:
    """The items of `[a, 'b, c']`, as they were typed; None for what is no flat list, such as '[INST] hi [/INST]'."""
    inner = value[1:-1]
    if value[:1] != "[" or value[-1:] != "]" or any(depth < 0 for _, depth in _outside(inner)):
        return None
    items = [item.strip() for item in split(inner)] if inner.strip() else []
    if any(not item or item[0] in "[{" for item in items):
        return None
    return [unquote(item) if item[0] in QUOTES else _unescape(item) for item in items]


def split(value: str) -> list[str]:
    """The parts between commas that are not in brackets, in quotes that open a part, or behind a backslash."""
    cuts = [at for at, depth in _outside(value) if value[at] == "," and depth <= 0]
    return [value[start + 1 : end] for start, end in pairwise([-1, *cuts, len(value)])]


def _outside(value: str) -> Iterator[tuple[int, int]]:
    """Place and depth of brackets of every character that is not in quotes or behind a backslash."""
    depth, quoted, opens, escaped = 0, "", True, False
    for at, char in enumerate(value):
        if escaped or char == "\\":
            escaped, opens = not escaped, False
        elif quoted:
            quoted = "" if char == quoted else quoted
        elif opens and char in QUOTES:
            quoted = char
        else:
            depth += (char in "([{") - (char in ")]}")
            opens = char in ",([{" or (opens and char.isspace())
            yield at, depth


def sweep_values(value: str) -> list[str]:
    """What `a,b` or `choice(a,b)` of a text setting sweeps over; one value if it is no sweep."""
    chosen = re.fullmatch(r"choice\((.*)\)", value, re.DOTALL)
    return [item.strip() for item in split(chosen[1] if chosen else value)]


def _unescape(item: str) -> str:
    """Hydra's escapes in an item without quotes."""
    found = _hydra_value(item) if "\\" in item else item
    return found if isinstance(found, str) else item


def _list_of_hydra(value: str) -> list[str] | None:
    """A list of texts as Hydra reads it; a list with a number in it is none."""
    found = _hydra_value(value)
    return found if isinstance(found, list) and all(isinstance(item, str) for item in found) else None


def _quote_names(value: str, schema: type) -> str:
    """`[{name: 1e5, steps: 3}]` with the texts of its records in quotes."""
    names = "|".join(field.name for field in fields(schema) if field.type is str)
    if not names:
        return value
    return re.sub(rf"\b((?:{names}):\s*)([^\s,{{}}\[\]'\"]+)", lambda found: found[1] + quote(found[2]), value)


def _quote_list(items: list[str]) -> str:
    return f"[{','.join(map(quote, items))}]"


def _hydra_value(value: str) -> Any:
    try:
        return OverridesParser.create().parse_override(f"key={value}").value()
    except HydraException:
        return None
