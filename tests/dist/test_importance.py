"""The order of units is the same at every grid, and the one that the formulas give on a plain transformers model."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from helpers.models import VOCAB, write_model
from helpers.spawn import spawn
from helpers.supernet import SupernetJob, write_base
from safetensors.torch import load_file, save_file

from ee_scale.backbone.loading import read_config
from ee_scale.backbone.stages import plan_stages
from ee_scale.elastic.architecture import ElasticMap
from ee_scale.elastic.importance import measure_order
from ee_scale.elastic.order import FIELDS, UnitOrder
from ee_scale.elastic.stage import ElasticStage, base_tensors
from ee_scale.elastic.subnet import drop_order
from ee_scale.families.build import AUTO_CLASS
from ee_scale.grid import Grid, Layout, join_grid, leave_grid

TASKS = {"llama": "causal_lm", "bert": "classify"}
LAYOUTS = {
    1: [Layout(1, 1, 1)],
    4: [Layout(2, 1, 2), Layout(1, 2, 2), Layout(2, 2, 1), Layout(4, 1, 1), Layout(1, 4, 1)],
}
CASES = [(world, layout, family) for world, layouts in LAYOUTS.items() for layout in layouts for family in TASKS]
LAYERS, HEADS, HEAD_DIM = 4, 4, {"llama": 32, "bert": 16}  # HEAD_DIM: columns of one group in the output projection
DEAD = {"hidden": [3, 40], "groups": {1: 2, 3: 0}, "ffn": {0: [5, 77], 2: [126]}}
USELESS_LAYER = 2


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("importance")
    llama = write_model(root / "llama", "llama", num_hidden_layers=LAYERS)
    bert = write_base(root / "bert", SupernetJob("bert"))
    for family, folder in (("llama", llama), ("bert", bert)):
        tensors = load_file(folder / "model.safetensors")
        plant(tensors, family)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return {"llama": llama, "bert": bert}


def plant(tensors: dict[str, torch.Tensor], family: str) -> None:
    """Units of clearly different worth, some of none, and (llama) a layer that adds nothing."""
    generator = torch.Generator().manual_seed(4)
    for name, value in tensors.items():
        if "norm" in name.lower():
            value[DEAD["hidden"]] = 0.0
    for layer in range(LAYERS):
        attention, mlp = output_matrices(tensors, family, layer)
        mlp *= 1.03 ** torch.randperm(128, generator=generator)
        attention *= (2.0 ** torch.randperm(HEADS, generator=generator)).repeat_interleave(HEAD_DIM[family])
        mlp[:, DEAD["ffn"].get(layer, [])] = 0.0
        if layer in DEAD["groups"]:
            attention.unflatten(1, (HEADS, -1))[:, DEAD["groups"][layer]] = 0.0
        if family == "llama" and layer == USELESS_LAYER:  # next to nothing, so that its units still have an order
            mlp *= 1e-4
            attention *= 1e-4


def output_matrices(tensors: dict[str, torch.Tensor], family: str, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    names = {
        "llama": ("model.layers.{}.self_attn.o_proj", "model.layers.{}.mlp.down_proj"),
        "bert": ("bert.encoder.layer.{}.attention.output.dense", "bert.encoder.layer.{}.output.dense"),
    }
    return tuple(tensors[name.format(layer) + ".weight"] for name in names[family])


def batches(family: str, padding: int = 0) -> list[dict[str, torch.Tensor]]:
    """Two batches [3, 16]; encoders get padding, filled with tokens that depend on `padding`."""
    found = []
    for index in range(2):
        generator = torch.Generator().manual_seed(10 + index)
        batch = {"tokens": torch.randint(3, VOCAB, (3, 16), generator=generator)}
        if family == "bert":
            mask = torch.ones(3, 16, dtype=torch.long)
            mask[1, 6 + index :], mask[2, 11:] = 0, 0
            noise = torch.randint(3, VOCAB, (3, 16), generator=torch.Generator().manual_seed(100 + padding))
            batch = {"tokens": torch.where(mask.bool(), batch["tokens"], noise), "attention_mask": mask}
        found.append(batch)
    return found


def run_cases(rank: int, layouts: list[Layout], folders: dict[str, Path]) -> dict:
    found = {}
    for layout in layouts:
        grid = join_grid(layout, torch.device("cpu"))
        for family, folder in folders.items():
            stage = load_stage(folder, TASKS[family], grid)
            hooks = count_hooks(stage)
            orders = {
                "measured": measure_order(stage, batches(family), 1),
                "in two parts": measure_order(stage, batches(family), 2),
                "other padding": measure_order(stage, batches(family, padding=1), 1),
            }
            assert count_hooks(stage) == hooks
            found[layout, family] = orders
        leave_grid()
    return found


def load_stage(folder: Path, task: str, grid: Grid) -> ElasticStage:
    elastic_map = ElasticMap(read_config(folder), task)
    plan = plan_stages(LAYERS, grid.layout.pp, [LAYERS], whole_model=True)
    stage = ElasticStage(elastic_map, plan, grid, torch.float32)
    stage.load(base_tensors(folder, elastic_map), UnitOrder.identity(elastic_map.shape))
    return stage


def count_hooks(stage: ElasticStage) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in stage.modules())


@pytest.fixture(scope="module")
def orders(folders: dict[str, Path]) -> dict[int, list[dict]]:
    return {world: spawn(run_cases, world, layouts, folders) for world, layouts in LAYOUTS.items()}


@dataclass
class Worth:
    """Importance by the formulas, in fp64 on transformers' own modules."""

    hidden: torch.Tensor = field(default_factory=lambda: torch.zeros(64, dtype=torch.float64))
    groups: torch.Tensor = field(default_factory=lambda: torch.zeros(LAYERS, HEADS, dtype=torch.float64))
    ffn: torch.Tensor = field(default_factory=lambda: torch.zeros(LAYERS, 128, dtype=torch.float64))
    layers: torch.Tensor = field(default_factory=lambda: torch.zeros(LAYERS, dtype=torch.float64))


