"""metrics.jsonl, the progress line, and Weights & Biases (a fake one) across a kill and a resume."""

import importlib
import json
import logging
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ee_scale.log import log
from ee_scale.training import sinks
from ee_scale.training.metrics import StepMetrics
from ee_scale.training.sinks import MetricsFile, ProgressLine, WandbSink

SETTINGS = SimpleNamespace(wandb="online", wandb_project="exits", wandb_name=None, wandb_group="sweep")


def at(step: int, loss: float = 1.0, **more: Any) -> StepMetrics:
    return StepMetrics(step, 10 * step, 0.1, {"loss": {6: loss, 12: loss / 2}}, 50.0, **more)


FULL = {"mfu": 0.25, "stages": {"idle": {0: 0.1, 1: 0.625}, "memory_gib": {0: 1.0, 1: 2.0}}, "skipped": {12: 3}}


class Server:
    """wandb with a memory: a run's history by id; as the real client does, it drops steps below the last one."""

    def __init__(self) -> None:
        self.inits: list[dict[str, Any]] = []
        self.history: dict[str, dict[int, dict[str, Any]]] = {}
        self.axes: list[tuple[str, str | None]] = []

    def Settings(self, **kwargs: Any) -> None:  # noqa: N802 (wandb's name)
        pass

    def init(self, **kwargs: Any) -> "Server":
        self.inits.append(kwargs)
        self.rows = self.history.setdefault(kwargs["id"], {})
        self.starting_step = max(self.rows) + 1 if self.rows and kwargs["resume"] == "allow" else 0
        return self

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.axes.append((name, step_metric))

    def log(self, values: dict[str, Any], step: int) -> None:
        if step >= max(self.rows, default=0):
            self.rows[step] = values

    def finish(self) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    fake = Server()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_a_resumed_run_keeps_its_id_and_loses_no_step(server):
    sink = WandbSink(Path("runs/a"), SETTINGS, {}, "1a2b3c4d", "exit")
    for step in range(1, 58):  # killed after step 57; the checkpoint is of step 50
        sink(at(step))
    sink = WandbSink(Path("runs/a"), SETTINGS, {}, "1a2b3c4d", "exit")
    for step in range(51, 61):
        sink(at(step, loss=2.0))
    sink.close()
    assert [(call["id"], call["resume"]) for call in server.inits] == [("1a2b3c4d", "allow")] * 2
    rows = list(server.history["1a2b3c4d"].values())
    assert [row["step"] for row in rows] == [*range(1, 58), *range(51, 61)]
    assert ("*", "step") in server.axes  # so the run's own step is the x axis
    assert list(server.history["1a2b3c4d"])[:57] == list(range(1, 58))


def test_a_resume_that_repeats_nothing_goes_on_with_the_same_numbers(server):
    for steps in (range(1, 11), range(11, 13)):
        sink = WandbSink(Path("a"), SETTINGS, {}, "id", "exit")
        for step in steps:
            sink(at(step))
    assert list(server.history["id"]) == list(range(1, 13))


def test_group_and_names_of_charts(server):
    sink = WandbSink(Path("runs/a"), SETTINGS, {"train": {"steps": 3}}, "id", "exit")
    sink(at(1, grad_norms={6: 0.5}, **FULL))
    (call,) = server.inits
    assert (call["group"], call["name"], call["project"]) == ("sweep", "a", "exits")
    expected = {"loss/exit_6": 1.0, "loss/exit_12": 0.5, "grad_norm/exit_6": 0.5, "skipped/exit_12": 3, "mfu": 0.25}
    expected |= {"idle/stage_0": 0.1, "idle/stage_1": 0.625, "memory_gib/stage_0": 1.0, "memory_gib/stage_1": 2.0}
    expected |= {"step": 1, "tokens": 10, "learning_rate": 0.1, "tokens_per_second": 50.0}
    assert server.history["id"][1] == expected


def test_a_failing_wandb_is_off(server, monkeypatch, caplog):
    monkeypatch.setattr(log, "propagate", True)
    monkeypatch.setattr(log, "handlers", [])  # of commands that ran before
    monkeypatch.setattr(server, "log", lambda *_, **__: (_ for _ in ()).throw(OSError("no network")))
    sink = WandbSink(Path("a"), SETTINGS, {}, "id", "exit")
    for step in (1, 2):
        sink(at(step))
    sink.close()
    assert [r.getMessage() for r in caplog.records] == ["wandb failed and is off for the rest of the run: no network"]


def test_runs_that_do_not_want_wandb_need_none(monkeypatch, caplog):
    monkeypatch.setattr(log, "propagate", True)
    monkeypatch.setattr(log, "handlers", [])
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it was not installed
    importlib.reload(sinks)
    sinks.WandbSink(Path("a"), SETTINGS, {}, "id", "exit")(at(1))
    (told,) = caplog.records
    assert told.getMessage().startswith("wandb failed and is off for the rest of the run: import of wandb")


def strict(line: str) -> dict[str, Any]:
    """As a parser reads it that goes by the standard."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    return json.loads(line, parse_constant=refuse)


def test_metrics_jsonl_is_json_whatever_the_numbers_are(tmp_path):
    sink = MetricsFile(tmp_path / "metrics.jsonl")
    sink(at(1))
    sink(at(2, loss=float("nan"), grad_norms={6: float("inf")}))
    sink.close()
    first, second = (strict(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert first["loss"] == {"6": 1.0, "12": 0.5}
    assert (second["loss"], second["grad_norm"]) == ({"6": None, "12": None}, {"6": None})


@pytest.mark.parametrize(
    ("more", "end"), [({}, "50 tokens/s"), (FULL, "50 tokens/s  mfu 25.0%  idle 62% (stage 1)  skipped 3")]
)
def test_the_progress_line_is_short(more, end, caplog, monkeypatch):
    monkeypatch.setattr(log, "propagate", True)
    monkeypatch.setattr(log, "handlers", [])  # of commands that ran before
    caplog.set_level(logging.INFO, logger="ee_scale")
    ProgressLine(5, 0, 1, "exit", enabled=False)(at(1, **more))
    assert caplog.messages == [f"step 1/5  loss by exit 6:1.000  12:0.500  {end}"]
