"""However a folder stores its weights, every grid computes what transformers computes from it."""

import re
from pathlib import Path

import pytest
import torch
from helpers import joint
from helpers.folders import EMBEDDING, HEAD, Tensors, bare, packed, rewritten, without
from helpers.joint import JointJob, build_joint_engine, file_names
from helpers.models import VOCAB, load_whole, write_model
from helpers.reference import Job, train
from helpers.spawn import spawn
from helpers.tuning import build_engine, pipeline_logits, train_on_grid
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification

from ee_scale.backbone.loading import read_config
from ee_scale.backbone.model_folder import ModelFolder
from ee_scale.backbone.shard import model_tensors
from ee_scale.elastic.architecture import ElasticMap
from ee_scale.elastic.order import UnitOrder
from ee_scale.elastic.stage import base_tensors, read_tensor
from ee_scale.exits.stage import gather_whole
from ee_scale.families.registry import FAMILIES
from ee_scale.grid import Layout, join_grid, leave_grid
from ee_scale.palettes.cut_out import TrainedSupernet, subnet_model, write_subnet

TOLERANCE = 1e-5
GRIDS = [(1, 1), (2, 1), (1, 2), (2, 2)]


def same_twice(tensors: Tensors) -> Tensors:
    return tensors | {HEAD: tensors[EMBEDDING]}


def head_only(tensors: Tensors) -> Tensors:
    return without(EMBEDDING)(tensors)


def older(tensors: Tensors) -> Tensors:
    """A buffer that old versions saved with every layer."""
    return tensors | {"model.layers.1.self_attn.rotary_emb.inv_freq": torch.ones(8)}


def moved(tensors: Tensors) -> Tensors:
    """The prefix where transformers has none."""
    return {f"model.{name}" if name == HEAD else name: tensor for name, tensor in tensors.items()}


def other_types(tensors: Tensors) -> Tensors:
    """Both matrices, the same values in two number types."""
    return {name: t.bfloat16().float() for name, t in tensors.items()} | {HEAD: tensors[EMBEDDING].bfloat16()}


