"""The order of units is the same at every grid, and the one that the formulas give on a plain transformers model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers.models import VOCAB, write_model
from helpers.spawn import spawn
from helpers.supernet import SupernetJob, write_base
from safetensors.torch import load_file, save_file
from torch import nn

from ee_scale.backbone.loading import read_config
from ee_scale.backbone.stages import plan_stages
from ee_scale.elastic.architecture import ElasticMap
from ee_scale.elastic.divergence import divergence_order
from ee_scale.elastic.importance import measure_order
from ee_scale.elastic.order import FIELDS, UnitOrder
from ee_scale.elastic.stage import ElasticStage, base_tensors
from ee_scale.elastic.subnet import drop_in_turn, drop_order
from ee_scale.errors import UserError
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
    return {"llama": llama, "bert": bert, "uneven": write_uneven(root / "uneven")}


def write_uneven(folder: Path) -> Path:
    """A decoder with layers of very different worth, one of which adds nothing."""
    write_model(folder, "llama", num_hidden_layers=LAYERS)
    tensors, generator = load_file(folder / "model.safetensors"), torch.Generator().manual_seed(2)
    for layer in range(LAYERS):
        for matrix in output_matrices(tensors, "llama", layer):
            matrix *= 0.0 if layer == USELESS_LAYER else 3.0 ** float(torch.rand((), generator=generator) * 4 - 3)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


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


def texts(masked: bool) -> list[dict[str, torch.Tensor]]:
    """A decoder's batches; `masked`: few tokens count."""
    found = batches("llama")
    if masked:
        for index, batch in enumerate(found):
            batch["loss_mask"] = torch.zeros(3, 16)
            batch["loss_mask"][index, 3:9] = 0.5
    return found


def run_cases(rank: int, layouts: list[Layout], folders: dict[str, Path]) -> dict:
    found = {}
    for layout in layouts:
        grid = join_grid(layout, torch.device("cpu"))
        for family, task in TASKS.items():
            stage = load_stage(folders[family], task, grid)
            hooks = count_hooks(stage)
            orders = {
                "measured": measure_order(stage, batches(family), 1),
                "in two parts": measure_order(stage, batches(family), 2),
            }
            if family == "bert":  # the other has none
                orders["other padding"] = measure_order(stage, batches(family, padding=1), 1)
            assert count_hooks(stage) == hooks
            found[layout, family] = orders
        found[layout, "layers"] = run_divergences(load_stage(folders["uneven"], "causal_lm", grid), ways(layout))
        leave_grid()
    return found


def ways(layout: Layout) -> list[tuple[int, bool]]:
    """(parts, masked) of a grid: all on one rank, where tensors are cut and where stages are; else the first."""
    return list(product((1, 2), (False, True))) if layout == Layout() or layout.dp > 1 else [(1, False)]


def run_divergences(stage: ElasticStage, cases: list[tuple[int, bool]]) -> dict[tuple[int, bool], list[int]]:
    """(parts, masked) -> order of the layers."""
    found = {(parts, masked): divergence_order(stage, texts(masked), parts, LAYERS) for parts, masked in cases}
    assert stage.spec == stage.map.shape.full
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
    return {family: plain_worth(folders[family], family) for family in TASKS}


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


@pytest.mark.parametrize(("world", "layout"), dict.fromkeys(case[:2] for case in CASES), ids=str)
def test_padding_has_no_say(world: int, layout: Layout, orders: dict) -> None:
    assert not torch.equal(batches("bert")[0]["tokens"], batches("bert", padding=1)[0]["tokens"])
    for result in orders[world]:
        measured, other = (result[layout, "bert"][name] for name in ("measured", "other padding"))
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


