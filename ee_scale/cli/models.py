"""`ee-scale --models`: over which axes of the grid each family of models can do what, as its object says."""

from rich.table import Table

from ee_scale.backbone.shard import takes_tensor_parallel
from ee_scale.cli.console import console
from ee_scale.families.family import Family
from ee_scale.families.registry import FAMILIES

NOT = "-"
COLUMNS = ["tune", "generate", "supernet", "convert (Megatron)", "convert (EE-LLM)"]


def model_rows() -> list[list[str]]:
    """The table, its header first."""
    return [["model_type", *COLUMNS], *([family.name, *_axes(family)] for family in FAMILIES.values())]


def _axes(family: Family) -> list[str]:
    """A cell per column."""
    split = "tp pp" if takes_tensor_parallel(family) else "pp"
    megatron = family.megatron
    return [
        f"{split} dp" if family.is_decoder else NOT,
        split if family.is_decoder else NOT,
        "tp pp dp" if family.elastic is not None else NOT,
        "tp pp" if megatron is not None else NOT,
        "tp pp" if megatron is not None and megatron.in_ee_llm else NOT,
    ]


def run() -> None:
    """Print the table."""
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    header, *rows = model_rows()
    for name in header:
        table.add_column(name)
    for row in rows:
        table.add_row(*row)
    console().print(table)
