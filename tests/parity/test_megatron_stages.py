"""Stages with unlike numbers of layers, by Megatron-Core's own rules: what it saves we read, what we write it loads."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.convert import convert
from helpers.megatron import Loaded, RankFiles, Sharded, Taken, take_rank_files, take_sharded
from helpers.models import load_whole, write_model
from helpers.spawn import spawn
from safetensors.torch import load_file

from ee_scale.backbone.loading import TensorFolder
from ee_scale.cli.main import main
from ee_scale.conversion.formats.mp_rank_reader import _chunks
from ee_scale.conversion.unpickle import load_safely
from ee_scale.errors import UserError

LAYERS, VOCAB, DIVISOR = 6, 131, 64
MODELS = {"untied": {}, "tied": {"tie_word_embeddings": True}}


@dataclass(frozen=True)
class Split:
    """Settings of Megatron, and how many layers each chunk then has, in the order of the layers."""

    changes: dict[str, Any]
    counts: tuple[int, ...]
    pp: int = 2
    chunks: int = 1


SPLITS = {
    "first": Split({"decoder_first_pipeline_num_layers": 4}, (4, 2)),
    "last": Split({"decoder_last_pipeline_num_layers": 1}, (5, 1)),
    "both": Split({"decoder_first_pipeline_num_layers": 3, "decoder_last_pipeline_num_layers": 1}, (3, 1, 1, 1), 4),
    "account": Split(
        {"account_for_embedding_in_pipeline_split": True, "account_for_loss_in_pipeline_split": True}, (1, 2, 2, 1), 4
    ),
    "layout": Split({"pipeline_model_parallel_layout": "E|tt|t|tttL"}, (0, 2, 1, 3), 4),
    "loss alone": Split({"pipeline_model_parallel_layout": "Ettt|t|tt|L"}, (3, 1, 2, 0), 4),
    "first in chunks": Split({"decoder_first_pipeline_num_layers": 4}, (2, 1, 2, 1), chunks=2),
    "account in chunks": Split(
        {"account_for_embedding_in_pipeline_split": True, "account_for_loss_in_pipeline_split": True},
        (1, 2, 2, 1),
        chunks=2,
    ),
    "layout in chunks": Split({"pipeline_model_parallel_layout": "E|ttt|t|ttL"}, (0, 3, 1, 2), chunks=2),
}
WRITTEN = {  # ours -> what each stage of Megatron has then
    ("untied", 1, 2): {"first_stage_layers": 4},
    ("tied", 2, 2): {"last_stage_layers": 1},
    ("untied", 1, 4): {"first_stage_layers": 3, "last_stage_layers": 1},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root, small = tmp_path_factory.mktemp("models"), {"vocab_size": VOCAB, "num_hidden_layers": LAYERS}
    return {name: write_model(root / name, "qwen3", **small, **changes) for name, changes in MODELS.items()}


@pytest.fixture(scope="module")
def saved(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """<split>/<model>/ranks and /stacked, by Megatron."""
    root, jobs = tmp_path_factory.mktemp("saved"), []
    whole = {
        name: convert(path, root / "ours" / name, "megatron_core", vocab_divisor=DIVISOR)
        for name, path in models.items()
    }
    for split_name, split in sorted(SPLITS.items(), key=lambda item: (item[1].pp, item[1].chunks)):
        for name, folder in whole.items():
            place = root / split_name / name
            changes = split.changes | layout_of(split)
            again = {"stacked": place / "stacked"}
            ranks = place / "ranks" / "iter_0000010"
            jobs.append(
                Sharded(f"{split_name} {name}", (1, split.pp), folder / "release", split.chunks, again, ranks, changes)
            )
    spawn(take_sharded, 4, jobs)
    return root


def layout_of(split: Split) -> dict[str, Any]:
    """The layout as Megatron-LM puts it into args: an object."""
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

    text = split.changes.get("pipeline_model_parallel_layout")
    return {"pipeline_model_parallel_layout": PipelineParallelLayerLayout(text, split.pp)} if text else {}


def same_model(folder: Path, model: Path) -> None:
    found, expected = TensorFolder(folder), load_file(model / "model.safetensors")
    assert set(found.files) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(found.read(name), tensor), name


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("split", SPLITS)
def test_saved_by_megatron(models: dict[str, Path], saved: Path, tmp_path: Path, split: str, model: str):
    """Rank files, and `torch_dist`, which knows no stages; each layer in its place, from `args` alone."""
    for kind in ("ranks", "stacked"):
        same_model(convert(saved / split / model / kind, tmp_path / kind, "hf"), models[model])
    assert layers_in_files(saved / split / model / "ranks" / "iter_0000010") == SPLITS[split].counts


def layers_in_files(iteration: Path) -> tuple[int, ...]:
    """By chunk, and in each by stage."""
    stages = []
    for path in sorted(iteration.glob("*/model_optim_rng.pt")):
        chunks = _chunks(load_safely(path, path), path)
        stages.append([len({key.split(".")[2] for key in found if ".layers." in key}) for found in chunks])
    return tuple(count for chunk in zip(*stages, strict=True) for count in chunk)


@pytest.fixture(scope="module")
def written(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[tuple, dict[str, Path]]:
    root, found = tmp_path_factory.mktemp("written"), {}
    for (name, tp, pp), uneven in WRITTEN.items():
        grid = {"tp": tp, "pp": pp, "vocab_divisor": DIVISOR, **uneven}
        place = root / f"{name}-{tp}-{pp}"
        found[name, tp, pp] = {
            "ranks": convert(models[name], place / "ranks", "megatron_legacy", spec="local", **grid),
            "sharded": convert(models[name], place / "sharded", "megatron_core", **grid),
        }
    return found


def both(rank: int, files: list[RankFiles], folders: list[Sharded], ids: torch.Tensor) -> tuple[dict, dict]:
    return take_rank_files(rank, files, ids), take_sharded(rank, folders)


@pytest.fixture(scope="module")
def taken(written: dict[tuple, dict[str, Path]], tmp_path_factory: pytest.TempPathFactory) -> list[tuple[dict, dict]]:
    """Megatron's ranks with what we wrote; its models follow the `args` in it."""
    root = tmp_path_factory.mktemp("taken")
    files = [
        RankFiles(name, (tp, pp), made["ranks"] / "release", root / f"{name}-{tp}-{pp}" / "iter_0000010")
        for (name, tp, pp), made in written.items()
    ]
    folders = [Sharded(name, (tp, pp), made["sharded"] / "release") for (name, tp, pp), made in written.items()]
    return spawn(both, 4, files, folders, tokens())


