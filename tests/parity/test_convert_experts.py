"""Models with experts: HF -> Megatron -> HF, bit for bit, at every grid; experts are counted; logits agree."""

import json
import re
import shutil
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers.convert import convert
from helpers.experts import expert_config, write_expert_model
from helpers.models import VOCAB, load_whole
from safetensors.torch import load_file, save_file

from ee_scale.backbone.loading import TensorFolder
from ee_scale.config.convert import ConvertConfig
from ee_scale.conversion.args import check_agrees, check_config, to_args, to_config
from ee_scale.conversion.check.verify import verify
from ee_scale.conversion.execute import run
from ee_scale.conversion.plan import make_conversion, open_result
from ee_scale.errors import UserError

FAMILIES = ("mixtral", "qwen3_moe", "olmoe")
GATE = {
    "mixtral": "model.layers.1.block_sparse_moe.experts.2.w1.weight",
    "qwen3_moe": "model.layers.1.mlp.experts.2.gate_proj.weight",
    "olmoe": "model.layers.1.mlp.experts.2.gate_proj.weight",
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """As transformers saves them: every expert by itself, by the names on the hub."""
    root = tmp_path_factory.mktemp("models")
    return {family: write_expert_model(root / family, family) for family in FAMILIES}


def same(folder: Path, other: Path) -> None:
    """Both hold the same tensors, bit for bit, under the same names."""
    found, expected = TensorFolder(folder), load_file(other / "model.safetensors")
    assert set(found.files) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(found.read(name), tensor), name


@pytest.mark.parametrize("family", FAMILIES)
def test_torch_dist_round_trip(models: dict[str, Path], tmp_path: Path, family: str):
    for tp, pp in product((1, 2), (1, 2)):
        there = convert(models[family], tmp_path / f"there-{tp}-{pp}", "megatron_core", tp=tp, pp=pp)
        same(convert(there, tmp_path / f"back-{tp}-{pp}", "hf"), models[family])


@pytest.mark.parametrize("family", FAMILIES)
def test_rank_files_round_trip(models: dict[str, Path], tmp_path: Path, family: str):
    for tp, pp, ep in product((1, 2), (1, 2), (1, 2, 4)):
        out, grid = tmp_path / f"{tp}-{pp}-{ep}", {"tp": tp, "pp": pp, "ep": ep}
        there = convert(models[family], out / "there", "megatron_legacy", **grid)
        assert len(list(there.glob("release/mp_rank_*"))) == tp * pp * ep
        same(convert(there, out / "back", "hf"), models[family])


@pytest.mark.parametrize("family", FAMILIES)
def test_where_experts_lie(models: dict[str, Path], tmp_path: Path, family: str):
    """Told by hand, since a round trip forgives what both directions do alike: which expert, gates above ups."""
    tensors = load_file(models[family] / "model.safetensors")
    block = GATE[family].partition(".experts.")[0]
    gate, up, down = ("w1", "w3", "w2") if family == "mixtral" else ("gate_proj", "up_proj", "down_proj")

    def matrix(expert: int, name: str) -> torch.Tensor:
        return tensors[f"{block}.experts.{expert}.{name}.weight"]

    ranks = convert(models[family], tmp_path / "ranks", "megatron_legacy", tp=2, ep=2) / "release"
    for rank, expert_rank in product((0, 1), (0, 1)):
        path = ranks / f"mp_rank_{rank:02d}_{expert_rank:03d}" / "model_optim_rng.pt"
        found = torch.load(path, weights_only=False)["model"]
        assert torch.equal(found["decoder.layers.1.mlp.router.weight"], tensors[f"{block}.gate.weight"])
        for place in range(4):
            number, key = 4 * expert_rank + place, f"decoder.layers.1.mlp.experts.local_experts.{place}.linear_fc"
            halves = [matrix(number, name).chunk(2)[rank] for name in (gate, up)]
            assert torch.equal(found[f"{key}1.weight"], torch.cat(halves))
            assert torch.equal(found[f"{key}2.weight"], matrix(number, down).chunk(2, 1)[rank])
    key, width = "decoder.layers.mlp.experts.experts.linear_fc", len(matrix(0, gate))
    state = {f"{key}1.weight": torch.empty(4, 8, 2 * width, 64), f"{key}2.weight": torch.empty(4, 8, 64, width)}
    dcp.load(state, checkpoint_id=convert(models[family], tmp_path / "core", "megatron_core", tp=2) / "release")
    for number in range(8):
        both = torch.cat([matrix(number, name) for name in (gate, up)])
        assert torch.equal(state[f"{key}1.weight"][1, number], both)
        assert torch.equal(state[f"{key}2.weight"][1, number], matrix(number, down))


@pytest.mark.parametrize("family", FAMILIES)
def test_stacks_of_experts(models: dict[str, Path], tmp_path: Path, family: str):
    """Names and stacks of transformers' own modules are read too; what is written has the hub's names."""
    stacked = tmp_path / "stacked"
    stacked.mkdir()
    (stacked / "config.json").write_bytes((models[family] / "config.json").read_bytes())
    tensors = {name: tensor.contiguous() for name, tensor in load_whole(models[family]).state_dict().items()}
    assert any(name.endswith("mlp.experts.gate_up_proj") for name in tensors)
    save_file(tensors, stacked / "model.safetensors", metadata={"format": "pt"})
    same(convert(stacked, tmp_path / "hf", "hf"), models[family])
    there = convert(stacked, tmp_path / "there", "megatron_legacy", tp=2, ep=2)
    same(convert(there, tmp_path / "back", "hf"), models[family])


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_are_counted(models: dict[str, Path], tmp_path: Path, family: str):
    """One that is missing, one too many: named."""
    tensors = load_file(models[family] / "model.safetensors")
    surplus = GATE[family].replace("experts.2.", "experts.8.")
    for number, (wrong, message) in enumerate(
        (
            ({name: tensor for name, tensor in tensors.items() if name != GATE[family]}, f"missing: {GATE[family]}"),
            (tensors | {surplus: tensors[GATE[family]].clone()}, f"not known: {surplus}"),
        )
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "config.json").write_bytes((models[family] / "config.json").read_bytes())
        save_file(wrong, folder / "model.safetensors", metadata={"format": "pt"})
        refused(folder, "megatron_core", f"1 tensor {message}")


@pytest.mark.parametrize("family", FAMILIES)
def test_more_experts_in_the_config_than_in_the_files(models: dict[str, Path], tmp_path: Path, family: str):
    folder = tmp_path / "model"
    shutil.copytree(models[family], folder)
    values = json.loads((folder / "config.json").read_text())
    field = "num_local_experts" if "num_local_experts" in values else "num_experts"
    first = GATE[family].replace("layers.1", "layers.0").partition("2.")[0] + "8."
    for count, message in (
        (9, f": 12 tensors missing: {first}"),
        (16000, f"{field}=16000 x "),
        (0, f"{field}=0: give a"),
    ):
        (folder / "config.json").write_text(json.dumps(values | {field: count}))
        refused(folder, "megatron_core", message)


def test_from_deepspeed(models: dict[str, Path], tmp_path: Path):
    """A live model has stacks of experts, and so has its save."""
    tag = tmp_path / "saved" / "global_step1"
    tag.mkdir(parents=True)
    (tag.parent / "latest").write_text(tag.name)
    content = {"module": load_whole(models["mixtral"]).state_dict(), "param_shapes": None, "ds_version": "0.19.8"}
    torch.save(content | {"dp_world_size": 1, "mp_world_size": 1}, tag / "mp_rank_00_model_states.pt")
    same(convert(tag.parent, tmp_path / "hf", "hf", model=models["mixtral"]), models["mixtral"])


def test_experts_are_counted_in_megatron(models: dict[str, Path], tmp_path: Path):
    """A rank without one of its experts; a rank that is not there; stacks of fewer than the config says."""
    there = convert(models["mixtral"], tmp_path / "there", "megatron_legacy", tp=2, ep=4)
    path = there / "release" / "mp_rank_01_002" / "model_optim_rng.pt"
    content = torch.load(path, weights_only=False)
    key = "decoder.layers.3.mlp.experts.local_experts.1.linear_fc2.weight"
    taken = content["model"].pop(key)
    torch.save(content, path)
    refused(there, "hf", f"mp_rank_01_002/model_optim_rng.pt: 1 tensor missing: {key}")
    content["model"] |= {key: taken, key.replace("experts.1", "experts.2"): taken}
    torch.save(content, path)
    refused(there, "hf", "1 tensor not known: decoder.layers.3.mlp.experts.local_experts.2.linear_fc2.weight")
    shutil.rmtree(path.parent)
    refused(there, "hf", "mp_rank_01_002 is missing of tp=2 x pp=1 x ep=4")
    core = convert(models["mixtral"], tmp_path / "core", "megatron_core", tp=2)
    fewer = write_expert_model(tmp_path / "fewer", "mixtral", num_local_experts=6)
    refused(core, "hf", "its config means num_experts=6, but the checkpoint's args say 8", model=fewer)
    shutil.rmtree(core / "huggingface")
    common = torch.load(core / "release" / "common.pt", weights_only=False)
    common["args"].num_experts = 6
    torch.save(common, core / "release" / "common.pt")
    refused(core, "hf", r"router.weight' has shape \[4, 8, 64\], but the config asks for \[4, 6, 64\]")


def test_two_numbers_in_a_folder_name(models: dict[str, Path], tmp_path: Path):
    """mp_rank_00_001 is the second stage or the second expert rank, as args say."""
    for grid in ({"pp": 2}, {"ep": 2}):
        there = convert(models["qwen3_moe"], tmp_path / str(grid) / "there", "megatron_legacy", **grid)
        assert (there / "release" / "mp_rank_00_001").is_dir()
        same(convert(there, tmp_path / str(grid) / "back", "hf"), models["qwen3_moe"])


def test_other_ways_to_keep_experts(models: dict[str, Path], tmp_path: Path):
    """TEGroupedMLP's numbered weights are read; GroupedMLP's one matrix for all is refused by name."""
    there = convert(models["olmoe"], tmp_path / "there", "megatron_legacy", ep=2)
    for path in there.glob("release/*/model_optim_rng.pt"):
        content = torch.load(path, weights_only=False)
        name = re.compile(r"local_experts\.(\d+)\.(linear_fc[12])\.weight")
        content["model"] = {name.sub(r"\2.weight\1", key): value for key, value in content["model"].items()}
        assert any(key.endswith("mlp.experts.linear_fc1.weight3") for key in content["model"])
        torch.save(content, path)
    same(convert(there, tmp_path / "back", "hf"), models["olmoe"])
    content["model"]["decoder.layers.0.mlp.experts.weight1"] = torch.zeros(64, 80)
    torch.save(content, path)
    refused(there, "hf", "'decoder.layers.0.mlp.experts.weight1' holds all experts of its rank in one matrix")


@pytest.mark.parametrize("family", FAMILIES)
def test_config_from_args(models: dict[str, Path], tmp_path: Path, family: str):
    """Without the config that came along, `args` say it all, but for norms over all heads."""
    there = convert(models[family], tmp_path / "there", "megatron_core", tp=2)
    shutil.rmtree(there / "huggingface")
    if family == "olmoe":
        refused(there, "hf", r"q_layernorm.weight' has shape \[4, 64\], but the config asks for \[4, 8\]")
        return
    back = convert(there, tmp_path / "back", "hf")
    same(back, models[family])
    ids = torch.randint(VOCAB, (1, 24), generator=torch.Generator().manual_seed(0))
    assert torch.equal(load_whole(back)(ids).logits, load_whole(models[family])(ids).logits)


@pytest.mark.parametrize("to", ["megatron_core", "megatron_legacy"])
@pytest.mark.parametrize("family", FAMILIES)
def test_verify_goes_through_the_router(models: dict[str, Path], tmp_path: Path, family: str, to: str):
    grid = {"tp": 2, "pp": 2} | ({"ep": 2} if to == "megatron_legacy" else {})
    config = ConvertConfig(src=models[family], out=tmp_path / "there", to=to, **grid)
    conversion = make_conversion(config)
    run(conversion, 2, lambda size: None)
    result = open_result(config, tmp_path / "there")
    assert verify(conversion.opened, result).same_tokens == 1
    result.args.moe_router_pre_softmax = not result.args.moe_router_pre_softmax
    with pytest.raises(UserError, match="verify: layer 1 departs first"):
        verify(conversion.opened, result)
    result.args.moe_router_pre_softmax = not result.args.moe_router_pre_softmax
    result.args.moe_router_topk -= 1
    with pytest.raises(UserError, match="verify: layer 1 departs first"):
        verify(conversion.opened, result)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("qwen3_moe", {"mlp_only_layers": [1]}, r"mlp_only_layers=\[1\]: layers without experts"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "config.decoder_sparse_step=2"),
        ("qwen3_moe", {"num_experts_per_tok": 1}, "config.num_experts_per_tok=1 with weights that sum to 1"),
        ("mixtral", {"num_experts_per_tok": 9}, "config.num_experts_per_tok=9: give a number from 1 to num_experts=8"),
        ("olmoe", {"clip_qkv": 8.0}, "config.clip_qkv=8.0: Megatron's layers do not clip"),
    ],
)
def test_refused(tmp_path: Path, family: str, changes: dict[str, Any], message: str):
    config = expert_config(family, **changes)
    with pytest.raises(UserError, match=message):
        check_config(config)


