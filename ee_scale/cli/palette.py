"""`ee-scale palette`: search, cut out, measure, recommend."""

from collections.abc import Sequence
from pathlib import Path

from ee_scale import api
from ee_scale.cli.console import console
from ee_scale.config.supernet import PaletteConfig
from ee_scale.log import configure_logging
from ee_scale.palettes.draft_report import draft_sentences, draft_table
from ee_scale.palettes.recommend import palette_table, recommendations


def run(config: PaletteConfig, overrides: Sequence[str]) -> int:
    """Write the folder `out`, print the table and what to take."""
    configure_logging()
    manifest, terminal = api.palette(config), console()
    terminal.print(palette_table(manifest, f"{len(manifest.members)} sizes of {Path(manifest.base_model).name}"))
    for line in recommendations(manifest):
        terminal.print(line, highlight=False)
    if manifest.drafts is not None:
        terminal.print(draft_table(manifest))
        for line in draft_sentences(manifest):
            terminal.print(line, highlight=False)
    out = Path(config.out).expanduser()
    terminal.print(f"\nwrote {out} (manifest.json, report.md, palette.png)", highlight=False)
    return 0
