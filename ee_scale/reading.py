"""Documents that others wrote. Whatever a file holds: its value, or one line that says why not.

Those of ours have a digest of themselves, which tells whether they are what was written.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, with_config

from ee_scale.errors import UserError, one_line
from ee_scale.files import file_digest, is_file, named_file, write_text

DEEPEST = 100  # levels of lists and objects; what walks a document later must not run out of stack either
SHOWN = 80  # characters of a value in a message
DIGEST_KEY = "sha256"
_MARKS = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*(?:"|$)|[\[\]{}]', re.DOTALL)

Count = Annotated[int, Field(ge=0, lt=1 << 63)]
whole = with_config(ConfigDict(extra="forbid"))  # of a dataclass: `checked` refuses fields that it does not have


def parse_json(text: str) -> Any:
    """The value of a JSON text. Raises ValueError, and nothing else, for what is none or is nested too deep."""
    if text.count("[") + text.count("{") > DEEPEST and _is_deep(text):
        raise ValueError(f"nested more than {DEEPEST} levels deep")
    return json.loads(text)


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object of a file. Raises `UserError`."""
    try:
        value = parse_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot read ({error.strerror or error})") from error
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: not a JSON object but {type(value).__name__}")
    return value


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write JSON with a digest of itself."""
    write_text(path, json.dumps({**value, DIGEST_KEY: _json_digest(value)}, indent=1) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read JSON that `write_json` wrote. Raises `UserError` if it is torn or was edited."""
    try:
        value = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a whole file of ours ({one_line(error)})") from error
    if not isinstance(value, dict) or DIGEST_KEY not in value:
        raise UserError(f"{path}: not a whole file of ours (no object with a '{DIGEST_KEY}')")
    if value.pop(DIGEST_KEY) != _json_digest(value):
        raise UserError(f"{path}: its content does not match its digest; it was edited or damaged")
    return value


def check_files(folder: Path, digests: dict[str, str]) -> None:
    """Raise `UserError` naming the first file that is missing or not what was written."""
    for name, digest in digests.items():
        path = named_file(folder, name, folder)
        if not is_file(path):
            raise UserError(f"{path}: missing")
        if file_digest(path) != digest:
            raise UserError(f"{path}: its content does not match its digest; it was cut off or edited")


def checked(kind: object, value: object, here: str | Path) -> Any:
    """A JSON value as `kind`: a type with its parts (`dict[str, str]`, `Count`) or a dataclass; nothing is converted.

    `here` names the value. Raises `UserError` that names the part which is missing or wrong.
    """
    try:
        return TypeAdapter(kind).validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        place = f": {'.'.join(map(str, first['loc']))}" if first["loc"] else ""
        found = "" if first["type"] in ("missing", "json_invalid") else f"={shown(first['input'])}"
        raise UserError(f"{here}{place}{found}: {first['msg'].lower()}") from error


def check_fields(values: dict[str, Any], here: str | Path, **kinds: object) -> None:
    """Raise `UserError` naming the first field that is missing or not of its kind (see `checked`)."""
    for name, kind in kinds.items():
        if name not in values:
            raise UserError(f"{here}: no field '{name}' in it")
        checked(kind, values[name], f"{here}: {name}")


def shown(value: object) -> str:
    """A value in a message: on one line, and not longer than a person reads."""
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."


def _is_deep(text: str) -> bool:
    depth = 0
    for match in _MARKS.finditer(text):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(match[0], 0)
        if depth > DEEPEST:
            return True
    return False


def _json_digest(value: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
