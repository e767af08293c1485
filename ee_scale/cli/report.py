"""`ee-scale report`: decision logs summed over time and per tag."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ee_scale.cli.console import console, with_progress
from ee_scale.config.schema import ReportConfig
from ee_scale.data.inputs import sources
from ee_scale.evaluation.log_report import report_table, warnings, write_log_report
from ee_scale.evaluation.log_summary import NO_TAG, bucket_seconds, log_files, summarise


def run(config: ReportConfig, overrides: Sequence[str]) -> int:
    """Print the tables and warnings; with `out`, write JSON, CSV and a plot too."""
    every, files = bucket_seconds(config.every), log_files(sources(config.log))
    tag = None if config.tag is None else str(config.tag)
    summary = summarise(with_progress(files, "reading"), every, tag)
    out = console()
    out.print(report_table(summary, None, "all decisions", config.confidence))
    out.print(report_table(summary, 0, f"every {config.every}", config.confidence))
    if set(summary.by(1)) != {NO_TAG}:
        out.print(report_table(summary, 1, "per tag", config.confidence))
    for sentence in _notes(summary) + warnings(summary, config.agreement, config.confidence):
        out.print(f"warning: {sentence}", style="yellow", highlight=False)
    if config.out:
        facts = {"files": [str(path) for path in files], "every_seconds": every, "agreement_wanted": config.agreement}
        write_log_report(Path(config.out).expanduser(), summary, facts, config.agreement, config.confidence)
    return 0


def _notes(summary: Any) -> list[str]:
    total, notes = summary.by(None)[None], []
    if summary.skipped:
        notes.append(f"{summary.skipped} lines are not whole records and were left out")
    if len(summary.num_layers) > 1:
        depths = ", ".join(map(str, sorted(summary.num_layers)))
        notes.append(f"models of {depths} layers are mixed in these logs; mean layers do not compare")
    if not summary.num_layers:
        notes.append("no header names the model's depth; every layer is taken for an exit")
    if not total.audited:
        notes.append("no token was compared with the full model; decode with exit_audit to know the agreement")
    return notes
