"""`ee-scale report` on logs of several processes: tables, warning, files, bad input."""

import json

import pytest

from ee_scale.cli.main import main
from ee_scale.modeling.decision_log import DecisionLog


@pytest.fixture
def logs(tmp_path, monkeypatch):
    """Two files: tag 'chat' is fine, tag 'sql' agrees on only 80 % of its compared tokens."""
    moments = iter(range(1_800_000_000, 1_900_000_000, 12))
    monkeypatch.setattr("ee_scale.modeling.decision_log.time.time", lambda: float(next(moments)))
    for tag, wrong in (("chat", 100), ("sql", 5)):
        with DecisionLog(tmp_path / f"{tag}.jsonl") as log:
            log.describe(12, [3, 6], "threshold")
            for i in range(400):
                layer = (3, 6, 12)[i % 3]
                log.add(f"{tag}-{i // 100}", i, layer, 0.9, tag, None if layer == 12 else i % wrong != 0)
    return tmp_path


def test_tables_warning_and_files(logs, capsys):
    assert main(["report", f"log={logs}/*.jsonl", "every=day", f"out={logs / 'out'}"]) == 0
    shown = capsys.readouterr().out
    assert "per tag" in shown
    assert "warning: tag sql: " in shown
    assert "tag chat: " not in shown
    report = json.loads((logs / "out" / "report.json").read_text())
    assert report["total"]["tokens"] == 800
    assert report["total"]["mean_depth"] == pytest.approx((268 * 3 + 266 * 6 + 266 * 12) / 800)
    assert [row["tag"] for row in report["tags"]] == ["chat", "sql"]
    sql = report["tags"][1]
    assert sql["agreement"] == pytest.approx(1 - sql["exited"] / 400 * (1 - sql["agreed"] / sql["audited"]))
    assert (logs / "out" / "report.csv").read_text().count("\n") == 3
    assert (logs / "out" / "report.png").read_bytes().startswith(b"\x89PNG")


def test_one_tag_and_notes(logs, capsys):
    (logs / "old.jsonl").write_text('{"time": 5.0, "layer": 3, "tag": "chat"}\nnot json\n')
    assert main(["report", f"log=[{logs / 'chat.jsonl'},{logs / 'old.jsonl'}]", "tag=chat"]) == 0
    shown = capsys.readouterr().out
    assert "sql" not in shown
    assert "1 lines are not whole records" in shown


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("log=none*.jsonl", "no such file"),
        ("every=week", "every=week"),
        ("agreement=2", "agreement=2"),
        ("tag=x", "tag=x"),
    ],
)
def test_bad_input(logs, capsys, wrong, said):
    assert main(["report", f"log={logs}/*.jsonl", wrong]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert said in error
