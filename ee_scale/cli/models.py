"""`ee-scale --models`: what can be done with each family of models, as its object says."""

from rich.table import Table

from ee_scale.backbone.shard import takes_tensor_parallel
from ee_scale.cli.console import console
from ee_scale.families.registry import FAMILIES

COLUMNS = {
    "tune, generate": lambda family: family.is_decoder,
    "with tp": takes_tensor_parallel,
    "supernet, palette": lambda family: family.elastic is not None,
    "Megatron": lambda family: family.megatron is not None,
    "EE-LLM's exits": lambda family: family.megatron is not None and family.megatron.in_ee_llm,
}


def model_rows() -> list[list[str]]:
    """The table, its header first."""
    cells = [
        [family.name, *("yes" if has(family) else "-" for has in COLUMNS.values())] for family in FAMILIES.values()
    ]
    return [["model_type", *COLUMNS], *cells]


def run() -> None:
    """Print the table."""
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    header, *rows = model_rows()
    for name in header:
        table.add_column(name)
    for row in rows:
        table.add_row(*row)
    console().print(table)
