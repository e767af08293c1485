"""Mixtures of experts: read from either form of files, the MLP that an exit has in their place, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.folders import Tensors, packed, rewritten, without
from helpers.models import MIXTURES, load_whole, spec_of, tiny_config, write_model
from helpers.reference import dense_mlp
from rich.console import Console
from safetensors.torch import load_file
from torch import nn
from transformers import DeepseekV2Config

from ee_scale.artifact.export import _copy_base
from ee_scale.artifact.submodel import _check_experts
from ee_scale.artifact.trained_base import TrainedBase
from ee_scale.backbone.experts import own_units
from ee_scale.backbone.loading import read_config
from ee_scale.backbone.model_tensors import ModelTensors
from ee_scale.backbone.proof_checks import LENGTH, ROWS, Whole
from ee_scale.backbone.shard import model_tensors
from ee_scale.cli.check import print_stages
from ee_scale.config.tune import BackboneConfig, ExitsConfig, TuneConfig
from ee_scale.errors import UserError
from ee_scale.families.registry import decoder_family, elastic_family
from ee_scale.families.sizes import shape_of, with_layers
from ee_scale.families.small import small_config
from ee_scale.inference.model import untrained_exits
from ee_scale.modeling.layer_runner import LayerRunner
from ee_scale.planning.tune import plan_tune

UP = "model.layers.2.mlp.experts.{}.up_proj.weight"
GATE_UP, DOWN = "model.layers.2.mlp.experts.gate_up_proj", "model.layers.2.mlp.experts.down_proj"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each family as the hub has it, a tensor for each expert."""
    root = tmp_path_factory.mktemp("experts")
    return {family: write_model(root / family, family) for family in MIXTURES}


def opened(folder: Path) -> ModelTensors:
    return model_tensors(folder, read_config(folder))


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", MIXTURES)
@pytest.mark.parametrize("form", ["one by one", "packed"])
def test_every_part_is_that_of_the_parameter(folders: dict[str, Path], tmp_path: Path, family: str, form: str) -> None:
    folder = folders[family] if form == "one by one" else rewritten(folders[family], tmp_path / "packed", packed)
    tensors, model = opened(folder), load_whole(folders[family])
    parameters = dict(model.named_parameters())
    assert {GATE_UP, DOWN} <= parameters.keys()
    for name in (GATE_UP, DOWN):
        whole = parameters[name]
        assert tensors.shape(name) == tuple(whole.shape)
        assert torch.equal(tensors.read(name), whole)
        for dim, size in enumerate(whole.shape):
            for start, stop in ((0, size), (1, size), (size // 3, size - 1), (size // 2, size // 2 + 1)):
                assert torch.equal(tensors.read(name, dim, start, stop), whole.narrow(dim, start, stop - start))


def test_ranks_have_all_units_of_all_experts_between_them() -> None:
    gate, up, down = torch.randn(3, 8, 5), torch.randn(3, 8, 5), torch.randn(3, 5, 8)
    for rank in range(4):
        mine = slice(2 * rank, 2 * rank + 2)
        own = own_units("gate_up_proj", torch.cat([gate, up], 1), rank, 4)
        assert torch.equal(own, torch.cat([gate[:, mine], up[:, mine]], 1))
        assert torch.equal(own_units("down_proj", down, rank, 4), down[..., mine])


def both(tensors: Tensors) -> Tensors:
    return tensors | packed(tensors)


def one_more(tensors: Tensors) -> Tensors:
    return tensors | {UP.format(5): tensors[UP.format(4)]}


def one_longer(tensors: Tensors) -> Tensors:
    return tensors | {UP.format(3): torch.zeros(33, 64)}


def encoded(tensors: Tensors) -> Tensors:
    return tensors | {UP.format(3): tensors[UP.format(3)].to(torch.float8_e4m3fn)}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (without(UP.format(3)), f"no tensor '{UP.format(3)}' in its safetensors: expert 3 of '{GATE_UP}' is missing"),
        (without(*(UP.format(i) for i in range(5))), "no tensor 'mlp.experts.0.up_proj.weight' in its safetensors"),
        (one_more, f"'{UP.format(5)}' is of expert 5 (from 0), and the config has 5 experts"),
        (one_longer, f"'{UP.format(3)}' has shape [33, 64], but the config asks for [32, 64]"),
        (encoded, f"'{UP.format(3)}' is stored as F8_E4M3"),
        (both, "are both 'model.layers.0.mlp.experts."),
        (without("model.layers.2.mlp.gate.weight"), "no tensor 'model.layers.2.mlp.gate.weight' in its safetensors"),
    ],
)
def test_experts_are_counted(folders: dict[str, Path], tmp_path: Path, change: Any, told: str) -> None:
    folder = rewritten(folders["qwen3_moe"], tmp_path / "changed", change)
    with pytest.raises(UserError) as caught:
        opened(folder)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_export_leaves_exits_behind_and_no_expert(folders: dict[str, Path], tmp_path: Path) -> None:
    """Where base and exits lie in one file, it is written anew."""
    source = load_file(folders["mixtral"] / "model.safetensors")
    folder = rewritten(
        folders["mixtral"], tmp_path / "base", lambda tensors: tensors | {"exit_heads.1.x": torch.ones(1)}
    )
    (tmp_path / "out").mkdir()
    names = _copy_base(TrainedBase(folder, folder, []), tmp_path / "out", lambda nbytes: None)
    assert names.keys() == source.keys()
    written = load_file(
        tmp_path / "out" / names[UP.format(0).replace("mlp", "block_sparse_moe").replace("up_proj", "w3")]
    )
    assert all(torch.equal(written[name], tensor) for name, tensor in source.items())


