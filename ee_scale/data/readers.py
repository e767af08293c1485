"""What a file is, by its name, and what stands in it: text, or records with fields."""

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from ee_scale.data.parquet import parquet_rows, unpacked_zstd
from ee_scale.data.utf8 import BOM, STRICT, BadBytes, Decoder
from ee_scale.errors import UserError

# The csv module refuses fields above 131,072 characters; documents are longer.
csv.field_size_limit(sys.maxsize)

TEXT, JSON_LINES, JSON, CSV, TSV, PARQUET = "text", "JSON lines", "JSON", "csv", "tsv", "parquet"
KINDS = {
    **dict.fromkeys((".txt", ".md", ".rst", ".py"), TEXT),
    **{".jsonl": JSON_LINES, ".csv": CSV, ".tsv": TSV, ".ndjson": JSON_LINES, ".json": JSON, ".jsonlines": JSON_LINES},
    ".parquet": PARQUET,
}
RECORDS = (JSON_LINES, JSON, CSV, TSV, PARQUET)
OPENERS: dict[str, Callable[[IO[bytes], str], IO[bytes]]] = {
    ".gz": lambda raw, here: gzip.GzipFile(fileobj=raw),
    ".bz2": lambda raw, here: bz2.BZ2File(raw),
    ".xz": lambda raw, here: lzma.LZMAFile(raw),  # noqa: SIM115
    ".zst": unpacked_zstd,
}
_TO_JSONL = "write it as .jsonl first (pandas: read_{0}(...).to_json('data.jsonl', orient='records', lines=True))"
REFUSED = {
    ".feather": _TO_JSONL.format("feather"),
    ".arrow": "write it as .jsonl first (datasets: load_from_disk(...).to_json('data.jsonl'))",
    ".xlsx": _TO_JSONL.format("excel"),
    **dict.fromkeys((".zip", ".tar", ".tgz", ".7z", ".rar", ".lz4"), "unpack it first"),
}
CHUNK = 64 * 1024
_MARKS = {codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32"}
_MARKS |= {codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16"}  # after UTF-32, whose mark begins with it
_STARTS = {b"PAR1": ".parquet", b"\x1f\x8b": ".gz", b"\xfd7zX": ".xz", b"\x28\xb5\x2f\xfd": ".zst"}


@dataclass(frozen=True)
class Found:
    """A record, its place ('line 3': where it ends) and how many bytes of the file were read since the last one."""

    record: dict[str, Any]
    place: str
    num_bytes: int


class Number(str):
    """A number of a JSON file, as it was written."""


def split_name(path: Path) -> tuple[str, str]:
    """(suffix, suffix of the packing or ''), in small letters: '.jsonl', '.gz' of 'A.JSONL.gz'."""
    packed = path.suffix.lower()
    return (Path(path.stem).suffix.lower(), packed) if packed in OPENERS else (packed, "")


def file_kind(path: Path, here: str) -> str:
    """What a file that a person named is read as. Raises `UserError` for kinds that cannot be read."""
    suffix, _ = split_name(path)
    if suffix in REFUSED:
        raise UserError(f"{here}: {suffix} files are not read; {REFUSED[suffix]}")
    return KINDS.get(suffix, TEXT)


@contextmanager
def opened(path: Path, here: str) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """The file as it lies on the disk, and unpacked.

    Raises `UserError` for what cannot be read, for UTF-16, and for what is packed without saying so in its name.
    """
    try:
        with path.open("rb") as raw:
            packing = split_name(path)[1]
            stream = OPENERS[packing](raw, here) if packing else raw
            start = stream.peek(4)[:4]
            for mark, name in _MARKS.items():
                if start.startswith(mark):
                    raise UserError(f"{here}: {name} text; write it as UTF-8 first (iconv -f {name} -t UTF-8)")
            for mark, suffix in _STARTS.items():
                if start.startswith(mark):
                    raise UserError(f"{here}: begins as a {suffix} file does, whatever its name says; call it {suffix}")
            yield raw, stream
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise UserError(f"{here}: cannot read ({getattr(error, 'strerror', None) or error})") from error


def read_text(path: Path, here: str, bad: BadBytes = STRICT) -> Iterator[tuple[str, int]]:
    """A text file in parts of about CHUNK bytes, each with the bytes of the file that were read for it.

    At least one part comes. Raises `UserError` naming line and byte of what is no text.
    """
    with opened(path, here) as (raw, stream):
        decoder, before = Decoder(here, bad), 0
        while chunk := stream.read(CHUNK):
            yield decoder.decode(chunk), raw.tell() - before
            before = raw.tell()
        yield decoder.decode(b"", final=True), raw.tell() - before


def read_records(
    path: Path, kind: str, here: str, bad: BadBytes = STRICT, *, as_written: bool = False
) -> Iterator[Found]:
    """The records of a file of one of RECORDS, numbers `as_written` or read. Raises `UserError` naming the line."""
    if kind == PARQUET:
        yield from _parquet_records(path, here, bad, as_written)
        return
    parser = json.JSONDecoder(parse_int=Number, parse_float=Number) if as_written else json.JSONDecoder()
    with opened(path, here) as (raw, stream):
        if kind == JSON:
            rows = _json_values(stream, here, bad, parser)
        elif kind == JSON_LINES:
            rows = _json_lines(_lines(stream, here, bad), here, parser)
        else:
            rows = _csv_rows(_lines(stream, here, bad), kind, here)
        before = 0
        for number, row in rows:
            if not isinstance(row, dict):
                raise UserError(f"{here} line {number}: not a JSON object but {type(row).__name__}")
            yield Found(row, f"line {number}", raw.tell() - before)
            before = raw.tell()


def _parquet_records(path: Path, here: str, bad: BadBytes, as_written: bool) -> Iterator[Found]:
    if packing := split_name(path)[1]:
        raise UserError(f"{here}: a .parquet file is packed inside; unpack the {packing} around it")
    for number, row, num_bytes in parquet_rows(path, here, bad):
        if as_written:
            row = {name: Number(value) if type(value) in (int, float) else value for name, value in row.items()}
        yield Found(row, f"row {number}", num_bytes)


def text_of(record: dict[str, Any], key: str, here: str, setting: str, bad: BadBytes = STRICT) -> str:
    """The text in a field. Raises `UserError` that names the setting which chooses the field."""
    if key not in record:
        names = ", ".join(sorted(record)[:12])
        raise UserError(f"{here}: no field '{key}' (fields: {names}); set {setting}")
    text = record[key]
    if not isinstance(text, str) or isinstance(text, Number):
        raise UserError(f"{here}: field '{key}' is not text but {type(text).__name__}")
    return whole_characters(bad.without_nul(text, f"{here}: field '{key}'"))


def whole_characters(text: str) -> str:
    """The text with '?' for halves of surrogate pairs: escaped ones are valid JSON and no valid text."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-8", "replace").decode()
    return text


def _lines(stream: Iterable[bytes], here: str, bad: BadBytes) -> Iterator[str]:
    """Lines with their ends: cut at line feeds alone, not at other ends that Unicode knows."""
    decoder = Decoder(here, bad)
    for raw in stream:
        yield decoder.decode(raw, final=True)


def _json_lines(lines: Iterable[str], here: str, parser: json.JSONDecoder) -> Iterator[tuple[int, Any]]:
    """(line, value), one per line that is not blank."""
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                yield number, parser.decode(line.removeprefix(BOM))
            except (ValueError, RecursionError) as error:
                raise UserError(f"{here} line {number}: not valid JSON ({_json_words(error)})") from error


def _json_values(stream: IO[bytes], here: str, bad: BadBytes, parser: json.JSONDecoder) -> Iterator[tuple[int, Any]]:
    """(line, value) of a list of values, or of values one after the other; one value is held at a time."""
    decoder = Decoder(here, bad)
    text, line, size, in_list, done = "", 1, CHUNK, None, False
    while True:
        skipped = text.lstrip(" \t\r\n," if in_list else " \t\r\n")
        line += text.count("\n", 0, len(text) - len(skipped))
        text = skipped
        if in_list is None and text:
            in_list = text[0] == "["
            text = text[1:] if in_list else text
            continue
        if in_list and text.startswith("]"):
            if text[1:].strip() or stream.read(CHUNK).strip():
                raise UserError(f"{here} line {line}: not valid JSON (text behind the end of the list)")
            return
        try:
            # A number at the end of what was read may go on.
            value, end = parser.raw_decode(text) if text else (None, 0)
            if text and (done or end < len(text)):
                line += text.count("\n", 0, end)
                yield line, value
                text, size = text[end:], CHUNK
                continue
        except (ValueError, RecursionError) as error:
            if done or isinstance(error, RecursionError):
                words = _json_words(error)
                raise UserError(
                    f"{here} line {line + getattr(error, 'lineno', 1) - 1}: not valid JSON ({words})"
                ) from error
        if done:
            if in_list:
                raise UserError(f"{here} line {line}: not valid JSON (the list has no end)")
            return
        chunk = stream.read(size)
        text += decoder.decode(chunk, final=not chunk)
        done, size = not chunk, 2 * size


def _json_words(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg}: column {error.colno}"
    return "too many brackets within one another" if isinstance(error, RecursionError) else str(error).split(";")[0]


def _csv_rows(lines: Iterable[str], kind: str, here: str) -> Iterator[tuple[int, dict[str, str]]]:
    """(last line of the row, values by column)."""
    style: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if kind == TSV else {"strict": True}
    reader = csv.reader((part for line in lines for part in io.StringIO(line, newline="")), **style)
    header: list[str] = []
    try:
        for values in reader:
            if not values:
                continue
            if not header:
                header = [name.strip() for name in values]
                if twice := sorted({name for name in header if name and header.count(name) > 1}):
                    raise UserError(f"{here} line {reader.line_num}: the header names '{twice[0]}' twice")
                continue
            if len(values) != len(header):
                raise UserError(f"{here} line {reader.line_num}: {len(values)} values, the header names {len(header)}")
            yield reader.line_num, dict(zip(header, values, strict=True))
    except csv.Error as error:
        raise UserError(f"{here} line {reader.line_num}: not valid .{kind} ({error})") from error
