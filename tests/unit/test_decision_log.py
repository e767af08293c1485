"""Decision logs: every line arrives once and whole, also from several processes and after a kill; sums by hand."""

import json
import multiprocessing
import os
import signal
import time

import pytest

from ee_scale.errors import UserError
from ee_scale.evaluation.log_report import report_table, warnings, write_log_report
from ee_scale.evaluation.log_summary import NO_TAG, LogSummary, Summary, bucket_seconds, log_files, summarise, wilson
from ee_scale.modeling.decision_log import DecisionLog

HEADER = {"num_layers": 12, "layers": [3, 6], "policy": "threshold"}


def test_lines_are_json_and_come_in_blocks(tmp_path):
    path = tmp_path / "log.jsonl"
    begun = time.time()
    with DecisionLog(path, flush_every=3, flush_seconds=1e9) as log:
        log.describe(**HEADER)
        log.describe(**HEADER)
        log.add('a "quoted" name', 7, 3, 0.25, tag="größe\n", agrees=True)
        assert path.read_text() == ""
        log.add(1, 8, 12, float("nan"))
        assert len(path.read_text().splitlines()) == 3
        log.add("x", 9, 6, 0.123456789, agrees=False)
        log.add("x", 10, 12, None)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines[0] == HEADER
    assert begun - 0.001 <= lines[1].pop("time") <= time.time() + 0.001
    first = {"request": 'a "quoted" name', "position": 7, "layer": 3, "confidence": 0.25}
    assert lines[1] == {**first, "tag": "größe\n", "agrees": True}
    assert (lines[2]["request"], lines[2]["confidence"], lines[2]["tag"], lines[2]["agrees"]) == (1, None, None, None)
    assert (lines[3]["confidence"], lines[3]["agrees"]) == (0.123457, False)
    assert (lines[4]["confidence"], len(lines)) == (None, 5)


def test_a_quiet_log_is_written_in_time(tmp_path):
    log = DecisionLog(tmp_path / "log.jsonl", flush_seconds=0.0)
    log.add("a", 0, 3, 0.5)
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 1
    log.close()
    log.close()
    with pytest.raises(ValueError, match="closed"):
        log.add("a", 1, 3, 0.5)


def test_blocks_must_hold_something(tmp_path):
    with pytest.raises(ValueError, match="flush_every=0"):
        DecisionLog(tmp_path / "log.jsonl", flush_every=0)


def _write(path, number, count):
    with DecisionLog(path, flush_every=7) as log:
        for i in range(count):
            log.add(f"p{number}", i, 3, 0.5)


def _write_until_killed(path):
    log = DecisionLog(path, flush_every=1)
    while True:
        log.add("killed", 0, 3, 0.5, tag="x" * 200)


def test_processes_share_a_file(tmp_path):
    path, context = tmp_path / "log.jsonl", multiprocessing.get_context("fork")
    killed = context.Process(target=_write_until_killed, args=(path,), daemon=True)
    killed.start()
    writers = [context.Process(target=_write, args=(path, number, 500)) for number in range(3)]
    for process in writers:
        process.start()
    while not path.exists() or path.stat().st_size < 20_000:
        time.sleep(0.01)
    os.kill(killed.pid, signal.SIGKILL)
    for process in [killed, *writers]:
        process.join()
    _write(path, 3, 1)
    summary = summarise([path], 3600)
    assert summary.skipped <= 1
    records = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
    for number in range(3):
        assert [r["position"] for r in records if r["request"] == f"p{number}"] == list(range(500))