@torch.no_grad()
def plain_worth(folder: Path, family: str) -> Worth:
    model, worth = AUTO_CLASS[TASKS[family]].from_pretrained(folder).double().eval(), Worth()
    base = model.model if family == "llama" else model.bert
    layers = base.layers if family == "llama" else base.encoder.layer
    seen: dict[str, torch.Tensor] = {}
    modules = {
        name: m for name, m in model.named_modules() if "norm" in name.lower() or "proj" in name or "dense" in name
    }
    modules |= {f"layer {i}": layer for i, layer in enumerate(layers)}
    for name, module in modules.items():
        module.register_forward_hook(lambda _, args, out, name=name: seen.update({name: (args[0], out)}))
    for batch in batches(family):
        mask = batch.get("attention_mask", torch.ones(3, 16)).bool()
        model(input_ids=batch["tokens"], attention_mask=mask.long())
        for name, (_, output) in seen.items():
            if "norm" in name.lower():
                worth.hidden += (output[mask] ** 2).sum(0)
        for i, layer in enumerate(layers):
            attention = layer.self_attn.o_proj if family == "llama" else layer.attention.output.dense
            mlp = layer.mlp.down_proj if family == "llama" else layer.output.dense
            names = {module: name for name, module in modules.items()}
            a, m = (seen[names[module]][0][mask] for module in (attention, mlp))
            for unit in range(128):
                worth.ffn[i, unit] += torch.outer(m[:, unit], mlp.weight[:, unit]).pow(2).sum()
            width = HEAD_DIM[family]
            for group in range(HEADS):
                columns = slice(group * width, (group + 1) * width)
                worth.groups[i, group] += (a[:, columns] @ attention.weight[:, columns].T).pow(2).sum()
            x, y = (state[mask] for state in seen[f"layer {i}"])
            worth.layers[i] += (1 - (x * y).sum(-1) / x.norm(dim=-1) / y.norm(dim=-1)).sum()
    return worth


@pytest.fixture(scope="module")
def worths(folders: dict[str, Path]) -> dict[str, Worth]:
    return {family: plain_worth(folder, family) for family, folder in folders.items()}


def test_the_importances_are_well_apart(worths: dict[str, Worth]) -> None:
    """Otherwise rounding could decide, and equal orders would be luck."""
    for worth in worths.values():
        for values in (worth.hidden, *worth.groups, *worth.ffn, worth.layers):
            alive = values[values > 0].sort().values
            assert (alive.diff() / alive[1:]).min() > 2e-5


@pytest.mark.parametrize(("world", "layout", "family"), CASES, ids=str)
def test_the_order_is_that_of_the_formulas(
    world: int, layout: Layout, family: str, orders: dict, worths: dict[str, Worth]
) -> None:
    worth = worths[family]
    for result in orders[world]:
        order = result[layout, family]["measured"]
        for name in ("hidden", "groups", "ffn"):
            expected = getattr(worth, name).argsort(dim=-1, descending=True, stable=True)
            assert torch.equal(getattr(order, name), expected), name
        assert order.drop.tolist() == worth.layers.argsort().tolist()
        halves = result[layout, family]["in two parts"].drop.tolist()
        assert halves == drop_order(worth.layers.tolist(), 2)


@pytest.mark.parametrize(("world", "layout", "family"), CASES, ids=str)
def test_padding_has_no_say(world: int, layout: Layout, family: str, orders: dict) -> None:
    assert not torch.equal(batches("bert")[0]["tokens"], batches("bert", padding=1)[0]["tokens"])
    for result in orders[world]:
        measured, other = (result[layout, family][name] for name in ("measured", "other padding"))
        assert all(torch.equal(getattr(measured, name), getattr(other, name)) for name in FIELDS)


@pytest.mark.parametrize(("world", "layout", "family"), CASES, ids=str)
def test_dead_units_come_last_and_useless_layers_go_first(
    world: int, layout: Layout, family: str, orders: dict
) -> None:
    for result in orders[world]:
        order = result[layout, family]["measured"]
        assert order.hidden[-2:].tolist() == DEAD["hidden"]
        for layer, group in DEAD["groups"].items():
            assert order.groups[layer, -1] == group
        for layer, units in DEAD["ffn"].items():
            assert order.ffn[layer, -len(units) :].tolist() == units
        if family == "llama":
            assert order.drop[0] == USELESS_LAYER