# -- the MLP of an exit ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", MIXTURES)
def test_a_copied_mlp_is_the_shared_expert_or_the_first_ones(folders: dict[str, Path], family: str) -> None:
    """Bit for bit, by what files hold and by what a model holds."""
    folder = folders[family]
    config, model, tensors = read_config(folder), load_whole(folder), opened(folder)
    heads = untrained_exits(folder, spec_of(config, (1, 2, 3), "mlp", "full")).exit_heads
    for k in (1, 2, 3):
        wanted = dense_mlp(model.model.layers[k - 1].mlp, config)
        found = heads[str(k)].mlp.state_dict()
        assert found.keys() == wanted.state_dict().keys()
        for name, value in wanted.state_dict().items():
            read = tensors.read(f"model.layers.{k - 1}.mlp.{name}")
            assert torch.equal(found[name], value), (k, name)
            assert torch.equal(read, value), (k, name)
            assert torch.equal(tensors.read(f"model.layers.{k - 1}.mlp.{name}", 1, 5, 9), value[:, 5:9])
    units = shape_of(config).experts.dense_units
    assert units == (48 if family == "qwen2_moe" else 2 * 32)
    assert heads["3"].mlp.up_proj.weight.shape == (units, 64)


@pytest.mark.parametrize("family", MIXTURES)
def test_a_copied_mlp_is_what_the_layer_computes_with_that_choice(folders: dict[str, Path], family: str) -> None:
    """The first experts with equal weights, or the shared one with its gate open and no other."""
    folder, x = folders[family], torch.randn(2, 7, 64, generator=torch.Generator().manual_seed(4))
    config, block = read_config(folder), load_whole(folder).model.layers[2].mlp
    k = config.num_experts_per_tok
    weight = 0.0 if family == "qwen2_moe" else 1 / k

    def choose(states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        rows = states.reshape(-1, 64).shape[0]
        return torch.zeros(rows, 5), torch.full((rows, k), weight), torch.arange(k).repeat(rows, 1)

    block.gate.forward = choose
    if family == "qwen2_moe":
        block.shared_expert_gate.forward = lambda states: torch.full((*states.shape[:-1], 1), float("inf"))
    exit_mlp = untrained_exits(folder, spec_of(config, (3,), "mlp", "full")).exit_heads["3"].mlp
    with torch.no_grad():
        torch.testing.assert_close(exit_mlp(x), block(x), rtol=1e-5, atol=1e-5)


# -- decoding ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", MIXTURES)
def test_rows_together_choose_the_experts_that_each_chooses_alone(family: str) -> None:
    with torch.no_grad():
        whole = Whole(small_config(tiny_config(family)))
        model, depth = whole.with_exits, len(whole.layers)
        chosen: list[torch.Tensor] = []
        for layer in model.base_model.layers:
            if hasattr(layer.mlp, "experts"):
                layer.mlp.gate.register_forward_hook(lambda module, args, output: chosen.append(output[2].sort(-1)[0]))

        def choices(rows: int) -> torch.Tensor:
            """[rows, positions, layers, k], since the last call."""
            found = torch.stack(chosen, 1).unflatten(0, (rows, -1))
            chosen.clear()
            return found

        alone = []
        for row in whole.ids:
            model(row[None], use_cache=False, output_exit_logits=False)
            alone.append(choices(1))
        wanted = torch.cat(alone)
        assert len(wanted.flatten(0, 1).unique(dim=0)) > 10  # they do choose
        runner, rows = LayerRunner(model, (1,), ROWS, LENGTH), torch.arange(ROWS)[:, None]
        for starts, length in (([0, 0], 12), ([12, 9], 3), ([15, 12], 1), ([16, 13], LENGTH - 16)):
            block = runner.block(starts, length)
            columns = torch.tensor(starts)[:, None] + torch.arange(length)
            runner.run(runner.run(runner.embed(whole.ids[rows, columns]), block, 0, 1), block, 1, depth)
            assert torch.equal(choices(ROWS), wanted[rows, columns])
        runner.close()


# -- counting and refusing ---------------------------------------------------------------------------------------------


def plan(family: str = "qwen2_moe", mode: str = "frozen", kind: str = "mlp", **changes: Any) -> Any:
    config = TuneConfig(backbone=BackboneConfig(mode=mode), exits=ExitsConfig(layers=[1, 2, 3], kind=kind))
    config.data.seq_length = 32
    return plan_tune(config, Path(), tiny_config(family, **changes))


@pytest.mark.parametrize("family", MIXTURES)
def test_what_is_held_and_what_a_token_meets(folders: dict[str, Path], family: str) -> None:
    model, shape = load_whole(folders[family]), shape_of(tiny_config(family))
    k = model.config.num_experts_per_tok
    for i, layer in enumerate(model.model.layers):
        held = sum(p.numel() for p in layer.parameters() if p.ndim > 1)
        assert shape.held(i) == held
        idle = sum(p[k:].numel() for name, p in layer.named_parameters() if ".experts." in name)
        assert (shape.idle(i), shape.active(i)) == (idle, held - idle)
    made = plan(family)
    parameters = made.parameters(0)
    assert parameters.idle == sum(map(shape.idle, range(3))) > 0
    assert parameters.active == parameters.held - parameters.idle
    attention = 4 * 32 * shape.num_heads * shape.head_dim
    assert made.work()[0].forward == sum(2 * shape.active(i) + attention for i in range(3))
    trained = sum(nn.Module.get_parameter(head, name).numel() for head, name in _trained(folders[family]))
    assert parameters.trained == trained


def test_check_tells_both(capsys: pytest.CaptureFixture) -> None:
    terminal = Console(width=200)
    print_stages(terminal, plan())
    found = plan().parameters(0)
    printed = capsys.readouterr().out
    assert "active" in printed
    assert f"{found.active / 1e3:.2f}k" in printed
    assert f"{found.held / 1e3:.2f}k" in printed
    print_stages(terminal, plan("llama"))
    assert "active" not in capsys.readouterr().out


def _trained(folder: Path) -> list[tuple[nn.Module, str]]:
    """Parameters of the exits that `plan` asks for."""
    spec = spec_of(read_config(folder), (1, 2, 3), "mlp", "low_rank", rank=64)
    heads = untrained_exits(folder, spec).exit_heads
    return [(heads, name) for name, _ in heads.named_parameters()]


@pytest.mark.parametrize("setting", ["backbone.mode=full", "backbone.mode=low_rank", "exits.kind=layer"])
def test_routers_are_not_trained(setting: str) -> None:
    name, value = setting.rpartition(".")[2].split("=")
    with pytest.raises(
        UserError, match=f"^{setting}: 'qwen2_moe' chooses among 5 experts, and the losses that keep its"
    ):
        plan(**{name: value})


def test_a_dense_mlp_in_the_place_of_experts_has_no_stock_model(folders: dict[str, Path]) -> None:
    folder = folders["qwen2_moe"]
    config = read_config(folder)
    with pytest.raises(
        UserError, match=r"^exit=1: its mlp is dense, and a stock 'qwen2_moe' has experts in its place; "
    ):
        _check_experts(folder, spec_of(config, (1, 2), "mlp", "full"), 1)
    _check_experts(folder, spec_of(config, (1, 2), "mlp", "full"), 2)  # a layer without
    _check_experts(folder, spec_of(config, (1, 2), "norm", "full"), 1)


def test_no_supernet() -> None:
    with pytest.raises(UserError, match="'mixtral' is not elastic; known: llama"):
        elastic_family(tiny_config("mixtral"))


def test_layers_that_are_kept_keep_their_experts() -> None:
    config = tiny_config("qwen2_moe", mlp_only_layers=[1, 4], decoder_sparse_step=2)
    assert shape_of(config).experts.layers == (False, False, False, True, False)
    kept = with_layers(config, [3, 1, 3])
    assert shape_of(kept).experts.layers == (True, False, True)
    assert shape_of(with_layers(config, [0, 1])).experts is None
    assert plan(mlp_only_layers=[0, 1]).parameters(0).idle == shape_of(config).idle(3)


def test_more_chosen_than_there_are(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = rewritten(folders["mixtral"], tmp_path / "many", num_experts_per_tok=6)
    with pytest.raises(UserError, match=r"num_experts_per_tok=6 is above the number of experts, 5$"):
        read_config(folder)


def test_keys_and_values_in_one_vector_are_refused() -> None:
    with pytest.raises(UserError, match=r"'deepseek_v2' is not .*: its .* one latent vector \(kv_lora_rank=512\)$"):
        decoder_family(DeepseekV2Config())
