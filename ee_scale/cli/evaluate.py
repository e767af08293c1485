"""`ee-scale evaluate`: loss, perplexity and agreement per exit; with `sweep`, quality against speed; per group."""

from collections.abc import Sequence

from ee_scale import api
from ee_scale.cli.console import console
from ee_scale.config.schema import EvaluateConfig
from ee_scale.evaluation import quality_report
from ee_scale.log import configure_logging


def run(config: EvaluateConfig, overrides: Sequence[str]) -> int:
    """Measure and print the tables; with `out`, write JSON, CSV and plots too."""
    configure_logging()
    found, out = api.evaluate(config), console()
    tokens, points = f"{found.tokens:,} tokens", found.points
    out.print(quality_report.quality_table(found.exits, f"{config.model} on {config.data}, {tokens}"))
    if found.tags:
        rows = {tag: exits for tag, (exits, _) in found.tags.items()}
        counts = {tag: count for tag, (_, count) in found.tags.items()}
        out.print(quality_report.tag_table(rows, counts, "per tag"))
        out.print(quality_report.agreement_gap_sentence(rows), highlight=False)
    if points:
        title = f"leaving early: {tokens} given the true text before them"
        out.print(quality_report.sweep_table(points, title + (", and greedy decoding" if points[-1].speed else "")))
    if points and points[0].tags:
        out.print(quality_report.tag_sweep_table(points, "leaving early, per tag"))
        out.print(quality_report.match_gap_sentence(points), highlight=False)
    return 0
