"""`ee-scale defer`: when a small model's answer is kept, and when a larger one is asked."""

from collections.abc import Sequence
from pathlib import Path

from ee_scale import api
from ee_scale.cli.console import console
from ee_scale.config.defer import DeferConfig
from ee_scale.evaluation.defer import PLOT_FILE, RULE_FILE
from ee_scale.evaluation.deferral_report import curve_table, group_table, statements
from ee_scale.log import configure_logging


def run(config: DeferConfig, overrides: Sequence[str]) -> int:
    """Write the folder `out`, print both tables and what is guaranteed."""
    configure_logging()
    deferral, out = api.defer(config), console()
    out.print(group_table(deferral))
    out.print(curve_table(deferral))
    for line in statements(deferral):
        out.print(line, highlight=False)
    folder = Path(config.out).expanduser()
    console(stderr=True).print(f"wrote {folder} ({RULE_FILE}, {PLOT_FILE})", highlight=False)
    return 0
