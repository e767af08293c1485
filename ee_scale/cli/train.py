"""`ee-scale tune`, `ee-scale supernet`: everything is checked and prepared by one process; then the ranks train."""

from collections.abc import Sequence

from rich.table import Table

from ee_scale.cli.console import console
from ee_scale.config.schema import TrainingConfig
from ee_scale.launching.job import log_as_rank, run_job
from ee_scale.training.recipe import Words, recipe_of


def run(verb: str, config: TrainingConfig, overrides: Sequence[str]) -> int:
    """Train."""
    log_as_rank(config)
    recipe = recipe_of(verb).of(config)
    return run_job(recipe, overrides, lambda: show(recipe.words()))


def show(words: Words) -> None:
    """The plan's table."""
    table = Table(title=words.title, title_justify="left")
    for column in words.columns:
        table.add_column(column, justify="left" if column in words.left else "right")
    for row in words.rows:
        table.add_row(*row)
    console(stderr=True).print(table)
