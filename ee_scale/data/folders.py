"""Which files a data setting names: one, or those below a folder; what is left out is told."""

import os
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ee_scale.data.chat import has_document
from ee_scale.data.readers import CSV, JSON, KINDS, REFUSED, TEXT, TSV, file_kind, read_records, split_name
from ee_scale.data.utf8 import BadBytes
from ee_scale.errors import UserError

SHOWN = 5
UNSURE = (JSON, CSV, TSV)  # records, or something else that is kept beside them
# Words about data, where there is data: names without suffix, in small letters.
ABOUT = ("readme", "license", "licence", "copying", "notice", "changelog", "citation")
ABOUT_DATA = "about the data or its loader, beside data"


@dataclass
class Files:
    """Files and what each is read as, sorted by path; names by the reason for which they are left out."""

    name: str
    files: list[tuple[Path, str]] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def told(self) -> Iterator[str]:
        """A line for each kind and for each reason."""
        kinds = defaultdict(list)
        for path, kind in self.files:
            kinds[kind].append(path.name)
        for kind, names in kinds.items():
            yield f"{self.name}: read as {kind}: {_few(names)}"
        yield from self._reasons()

    def _reasons(self) -> Iterator[str]:
        for reason, names in self.left_out.items():
            yield f"{self.name}: left out ({reason}): {_few(names)}"

    def drop(self, paths: set[Path], reason: str) -> None:
        """Leave out files that were found."""
        if not paths:
            return
        self.left_out[reason] += [path.name for path, _ in self.files if path in paths]
        self.files = [item for item in self.files if item[0] not in paths]


def _few(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def setting_name(fields: str, name: str) -> str:
    """What a person calls a setting of the data: `data.path`, or `data` in a config that has no group (fields='').

    `data.valid` and `train.held_out` (then `fields`) are paths that share the other settings of `data`.
    """
    if fields in ("data.valid", "train.held_out"):
        return fields if name == "path" else f"data.{name}"
    return f"{fields}.{name}" if fields else {"path": "data"}.get(name, name)


def bad_bytes(fields: str, errors: str) -> BadBytes:
    """What the setting `data.errors` says about bytes that are no text."""
    return BadBytes(errors == "replace", setting_name(fields, "errors"))


def find_files(source: str, text_key: str, fields: str = "data", errors: str = "strict") -> Files:
    """The file itself, or every file of a known kind below a folder. Raises `UserError` if there is none.

    Linked folders are followed, hidden names are not. Beside files of records (`.jsonl` and the like) what is there
    about them (a README, a loader) is no text to train on; `.json`, `.csv` and `.tsv` count where their first record
    has the field `text_key` or is a conversation.
    """
    here = f"{setting_name(fields, 'path')}='{source}'"
    path, found = Path(source).expanduser(), Files(here)
    if path.suffix in (".bin", ".idx"):
        raise UserError(f"{here}: give a Megatron dataset as its prefix, without {path.suffix}")
    if path.is_file():
        found.files.append((path, file_kind(path, here)))
        return found
    if not path.is_dir():
        for there, lost in ((".bin", ".idx"), (".idx", ".bin")):
            if Path(f"{path}{there}").is_file():
                raise UserError(f"{here}: {path.name}{there} is there, {path.name}{lost} is missing")
        raise UserError(f"{here}: no such file or folder")
    refused = _sort(found, path, text_key, bad_bytes(fields, errors))
    if refused or any(kind != TEXT for _, kind in found.files):
        beside = {file for file, kind in found.files if kind == TEXT and split_name(file)[0] != ".txt"}
        found.drop(beside, ABOUT_DATA)
    about = {file for file, kind in found.files if kind == TEXT and file.name.lower().split(".")[0] in ABOUT}
    if about and len(about) < len(found.files):
        found.drop(about, ABOUT_DATA)
    if not found.files:
        left = "; ".join(line.removeprefix(f"{here}: ") for line in found._reasons())
        raise UserError(f"{here}: no {', '.join(KINDS)} file in it" + (f"; {left}" if left else ""))
    return found


def _sort(found: Files, root: Path, text_key: str, bad: BadBytes) -> bool:
    """Fill in files and reasons; whether there is data that cannot be read."""
    refused, seen = False, set()
    for file in sorted(_walk(root, set(), found)):
        suffix, _ = split_name(file)
        if not file.is_file():
            found.left_out["a link to nothing" if file.is_symlink() else "no file"].append(file.name)
        elif suffix in REFUSED:
            refused = True
            found.left_out[f"{suffix} files are not read; {REFUSED[suffix]}"].append(file.name)
        elif suffix not in KINDS:
            found.left_out["no kind of text that is known"].append(file.name)
        elif KINDS[suffix] in UNSURE and (reason := _no_data(file, text_key, bad)):
            found.left_out[reason].append(file.name)
        elif (real := os.path.realpath(file)) in seen:
            found.left_out["the same file again, by a link"].append(file.name)
        else:
            seen.add(real)
            found.files.append((file, KINDS[suffix]))
    return refused


def _walk(folder: Path, above: set[str], found: Files) -> Iterator[Path]:
    """All files below a folder but hidden ones; a link to a folder it lies in leads nowhere."""
    here = os.path.realpath(folder)
    if here in above:
        found.left_out["a link to a folder that it lies in"].append(folder.name)
        return
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise UserError(f"{found.name}: cannot read {folder} ({error.strerror})") from error
    for entry in entries:
        if entry.name.startswith("."):
            found.left_out["hidden"].append(entry.name)
        elif entry.is_dir():
            yield from _walk(entry, above | {here}, found)
        else:
            yield entry


def _no_data(file: Path, text_key: str, bad: BadBytes) -> str | None:
    """Why a file that may hold records or something else is no data; None: it is."""
    try:
        first = next(read_records(file, KINDS[split_name(file)[0]], "", bad), None)
    except UserError as error:
        return str(error).removeprefix(": ").strip()
    if first is None:
        return "no record"
    return None if has_document(first.record, text_key) else f"its first record has no text '{text_key}'"
