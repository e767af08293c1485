"""Tables, sentence and picture of scripts/bench_palette.py, from made-up results."""

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from _palette_plot import plot
from _palette_report import (
    Latency,
    Report,
    Result,
    Way,
    compared,
    headlines,
    over_seeds,
    print_tables,
    summed_up,
    to_teacher,
    write,
)
from rich.console import Console

from ee_scale.palettes.intervals import Scores, interval, wilson

SIZES = ["f768-d4", "f384-d3"]
TEXTS = 1000


def answers(right: int, of: int = TEXTS) -> Scores:
    """The first ones are right."""
    sums = torch.zeros(of, dtype=torch.float64)
    sums[:right] = 1
    return Scores(sums, torch.ones_like(sums))


def nats(mean: float) -> Scores:
    """Texts of 10 tokens whose losses differ by the same in every size."""
    spread = torch.linspace(-0.5, 0.5, TEXTS, dtype=torch.float64)
    return Scores(10 * (mean + spread), torch.full((TEXTS,), 10.0, dtype=torch.float64))


def made(accuracy: bool = True) -> Report:
    """Two sizes; the supernet takes 100 s behind a teacher of 80 s, separate runs 400 s."""
    answered = answers if accuracy else nats
    taught = answered(850 if accuracy else 2.0)
    figures = {
        "supernet": [(838, 800), (836, 802)] if accuracy else [(2.10, 2.25), (2.12, 2.27)],
        "polished, 30 steps": [(840, 812), (842, 814)] if accuracy else [(2.05, 2.2), (2.05, 2.2)],
        "separate": [(841, 810), (841, 810)] if accuracy else [(2.08, 2.22), (2.08, 2.22)],
    }
    seconds, results = {"supernet": 100.0, "polished, 30 steps": 150.0, "separate": 400.0}, []
    for name, runs in figures.items():
        scores = [[{"held out": answered(value)} for value in run] for run in runs]
        results.append(Result(name, 1000, 80.0, [seconds[name]] * 2, scores))
    return Report(
        case="made up",
        metric="accuracy" if accuracy else "loss",
        steps=(1, 2, 3),
        sizes=SIZES,
        params=[15_000_000, 13_000_000],
        layer_params=[5_000_000, 2_600_000],
        full_params=20_000_000,
        full_layer_params=10_000_000,
        teacher_seconds=80.0,
        ways=[Way(r.name, r.teacher + r.apart, r.apart, r.trained) for r in results],
        judged=[summed_up("held out", taught, results, "accuracy" if accuracy else "loss")],
    )


def shown(report: Report) -> list[str]:
    """Lines of what is printed."""
    out = io.StringIO()
    print_tables(Console(file=out, width=170), report)
    return out.getvalue().splitlines()


def cells(lines: list[str], label: str) -> list[str]:
    """Of the first row with this label."""
    line = next(line for line in lines if line.strip("│ ").startswith(label))
    return [cell.strip() for cell in line.strip("│").split("│")]


def test_quality_over_seeds_is_the_middle_of_its_interval() -> None:
    spread = over_seeds([answers(800), answers(840)], "accuracy")
    assert (spread.low, spread.high) == wilson(0.82, TEXTS)
    spread = over_seeds([nats(2.0), nats(3.0)], "loss")
    assert spread.mean == pytest.approx(2.5)
    assert (spread.low + spread.high) / 2 == pytest.approx(2.5)


def test_seeds_widen_a_difference() -> None:
    alike = compared([answers(800), answers(800)], [answers(810), answers(810)])
    apart = compared([answers(780), answers(820)], [answers(810), answers(810)])
    assert alike.mean == pytest.approx(apart.mean) == pytest.approx(-0.01)
    assert alike.seen
    assert not apart.seen
    assert (alike.low, alike.high) == pytest.approx(interval(answers(800).minus(answers(810))))