# name -> (family, what is done to an untied model, tie_word_embeddings, whether one matrix is read for both)
CASES = {
    "two, said to be one": ("llama", dict, True, False),
    "two, said to be one, bare": ("qwen2", bare, True, False),
    "two, capped": ("gemma2", dict, True, False),
    "the same twice": ("llama", same_twice, True, True),
    "the same in two types": ("llama", other_types, True, True),
    "the head alone": ("llama", head_only, True, True),
    "the head alone, bare": ("qwen3", lambda tensors: bare(head_only(tensors)), True, True),
    "the embedding alone, bare": ("gemma2", lambda tensors: bare(without(HEAD)(tensors)), True, True),
    "bare": ("mistral", bare, False, False),
    "a prefix too many": ("llama", moved, False, False),
    "old buffers": ("olmo2", older, False, False),
    "experts one by one, bare": ("qwen2_moe", bare, False, False),
    "experts packed": ("mixtral", packed, False, False),
    "experts packed beside a shared one": ("qwen2_moe", packed, False, False),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders by case, each with `reference.pt`: ids and transformers' logits."""
    root, found = tmp_path_factory.mktemp("stored"), {}
    for number, (name, (family, change, tied, _)) in enumerate(CASES.items()):
        source = write_model(root / f"source{number}", family)
        folder = found[name] = rewritten(source, root / str(number), change, tie_word_embeddings=tied)
        ids = torch.randint(VOCAB, (2, 24), generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            torch.save((ids, load_whole(folder)(ids).logits), folder / "reference.pt")
    return found


@pytest.fixture(scope="module")
def differences(folders: dict[str, Path]) -> dict[tuple, float]:
    found: dict[tuple, float] = {}
    for world in (1, 2, 4):
        grids = [grid for grid in GRIDS if grid[0] * grid[1] == world]
        for result in spawn(run_cases, world, folders, grids):
            found |= result
    return found


def run_cases(rank: int, folders: dict[str, Path], grids: list[tuple[int, int]]) -> dict[tuple, float]:
    found = {}
    for tp, pp in grids:
        grid = join_grid(Layout(tp, pp, 1), torch.device("cpu"))
        for name, folder in folders.items():
            ids, expected = torch.load(folder / "reference.pt")
            with torch.no_grad():
                logits = pipeline_logits(folder, grid, ids)
            if logits is not None:
                found[name, tp, pp] = (logits - expected).abs().max().item()
        leave_grid()
    return found


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_transformers(name: str, differences: dict[tuple, float]) -> None:
    found = {key[1:]: value for key, value in differences.items() if key[0] == name}
    assert len(found) == len(GRIDS)
    assert max(found.values()) <= TOLERANCE, found


@pytest.mark.parametrize("name", CASES)
def test_the_config_says_what_transformers_makes_of_the_folder(name: str, folders: dict[str, Path]) -> None:
    model, config = load_whole(folders[name]), ModelFolder(folders[name]).decoder_config
    one = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert config.tie_word_embeddings is one is CASES[name][3]
    tensors = model_tensors(folders[name], config)
    for parameter, value in model.state_dict().items():
        assert torch.equal(tensors.read(parameter).float(), value), parameter


JOB = Job("llama", "mlp", "low_rank", kl_weight=0.5, clip_grad=0.5, steps=2)


def train_it(rank: int, folder: Path, layout: Layout) -> list[dict[int, list[float]]]:
    grid = join_grid(layout, torch.device("cpu"))
    return train_on_grid(build_engine(folder, JOB, grid), JOB, grid).losses


@pytest.mark.parametrize("name", ["two, said to be one", "the head alone"])
@pytest.mark.parametrize("layout", [Layout(1, 1, 1), Layout(1, 2, 1)], ids=["pp1", "pp2"])
def test_losses_of_exits_equal_plain_autograd(name: str, layout: Layout, folders: dict[str, Path]) -> None:
    expected = train(folders[name], JOB).losses
    by_rank = spawn(train_it, layout.world_size, folders[name], layout)
    for step, wanted in enumerate(expected):
        found = {k: value for losses in by_rank for k, value in losses[step].items()}
        assert found.keys() == wanted.keys()
        for k, value in wanted.items():
            assert found[k] == pytest.approx(value, rel=1e-4), (step, k)


JOINT = JointJob("llama", "norm", "tied", "full", steps=2)


def train_jointly(rank: int, folder: Path, layout: Layout) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """(losses of this rank's exits by step, start values)."""
    grid = join_grid(layout, torch.device("cpu"))
    engine = build_joint_engine(folder, JOINT, grid)
    named = file_names(engine.stage)
    start = {name: gather_whole(name, p, p.detach(), VOCAB, grid).clone() for name, p in named.items()}
    return joint.train_on_grid(engine, JOINT, grid).losses, start


@pytest.mark.parametrize("name", ["two, said to be one", "the head alone"])
def test_joint_losses_equal_plain_autograd(name: str, folders: dict[str, Path]) -> None:
    ((_, start),) = spawn(train_jointly, 1, folders[name], Layout(1, 1, 1))
    expected = joint.train_reference(folders[name], JOINT, start).losses
    for layout in (Layout(1, 1, 1), Layout(1, 2, 1)):
        by_rank = [losses for losses, _ in spawn(train_jointly, layout.world_size, folders[name], layout)]
        for step, wanted in enumerate(expected):
            found = {k: value for losses in by_rank for k, value in losses[step].items()}
            assert found == pytest.approx(wanted, rel=1e-4), (layout, step)


@pytest.mark.parametrize("name", [name for name in CASES if FAMILIES[CASES[name][0]].elastic])
def test_a_subnet_of_full_size_is_the_model(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    folder = folders[name]
    elastic_map = ElasticMap(read_config(folder), "causal_lm")
    identity = {"task": "causal_lm", "base_fingerprint": "f"}
    supernet, full = TrainedSupernet(identity, folder, 0, 1, {}), elastic_map.shape.full
    order = UnitOrder.identity(elastic_map.shape)
    model = subnet_model(elastic_map, base_tensors(folder, elastic_map), order, supernet, full)
    write_subnet(tmp_path / "full", model, supernet, full, "Facts.", "a teacher")
    ids, expected = torch.load(folder / "reference.pt")
    with torch.no_grad():
        assert (load_whole(tmp_path / "full")(ids).logits - expected).abs().max() <= TOLERANCE
    assert sum(p.numel() for p in model.parameters()) == elastic_map.parameters(full)


# -- encoders ----------------------------------------------------------------------------------------------------------


def old_norms(tensors: Tensors) -> Tensors:
    spelled = {"weight": "gamma", "bias": "beta"}
    return {
        re.sub(r"(?<=LayerNorm\.)(weight|bias)$", lambda leaf: spelled[leaf[0]], name): tensor
        for name, tensor in tensors.items()
    }


def other_heads(tensors: Tensors) -> Tensors:
    """Those that BERT was pre-trained with, and a buffer that was saved once."""
    heads = {"cls.predictions.bias": torch.ones(VOCAB), "cls.seq_relationship.weight": torch.ones(2, 64)}
    return tensors | heads | {"bert.embeddings.position_ids": torch.arange(64)[None]}


ENCODERS = {
    "with its classifier": lambda tensors: tensors,
    "without": without("classifier.weight", "classifier.bias"),
    "without pooler": without(
        "classifier.weight", "classifier.bias", "bert.pooler.dense.weight", "bert.pooler.dense.bias"
    ),
    "old": lambda tensors: old_norms(other_heads(tensors)),
    "bare": bare,
    "bare and old": lambda tensors: bare(old_norms(without("classifier.weight", "classifier.bias")(tensors))),
}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoder")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(vocab_size=VOCAB, max_position_embeddings=64, **sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_are_read_as_transformers_reads_them(name: str, encoder: Path, tmp_path: Path) -> None:
    folder = rewritten(encoder, tmp_path / "folder", ENCODERS[name])
    model, info = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    elastic_map = ElasticMap(read_config(folder), "classify")
    tensors = base_tensors(folder, elastic_map)
    read = {key: read_tensor(tensors, key, elastic_map.family) for key, _ in model.named_parameters()}
    assert {key for key, value in read.items() if value is None} == set(info["missing_keys"])
    for key, value in model.named_parameters():
        assert read[key] is None or torch.equal(read[key], value), key