def test_a_torn_line_is_skipped_and_nothing_joins_it(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text(json.dumps(HEADER) + '\n{"time": 1.0, "request": "a", "posi')
    with DecisionLog(path) as log:
        log.add("b", 0, 12, 0.5)
    summary = summarise([path], 60)
    assert summary.skipped == 1
    assert summary.by(None)[None].tokens == 1


def _line(moment, layer, confidence, tag, agrees):
    record = {"time": moment, "request": "r", "position": 0, "layer": layer, "confidence": confidence}
    return json.dumps({**record, "tag": tag, "agrees": agrees}) + "\n"


@pytest.fixture
def log(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(
        json.dumps(HEADER)
        + "\n"
        + _line(10.0, 3, 0.5, "sql", True)
        + _line(59.9, 3, 0.7, "sql", False)
        + _line(30.0, 12, None, "sql", None)
        + _line(60.0, 6, 0.9, None, True)
        + _line(130.0, 3, 0.9, "sql", None)
    )
    return path


def test_sums_by_hand(log):
    summary = summarise([log], 60)
    assert sorted(summary.cells) == [(0.0, "sql"), (60.0, NO_TAG), (120.0, "sql")]
    assert summary.num_layers == {12}
    first = summary.by(0)[0.0]
    assert (first.tokens, first.depth, first.exited, first.audited, first.agreed) == (3, 18, 2, 2, 1)
    assert dict(first.layers) == {3: 2, 12: 1}
    # Of three tokens one needed all layers; of the two others half agree.
    assert first.agreement(0.9)[0] == pytest.approx(1 - 2 / 3 * 0.5)
    assert summary.by(1)["sql"].depth == 3 * 3 + 12
    total = summary.by(None)[None].to_json(0.95)
    assert total["mean_depth"] == pytest.approx(27 / 5)
    assert total["shares"] == {"3": 0.6, "6": 0.2, "12": 0.2}
    assert total["mean_confidence"] == pytest.approx(0.75)
    assert summary.by(0)[120.0].agreement(0.9) is None
    assert set(summarise([log], 60, tag="sql").by(1)) == {"sql"}


def test_bounds_hold_the_share_as_often_as_they_say():
    """Exact coverage of Wilson's interval, summed over the binomial distribution."""
    from math import comb

    for n, p in ((30, 0.9), (200, 0.97), (200, 0.5)):
        inside = [k for k in range(n + 1) if wilson(k, n, 0.95)[0] <= p <= wilson(k, n, 0.95)[1]]
        assert sum(comb(n, k) * p**k * (1 - p) ** (n - k) for k in inside) == pytest.approx(0.95, abs=0.03)


def _summary(cells):
    return LogSummary(
        {key: Summary(n, 3 * n, exited=n, audited=n, agreed=agreed) for key, (n, agreed) in cells.items()}
    )


def test_warns_where_agreement_is_below_the_bound_beyond_chance():
    good, chance, bad = (1000, 985), (100, 97), (1000, 930)
    said = warnings(_summary({(0.0, "a"): good, (3600.0, "a"): chance, (7200.0, "b"): bad}), 0.98, 0.95)
    assert len(said) == 2
    assert said[0].startswith("since 1970-01-01 02:00: 93.00% of the tokens")
    assert said[1].startswith("tag b: ")
    assert "70 of 1000 compared tokens differ" in said[1]
    assert warnings(_summary({(0.0, NO_TAG): good}), 0.98, 0.95) == []


def test_files_and_table(log, tmp_path):
    summary = summarise([log], 60)
    write_log_report(tmp_path / "out", summary, {"every_seconds": 60}, 0.98, 0.95)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [row["tokens"] for row in report["times"]] == [3, 1, 1]
    assert report["tags"][1]["tag"] == "sql"
    rows = (tmp_path / "out" / "report.csv").read_text().splitlines()
    assert rows[0].endswith("share_3,share_6,share_12")
    assert rows[1].startswith("1970-01-01 00:00,sql,3,6.0,")
    assert (tmp_path / "out" / "report.png").read_bytes().startswith(b"\x89PNG")
    assert report_table(summary, 0, "", 0.95).row_count == 3


def test_bad_input(log, tmp_path):
    assert (bucket_seconds("day"), bucket_seconds(15), bucket_seconds("2.5")) == (86400, 900, 150)
    for wrong in ("week", 0, -1, "nan"):
        with pytest.raises(UserError, match="every="):
            bucket_seconds(wrong)
    assert log_files([str(tmp_path / "*.jsonl"), str(log)]) == [log]
    with pytest.raises(UserError, match="no such file"):
        log_files([str(tmp_path / "*.txt")])
    with pytest.raises(UserError, match="no decision with tag=x"):
        summarise([log], 60, tag="x")


def test_tags_that_are_numbers_are_their_text(tmp_path):
    path = tmp_path / "a.jsonl"
    tags = ["7", "7.10", '"7.10"', "true", '"7"', "1e2", "null", "[1]"]
    lines = ['{"num_layers": 12, "layers": [3]}', *(f'{{"time": 1.0, "layer": 3, "tag": {tag}}}' for tag in tags)]
    path.write_text("\n".join(lines))
    found = {tag: cell.tokens for tag, cell in summarise([path], 60).by(1).items()}
    assert found == {
        "7": 2,
        "7.10": 2,
        "true": 1,
        "1e2": 1,
        NO_TAG: 1,
    }  # a list is no tag
    assert summarise([path], 60, tag="7").by(None)[None].tokens == 2


@pytest.mark.parametrize(
    "line",
    [
        *['"num_layers"', '["num_layers"]', '{"num_layers": "x"}', '{"num_layers": 1.5}', "7", "null", "[" * 100_000],
        *['{"time": 1.0, "layer": "3"}', '{"time": Infinity, "layer": 3}', '{"time": NaN, "layer": 3}'],
        *['{"time": 1e300, "layer": 3}', '{"time": 1.0, "layer": 1.5}', '{"time": 1.0, "layer": ' + "9" * 400 + "}"],
        *['{"time": 1.0, "layer": -1}', '{"time": 1.0, "layer": 3, "confidence": "x"}', '{"time": [], "layer": 3}'],
        *['{"time": 1.0, "layer": 3, "confidence": Infinity}', '{"time": -1e300, "layer": 3}'],
    ],
)
def test_a_line_that_is_no_record_is_counted(log, line):
    with log.open("a") as file:
        file.write(line + "\n")
    summary = summarise([log], 60)
    assert (summary.skipped, summary.by(None)[None].tokens) == (1, 5)
    assert report_table(summary, 0, "", 0.95).row_count == 3