def plain_divergences(folder: Path, masked: bool) -> Callable[[Sequence[int], Sequence[int]], dict[int, float]]:
    """KL(full || without layers), by the formula in fp64 on a plain transformers model."""
    model = AUTO_CLASS["causal_lm"].from_pretrained(folder).double().eval()
    layers = list(model.model.layers)

    @torch.no_grad()
    def log_p(kept: list[int]) -> torch.Tensor:
        model.model.layers = nn.ModuleList(layers[i] for i in kept)
        found = [model(input_ids=batch["tokens"], use_cache=False).logits.log_softmax(-1) for batch in texts(masked)]
        counted = [batch.get("loss_mask", torch.ones(3, 16)) > 0 for batch in texts(masked)]
        return torch.cat([logits[mask] for logits, mask in zip(found, counted, strict=True)])

    full = log_p(list(range(LAYERS)))

    def without(dropped: Sequence[int], candidates: Sequence[int]) -> dict[int, float]:
        kept = [i for i in range(LAYERS) if i not in dropped]
        rest = {c: log_p([i for i in kept if i != c]) for c in candidates}
        return {c: float(F.kl_div(found, full, log_target=True, reduction="sum")) for c, found in rest.items()}

    return without


@pytest.mark.parametrize("masked", [False, True], ids=["all tokens", "masked"])
@pytest.mark.parametrize("parts", [1, 2])
def test_the_layers_of_a_decoder_are_dropped_by_divergence(
    parts: int, masked: bool, orders: dict, folders: dict[str, Path]
) -> None:
    """The same at every grid: measured again after each drop, from the state in front of the layer."""
    expected = drop_in_turn(LAYERS, parts, plain_divergences(folders["uneven"], masked))
    assert expected[0] == USELESS_LAYER
    for world, results in orders.items():
        for result in results:
            for layout in (layout for layout in LAYOUTS[world] if (parts, masked) in ways(layout)):
                assert result[layout, "layers"][parts, masked] == expected, layout


def test_divergence_is_no_other_measure(folders: dict[str, Path]) -> None:
    """Otherwise the test above could not tell it from influence, from a single measurement, or from all tokens."""
    greedy, masked = (drop_in_turn(LAYERS, 1, plain_divergences(folders["uneven"], only)) for only in (False, True))
    once = plain_divergences(folders["uneven"], False)([], range(LAYERS))
    others = [sorted(once, key=once.get), masked, plain_worth(folders["uneven"], "llama").layers.argsort().tolist()]
    assert greedy not in others
    gaps = torch.tensor(sorted(once.values())).diff() / torch.tensor(sorted(once.values()))[1:]
    assert gaps.min() > 1e-3


def run_broken(_: int, folder: Path) -> str:
    """What a rank says when a layer of the first stage gives no numbers."""
    grid = join_grid(Layout(1, 2, 1), torch.device("cpu"))
    stage = load_stage(folder, "causal_lm", grid)
    if 1 in stage.layers:
        stage.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(UserError) as error:
        divergence_order(stage, texts(False), 1, LAYERS)
    assert stage.spec == stage.map.shape.full
    leave_grid()
    return str(error.value)


def test_no_number_is_no_order(folders: dict[str, Path]) -> None:
    """Every rank stops, with the same words."""
    for words in spawn(run_broken, 2, folders["uneven"]):
        assert words.endswith("the logits of the model, or of that without layer 0, are no numbers")


def run_few(_: int, folder: Path) -> tuple[list[int], int]:
    stage = load_stage(folder, "causal_lm", join_grid(Layout(), torch.device("cpu")))
    forwards: list[int] = []
    stage.register_forward_hook(lambda *_: forwards.append(1))
    order = divergence_order(stage, texts(False), 1, 2)
    leave_grid()
    return order, len(forwards)


def test_only_layers_that_somebody_drops_are_measured(folders: dict[str, Path], orders: dict) -> None:
    ((order, forwards),) = spawn(run_few, 1, folders["uneven"])
    assert order[:2] == orders[1][0][Layout(), "layers"][1, False][:2]
    assert sorted(order) == list(range(LAYERS))
    assert forwards == len(texts(False)) * ((1 + LAYERS) + (1 + LAYERS - 1))
