"""What pyarrow reads for us: rows of `.parquet`, and what `zstd` packed."""

import io
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import IO, TYPE_CHECKING, Any

from ee_scale.data.utf8 import BadBytes, bad_bytes
from ee_scale.errors import UserError, one_line

if TYPE_CHECKING:
    from pyarrow import RecordBatch, Scalar

ROWS = 256  # that are in memory as Python objects


def parquet_rows(path: Path, here: str, bad: BadBytes) -> Iterator[tuple[int, dict[str, Any], int]]:
    """(row from 1, values by column, bytes of the file that count for it). Raises `UserError`."""
    arrow = need_pyarrow(here)
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if twice := sorted({name for name in names if names.count(name) > 1}):
                raise UserError(f"{here}: two columns of the name '{twice[0]}'")
            number, size, count = 0, path.stat().st_size, file.metadata.num_rows
            for batch in file.iter_batches(ROWS):
                for row in _rows(batch, here, number, bad):
                    number += 1
                    yield number, row, number * size // count - (number - 1) * size // count
    except (arrow.ArrowException, OSError) as error:
        raise UserError(f"{here}: cannot read ({one_line(error)})") from error


def _rows(batch: "RecordBatch", here: str, before: int, bad: BadBytes) -> list[dict[str, Any]]:
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:  # a string column holds any bytes that somebody called text
        return [
            {
                name: _value(batch[name][i], f"{here} row {before + i + 1}: field '{name}'", bad)
                for name in batch.schema.names
            }
            for i in range(batch.num_rows)
        ]


def _value(scalar: "Scalar", here: str, bad: BadBytes) -> Any:
    """The value of a cell, whose parts may be strings that are no UTF-8. Raises `UserError`."""
    import pyarrow as arrow

    if not scalar.is_valid:
        return None
    if isinstance(scalar, arrow.StructScalar):
        return {name: _value(part, here, bad) for name, part in scalar.items()}
    if isinstance(scalar, (arrow.ListScalar, arrow.LargeListScalar)) and not isinstance(scalar, arrow.MapScalar):
        return [_value(part, here, bad) for part in scalar]
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        if not bad.replace or not isinstance(scalar, (arrow.StringScalar, arrow.LargeStringScalar)):
            raise UserError(f"{here}: {bad_bytes(error)}, at byte {error.start} of it{bad.hint}") from error
        return error.object.decode("utf-8", "replace")


def unpacked_zstd(raw: IO[bytes], here: str) -> IO[bytes]:
    """The stream behind a packed one. Raises `UserError`; what is cut off raises OSError when that place is read."""
    arrow = need_pyarrow(here)
    return io.BufferedReader(arrow.CompressedInputStream(raw, "zstd"))


def need_pyarrow(here: str) -> ModuleType:
    """The module. Raises `UserError` that says how to install it."""
    try:
        import pyarrow
    except ImportError as error:
        raise UserError(
            f"{here}: .parquet and .zst files need pyarrow: pip install 'ee-scale[data]' ({error})"
        ) from error
    return pyarrow
