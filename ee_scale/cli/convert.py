"""`ee-scale convert`: checkpoints of one world into those of another."""

from collections.abc import Sequence

from ee_scale import api
from ee_scale.cli.console import console
from ee_scale.config.convert import ConvertConfig
from ee_scale.conversion.check.verify import TOKENS
from ee_scale.log import configure_logging


def run(config: ConvertConfig, overrides: Sequence[str]) -> int:
    """Print the plan or carry it out; with `verify`, say how well source and result agree."""
    configure_logging()
    out, err = console(), console(stderr=True)
    done = api.convert(config, lambda line: err.print(line, highlight=False, soft_wrap=True))
    if done.folder is None:
        for line in done.lines:
            out.print(line, highlight=False, soft_wrap=True)
        return 0
    if (found := done.agreement) is not None:
        out.print(
            f"verified: {found.steps} points on {TOKENS} random tokens; largest relative difference: hidden states "
            f"{found.hidden:.2g}, logits {found.logits:.2g}; same top token {found.same_tokens:.1%}",
            highlight=False,
        )
    err.print(f"wrote {done.folder}", highlight=False, soft_wrap=True)
    return 0
