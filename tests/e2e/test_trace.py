"""`ee-scale trace`: what it writes, in which order things happened, and that it touches nothing else."""

import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from helpers.cli import run_cli

from ee_scale.engine.schedule import FrozenSchedule
from ee_scale.files import file_digest

FILES = {"timeline.json", "timeline.png"}
Row = dict[str, Any]


def digests(folder: Path) -> dict[str, str]:
    """Every file outside the trace."""
    names = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    return {str(name): file_digest(folder / name) for name in names if name.parts[0] != "trace"}


def spans(path: Path) -> dict[int, list[Row]]:
    """Instructions of a timeline by stage, in the order of their beginnings; steps are left out."""
    rows = [row for row in json.loads(path.read_text())["traceEvents"] if row["ph"] == "X" and row["cat"] != "step"]
    return {
        stage: sorted((row for row in rows if row["pid"] == stage), key=lambda row: row["ts"])
        for stage in sorted({row["pid"] for row in rows})
    }


@pytest.fixture(scope="module")
def traced(finished_run, tune_arguments, tmp_path_factory) -> tuple[Path, str]:
    """A trace of two stages into the folder of a finished run, with what an older trace left in it."""
    folder = tmp_path_factory.mktemp("traced")
    shutil.copytree(finished_run, folder / "run")
    (folder / "run" / "trace").mkdir()
    (folder / "run" / "trace" / "stage_7.json").write_text("old")
    finished = run_cli(
        ["trace", *tune_arguments, "out=run", "parallel.pp=2", "logging.trace_after=1"], folder, world_size=2
    )
    assert finished.codes == [0, 0], finished.outputs
    return folder / "run", finished.output


def test_a_trace_touches_nothing_but_its_folder(traced, finished_run):
    out, _ = traced
    assert digests(out) == digests(finished_run)
    assert {path.name for path in (out / "trace").iterdir()} == FILES | {"stage_0.json", "stage_1.json"}
    assert (out / "trace" / "timeline.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_the_table_names_every_stage_and_the_files(traced):
    _, output = traced
    assert "steps 2 to 3 (one machine, one clock)" in output
    assert [line.split("│")[1].strip() for line in output.splitlines() if line.startswith("│")] == ["0", "1"]
    assert "run/trace/timeline.png" in output
    assert "USDT" not in output


def test_each_stage_has_the_instructions_of_its_schedule(traced):
    stages = spans(traced[0] / "trace" / "timeline.json")
    assert list(stages) == [0, 1]
    for stage, rows in stages.items():
        schedule = FrozenSchedule(4, 2, stage, has_exits=True)
        expected = [command.name for commands in schedule.steps() for command in commands]
        for step in (2, 3):
            mine = [row for row in rows if row["args"]["step"] == step]
            assert [row["name"] for row in mine] == expected
            forwards = [row["args"]["micro_batch"] for row in mine if row["name"] == "ForwardPass"]
            assert forwards == [0, 1, 2, 3]
        for row, following in pairwise(rows):
            assert row["ts"] + row["dur"] <= following["ts"] + 1e-3


def test_the_stages_share_a_clock(traced):
    stages = spans(traced[0] / "trace" / "timeline.json")

    def found(stage: int, name: str) -> list[Row]:
        return [row for row in stages[stage] if row["name"] == name]

    sends, receives = found(0, "SendActivation"), found(1, "RecvActivation")
    assert len(sends) == len(receives) == 8
    for forward, send, receive, after in zip(
        found(0, "ForwardPass"), sends, receives, found(1, "ForwardPass"), strict=True
    ):
        assert forward["ts"] + forward["dur"] < receive["ts"] + receive["dur"]  # nothing comes before it was computed
        assert send["ts"] < after["ts"]
        assert receive["ts"] < send["ts"] + send["dur"] + 5e3  # gloo hands over when both are there


def test_the_profiles_name_the_instructions(traced):
    for stage in (0, 1):
        events = json.loads((traced[0] / "trace" / f"stage_{stage}.json").read_text())["traceEvents"]
        names = [event["name"] for event in events if event.get("cat") == "user_annotation"]
        assert names.count("ForwardPass") == names.count("TrainExits") == 8
        assert names.count("RecvActivation") == (0 if stage == 0 else 8)
        assert any(event["name"] == "aten::mm" for event in events)


def test_a_supernet_is_traced_in_its_last_phase(supernet_arguments, tmp_path):
    options = ["parallel.dp=2", "logging.trace_after=0", "logging.trace_steps=1"]
    finished = run_cli(["trace", *supernet_arguments, "out=run", *options], tmp_path, world_size=2)
    assert finished.codes == [0, 0], finished.outputs
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["trace"]
    assert {path.name for path in (tmp_path / "run" / "trace").iterdir()} == FILES | {"stage_0.json"}
    stages = spans(tmp_path / "run" / "trace" / "timeline.json")
    assert list(stages) == [0]  # of both replicas the first one records
    names = [row["name"] for row in stages[0]]
    # A micro-batch per replica, taught once and through four subnets: full, smallest and two random ones.
    assert names.count("Teach") == 1
    assert names.count("ForwardPass") == names.count("BackwardPass") == 4
    assert names[-1] == "OptimizerStep"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["logging.trace_after=7"],
            "error: logging.trace_after=7 and logging.trace_steps=2 need 9 steps; the run has 8",
        ),
        (["logging.trace_steps=0"], "error: logging.trace_steps=0: must be at least 1"),
    ],
)
def test_a_window_that_is_not_there(tune_arguments, tmp_path, settings, message):
    finished = run_cli(["trace", *tune_arguments, "out=run", *settings], tmp_path)
    assert finished.code == 2
    assert message in finished.output.splitlines()
    assert not (tmp_path / "run").exists()