def tokens() -> torch.Tensor:
    return torch.randint(VOCAB, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("key", WRITTEN, ids=str)
def test_loaded_by_megatron(models: dict[str, Path], written: Any, taken: Any, tmp_path: Path, key: tuple):
    """Strictly, from files by rank and from `torch_dist`; it computes what transformers does, and all comes back."""
    name, *grid = key
    ranks: list[Taken] = [files[name, tuple(grid)] for files, _ in taken if (name, tuple(grid)) in files]
    folders: list[Loaded] = [found[name, tuple(grid)] for _, found in taken if (name, tuple(grid)) in found]
    assert len(ranks) == len(folders) == grid[0] * grid[1]
    expected = load_whole(models[name])(tokens()).logits
    for rank in ranks:
        assert rank.error == ""
        assert rank.found == rank.asked
        if rank.logits is not None:
            assert (rank.logits[..., :VOCAB] - expected).abs().max() <= 1e-5 * expected.abs().max()
    for place in folders:
        same = next(rank for rank in ranks if rank.place == place.place)
        assert place.state.keys() == {f"model.{name}" for name in same.state}
        assert all(torch.equal(place.state[f"model.{name}"], tensor) for name, tensor in same.state.items())
    for kind, folder in written[key].items():
        same_model(convert(folder, tmp_path / kind, "hf"), models[name])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pp": 4}, "pp=4: does not divide num_hidden_layers=6; first_stage_layers and last_stage_layers make stages"),
        ({"first_stage_layers": 3}, "first_stage_layers=3: does not fit pp=1 stages of num_hidden_layers=6 layers"),
        ({"pp": 2, "last_stage_layers": 6}, "last_stage_layers=6: does not fit pp=2 stages"),
        ({"pp": 2, "last_stage_layers": 0}, "last_stage_layers=0: does not fit pp=2 stages"),
        ({"pp": 3, "first_stage_layers": 3}, "pp=3: does not divide num_hidden_layers=3 in the 2 stages that first_"),
        (
            {"pp": 2, "first_stage_layers": 3, "last_stage_layers": 2},
            "first_stage_layers=3, last_stage_layers=2: not the num_hidden_layers=6 layers of pp=2 stages",
        ),
        ({"to": "hf", "first_stage_layers": 3}, "first_stage_layers=3: to=hf has no pipeline stages"),
    ],
    ids=str,
)
def test_numbers_that_do_not_fit(models: dict[str, Path], tmp_path: Path, settings: dict, message: str):
    with pytest.raises(UserError, match=message):
        convert(models["tied"], tmp_path / "out", **{"to": "megatron_core", **settings})


def test_files_that_say_something_else(models: dict[str, Path], tmp_path: Path):
    """A layer too few for the config; another number than in `args`."""
    out = convert(models["untied"], tmp_path / "out", "megatron_legacy", pp=2, first_stage_layers=4)
    path = out / "release" / "mp_rank_00_000" / "model_optim_rng.pt"
    content = torch.load(path, weights_only=False)
    content["args"].decoder_first_pipeline_num_layers = 3
    torch.save(content, path)
    with pytest.raises(UserError, match="decoder_first_pipeline_num_layers=3, but the first stage holds 4"):
        convert(out, tmp_path / "hf", "hf")
    content["model"] = {key: value for key, value in content["model"].items() if ".layers.3." not in key}
    torch.save(content, path)
    with pytest.raises(
        UserError, match=r"its stages hold 3 \+ 2 = 5 layers, but the config asks for num_hidden_layers=6"
    ):
        convert(out, tmp_path / "hf", "hf")


def test_flags_are_printed_and_the_result_computes_the_same(models: dict[str, Path], tmp_path: Path, capsys: Any):
    """`--use-checkpoint-args` does not restore them; `verify` runs the stages as they were written."""
    for to in ("megatron_core", "megatron_legacy"):
        out = tmp_path / to
        arguments = ["convert", f"src={models['untied']}", f"to={to}", f"out={out}", "pp=2", "verify=true"]
        assert main([*arguments, "first_stage_layers=5"]) == 0
        said = capsys.readouterr()
        assert said.err.count("--decoder-first-pipeline-num-layers 5") == 1
        assert "--decoder-last" not in said.err
        assert "verified: " in said.out
        assert main(["convert", f"src={out}", "to=hf", f"out={tmp_path / 'back' / to}", "verify=true"]) == 0
        same_model(tmp_path / "back" / to, models["untied"])
        capsys.readouterr()