def test_refused_grids(models: dict[str, Path], tmp_path: Path):
    refused(models["mixtral"], "megatron_legacy", "ep=3: does not divide num_experts=8", ep=3)
    refused(models["mixtral"], "megatron_core", "ep=2: to=megatron_core is not written by expert rank", ep=2)
    refused(models["qwen3_moe"], "megatron_legacy", "tp=8: does not divide moe_intermediate_size=20", tp=8)
    refused(models["olmoe"], "megatron_legacy", "classes=legacy: olmoe has pre_mlp_layernorm", classes="legacy")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("moe_router_score_function", "sigmoid"),
        ("moe_layer_freq", [1, 0, 1, 1]),
        ("moe_shared_expert_intermediate_size", 32),
        ("moe_router_topk_scaling_factor", 2.5),
        ("moe_router_pre_softmax", True),
    ],
)
def test_routers_that_no_family_has(name: str, value: Any):
    args = to_args(expert_config("mixtral"), torch.float32, 1, 1, padded_vocab=256, divisor=128)
    assert to_config(args, None).num_local_experts == 8
    setattr(args, name, value)
    with pytest.raises(UserError, match=f"args.{name}="):
        to_config(args, None)
    with pytest.raises(UserError, match=f"its config means {name}="):
        check_agrees(args, expert_config("mixtral"), Path("here"))


def refused(src: Path, to: str, message: str, **changes: Any) -> None:
    with pytest.raises(UserError, match=message):
        make_conversion(ConvertConfig(src=src, out=src.with_name("never"), to=to, **changes))
