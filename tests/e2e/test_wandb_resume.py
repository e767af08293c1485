"""A run that was killed and goes on is one run in Weights & Biases (offline here), with all its steps."""

import json
import struct
from pathlib import Path

from helpers.cli import run_cli
from wandb.proto.wandb_internal_pb2 import Record

BLOCK, HEADER = 2**15, 7  # a .wandb file is a LevelDB log: pieces of records with checksum, length and kind


def records(folder: Path) -> list[Record]:
    """What an offline run wrote, as `wandb sync` would read it."""
    (path,) = folder.glob("*.wandb")
    data, at, whole, found = path.read_bytes(), HEADER, b"", []
    while at + HEADER <= len(data):
        if BLOCK - at % BLOCK < HEADER:  # the rest of a block is empty
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + HEADER])
        whole += data[at + HEADER : at + HEADER + length]
        at += HEADER + length
        if kind in (1, 4):  # whole, or the last piece
            found.append(Record.FromString(whole))
            whole = b""
    return found


def steps(found: list[Record]) -> list[int]:
    """The run's own steps in a history."""
    rows = [{item.key or ".".join(item.nested_key): item.value_json for item in r.history.item} for r in found]
    return [int(json.loads(row["step"])) for row in rows if "step" in row]


def test_killed_and_resumed(tune_arguments, tmp_path):
    command = [*tune_arguments, "out=run", "logging.wandb=offline", "logging.wandb_group=sweep"]
    assert run_cli(command, tmp_path, die_at_step=5).code == -9
    finished = run_cli(command, tmp_path)
    assert finished.code == 0, finished.output
    run_id = json.loads((tmp_path / "run" / "run.json").read_text())["run_id"]
    first, second = sorted((tmp_path / "run" / "wandb").glob("offline-run-*"), key=lambda path: path.stat().st_ctime)
    assert first.name.endswith(f"-{run_id}")
    assert second.name.endswith(f"-{run_id}")
    found = records(second)
    assert steps(found) == [4, 5, 6, 7, 8]  # from the checkpoint of step 3 on
    assert {record.run.run_group for record in found if record.HasField("run")} == {"sweep"}
    assert any(record.metric.name == "step" or record.metric.step_metric == "step" for record in found)