def test_share_of_the_teacher() -> None:
    share = to_teacher([answers(760)], answers(800), "accuracy")
    assert share.mean == pytest.approx(0.95)
    # The delta method: the residuals right - 0.95 x teacher's right, text by text.
    residual = answers(760).sums - 0.95 * answers(800).sums
    half = 1.959964 * float(residual.std()) * TEXTS**0.5 / 800
    assert share.high - share.mean == pytest.approx(half, rel=1e-6)
    above = to_teacher([nats(2.25), nats(2.27)], nats(2.0), "loss")
    assert above.mean == pytest.approx(0.26)


def test_time_is_said_with_the_teacher_and_without() -> None:
    lines = shown(made())
    assert cells(lines, "supernet")[-4:] == ["180", "0.38", "0.25", "1,000"]
    assert cells(lines, "polished, 30")[-4:] == ["230", "0.48", "0.38", "1,000"]
    assert cells(lines, "separate")[-4:] == ["480", "1.00", "1.00", "1,000"]


def test_rows_beside_separate_runs_and_the_teacher() -> None:
    lines = shown(made())
    assert cells(lines, "supernet - separate")[1:3] == ["-0.4", "-0.9*"]
    assert cells(lines, "polished, 30 steps - separate")[1:3] == ["+0.0", "+0.3"]
    assert cells(lines, "supernet, % of the teacher's")[1:3] == ["98.5", "94.2"]
    assert cells(shown(made(accuracy=False)), "supernet, nats above the teacher")[1:3] == ["+0.110*", "+0.260*"]


def test_another_domain_has_the_same_table_without_the_costs() -> None:
    report = made()
    alone = len([line for line in shown(report) if "training" in line])
    report.judged.append(replace(report.judged[0], name="tweets", texts=7))
    lines = shown(report)
    assert any("made up, tweets: accuracy" in line for line in lines)
    assert any(line.startswith("7 texts") for line in lines)
    assert len([line for line in lines if "training" in line]) == alone


def test_latency_is_a_share_of_the_full_models() -> None:
    report = made()
    assert not any("latency" in line for line in shown(report))
    report.latency = Latency(48, {"torch": 8.0, "onnx fp32": 4.0}, {"torch": [4.0, 2.0], "onnx fp32": [2.0, 1.2]})
    lines = shown(report)
    assert cells(lines, "latency, torch")[1:3] == ["0.50", "0.25"]
    (told,) = (line for line in headlines(report) if line.startswith("latency"))
    assert told.endswith(
        "f384-d3 (26% of the layers' parameters) as a share of the full model's: 0.25 (torch), 0.30 (onnx fp32)"
    )


def test_sentence() -> None:
    supernet, polished = headlines(made())
    assert supernet.startswith("supernet: 0.38 of the time of separate runs (0.25 with the teacher apart); ")
    assert "behind them by at most 0.9 points (difference at f384-d3: -0.9*, " in supernet
    assert "; f384-d3 (26% of the layers' parameters) is at 94.2% of the teacher (" in supernet
    assert "ahead of them" not in polished
    assert "behind them by at most 0.0 points (difference at f768-d4: +0.0, " in polished
    supernet, polished = headlines(made(accuracy=False))
    assert "behind them by at most 0.040 nats (difference at f384-d3: +0.040*, " in supernet
    assert "f384-d3 (65% of the parameters) is at +0.260* nats of the teacher (" in supernet
    assert "ahead of them by at least 0.020 nats (difference at f384-d3: -0.020*, " in polished


def test_without_a_teacher_of_its_own_there_is_one_time() -> None:
    report = made(accuracy=False)
    report.teacher_seconds, report.ways = 0.0, [replace(way, seconds=way.apart) for way in report.ways]
    assert headlines(report)[0].startswith("supernet: 0.25 of the time of separate runs; ")


def test_files(tmp_path: Path) -> None:
    plot(tmp_path / "plot.png", [made(), made(accuracy=False)])
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    write(tmp_path / "bench.json", 2, 60.0, [made()])
    (report,) = json.loads((tmp_path / "bench.json").read_text())["reports"]
    assert report["judged"][0]["quality"]["supernet"][1]["mean"] == pytest.approx(0.801)
    assert report["ways"][0] == {"name": "supernet", "seconds": 180.0, "apart": 100.0, "trained": 1000}
