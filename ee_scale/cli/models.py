"""`ee-scale --models`: over which axes of the grid each family of models can do what, as its object says.

`ee-scale check model=...`: the same of one model, with what was tried of it.
"""

from contextlib import suppress

from rich.table import Table
from transformers import PreTrainedConfig

from ee_scale.backbone.model_folder import ModelFolder
from ee_scale.backbone.proof import DECODING, NEEDED, TENSOR, Proof, prove
from ee_scale.backbone.shard import takes_tensor_parallel, tensor_plan
from ee_scale.cli.console import console
from ee_scale.errors import UserError
from ee_scale.exits.placement import has_router
from ee_scale.families.family import Family
from ee_scale.families.registry import FAMILIES, known_family
from ee_scale.families.sizes import ModelShape, shape_of
from ee_scale.modeling.kinds import KINDS

NOT = "-"
MOST_RANKS = 16
COLUMNS = ["tune", "generate", "supernet", "convert (Megatron)", "convert (EE-LLM)"]


def model_rows() -> list[list[str]]:
    """The table, its header first."""
    return [["model_type", *COLUMNS], *([family.name, *_axes(family)] for family in FAMILIES.values())]


def grouped_rows() -> list[list[str]]:
    """The same with one row for all families that can do the same."""
    header, *rows = model_rows()
    names: dict[tuple[str, ...], list[str]] = {}
    for name, *cells in rows:
        names.setdefault(tuple(cells), []).append(name)
    return [header, *([", ".join(group), *cells] for cells, group in names.items())]


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


def check(name: str) -> None:
    """What was tried of a model, and what it can do. Raises `UserError` for one that takes no exits."""
    folder = ModelFolder.named(name)
    config = folder.config
    proof, family, shape = prove(config), known_family(config), shape_of(config)
    table = Table(
        title=f"{config.model_type}, tried on a copy of {proof.layers} layers", title_justify="left", box=None
    )
    table.add_column("check")
    table.add_column("result", overflow="fold")
    for words in NEEDED:
        table.add_row(words, "holds")
    for words, reason in ((TENSOR, proof.tensor), (DECODING, proof.decoding)):
        table.add_row(words, reason.removeprefix(f"{words}: ") or "holds")
    console().print(table)
    kinds = [kind.name for kind in KINDS.values() if not (family.parallel and kind.tapped)]
    if shape.experts is not None:
        kinds = [name for name in kinds if not has_router(KINDS[name])]
    tensor = ", ".join(map(str, _tensor_ranks(config, proof)))
    cells = _expert_cells(shape) | {
        "tune": f"tp {tensor}; pp 1 to {shape.num_layers}; exits.kind={'|'.join(kinds)}",
        "decode with exits": "no" if proof.decoding else "yes",
        "supernet": "no" if family.elastic is None else "yes",
        "convert": "no" if family.megatron is None else "Megatron" + ", EE-LLM" * family.megatron.in_ee_llm,
    }
    able = Table(title="what it can do", title_justify="left", box=None, show_header=False)
    for words, cell in cells.items():
        able.add_row(words, cell)
    console().print(able)


def _expert_cells(shape: ModelShape) -> dict[str, str]:
    """What there is of experts, in words."""
    if (experts := shape.experts) is None:
        return {}
    layers, own = range(shape.num_layers), shape.vocab_size * shape.hidden_size * (1 if shape.tied_embeddings else 2)
    shared = f" and one of {experts.shared} units for all" if experts.shared else ""
    held, active = (own + sum(map(numbers, layers)) for numbers in (shape.held, shape.active))
    return {
        "experts": f"{experts.count} of {experts.units} units in {sum(experts.layers)} of {shape.num_layers} layers, "
        f"{experts.active} of them for a token{shared}",
        "weights": f"{held:,} held, {active:,} for a token",
    }


def _tensor_ranks(config: PreTrainedConfig, proof: Proof) -> list[int]:
    """Numbers that cut it evenly."""
    found = [1]
    for tp in () if proof.tensor else range(2, MOST_RANKS + 1):
        with suppress(UserError):
            tensor_plan(config, tp)
            found.append(tp)
    return found
