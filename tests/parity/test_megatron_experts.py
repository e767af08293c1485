"""Megatron-Core's GPTModel with experts takes what we write, computes what transformers does, and is read again."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers.convert import convert
from helpers.experts import write_expert_model
from helpers.megatron import VARIANTS, index_on_disk
from helpers.megatron_experts import Job, Place, Seen, take
from helpers.models import VOCAB, load_whole
from helpers.spawn import spawn
from safetensors.torch import load_file

from ee_scale.backbone.loading import TensorFolder

DIVISOR, LAYERS, RELATIVE = 28, 2, 1e-5
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", {}),
    "qwen3_moe": ("qwen3_moe", {"tie_word_embeddings": True}),
    "qwen3_moe-not-normalised": ("qwen3_moe", {"norm_topk_prob": False}),
}
GRIDS: tuple[Place, ...] = ((1, 1, 1), (1, 1, 4), (2, 1, 2), (1, 2, 2), (2, 2, 1))  # tensor ranks, stages, expert ranks
AGAIN = ("mixtral",)  # saved by Megatron in every layout
PLACES = [(name, grid) for grid in GRIDS for name in CASES]
MARKS = {  # a key that only this layout has
    "stacked": "decoder.layers.mlp.experts.experts.linear_fc1.weight",
    "by_layer": "decoder.layers.1.mlp.experts.experts.linear_fc1.weight",
    "halves": "decoder.layers.1.mlp.experts.experts.7.linear_fc1.weight_w",
}


@dataclass
class Taken:
    """Model folders by name, jobs by (name, grid), and what each rank saw."""

    models: dict[str, Path]
    jobs: dict[tuple[str, Place], Job]
    by_rank: list[dict[tuple[str, Place], Seen]]

    def seen(self, key: tuple[str, Place]) -> list[Seen]:
        """Of every rank of a grid."""
        found = [results[key] for results in self.by_rank if key in results]
        tp, pp, ep = key[1]
        assert len({seen.place for seen in found}) == len(found) == tp * pp * ep
        return found


@pytest.fixture(scope="module")
def taken(tmp_path_factory: pytest.TempPathFactory) -> Taken:
    """Every case at every grid, and `torch_dist` of another grid, by Megatron's ranks."""
    root = tmp_path_factory.mktemp("experts")
    models = {
        name: write_expert_model(root / name, family, num_hidden_layers=LAYERS, **more)
        for name, (family, more) in CASES.items()
    }
    jobs: dict[tuple[str, Place], Job] = {}
    for name, (tp, pp, ep) in PLACES:
        out, grid = root / f"{name}-{tp}-{pp}-{ep}", {"tp": tp, "pp": pp, "vocab_divisor": DIVISOR}
        settings = {"classes": "core", "spec": "local", "ep": ep}
        ranks = convert(models[name], out / "ranks", "megatron_legacy", **settings, **grid) / "release"
        other = {"tp": 3 - tp, "pp": 3 - pp, "vocab_divisor": DIVISOR}
        sharded = convert(models[name], out / "sharded", "megatron_core", **other) / "release"
        jobs[name, (tp, pp, ep)] = Job(name, (tp, pp, ep), ranks, sharded, out / "again" if name in AGAIN else None)
    return Taken(models, jobs, spawn(take, 4, list(jobs.values()), tokens()))


def tokens() -> torch.Tensor:
    return torch.randint(VOCAB, (2, 40), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("key", PLACES, ids=str)
def test_rank_files(taken: Taken, key: tuple[str, Place]):
    """Keys, empty entries and shapes of GPTModel's own state dict, and transformers' logits through the router."""
    logits = []
    for seen in taken.seen(key):
        assert seen.found == seen.asked
        logits += [seen.logits] if seen.logits is not None else []
    assert len(logits) == key[1][0] * key[1][2]
    expected = load_whole(taken.models[key[0]])(tokens()).logits
    for found in logits:
        assert (found[..., :VOCAB] - expected).abs().max() <= RELATIVE * expected.abs().max()


@pytest.mark.parametrize("key", PLACES, ids=str)
def test_torch_dist_of_another_grid(taken: Taken, key: tuple[str, Place]):
    """Loaded by Megatron-Core, strict as by default: every rank has what its rank file has."""
    assert [seen.same for seen in taken.seen(key)] == [None] * len(taken.seen(key))


@pytest.mark.parametrize("key", PLACES, ids=str)
def test_index(taken: Taken, tmp_path: Path, key: tuple[str, Place]):
    """Keys, whole shapes, offsets, shapes and types are those of GPTModel.sharded_state_dict()."""
    asked: dict[str, tuple] = {}
    for seen in taken.seen(key):
        assert not asked.keys() & seen.index.keys()  # each part is written once
        asked |= seen.index
    grid = {"tp": key[1][0], "pp": key[1][1], "vocab_divisor": DIVISOR}
    assert index_on_disk(convert(taken.models[key[0]], tmp_path / "out", "megatron_core", **grid) / "release") == asked


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("key", [(name, grid) for grid in GRIDS for name in AGAIN], ids=str)
def test_saved_by_megatron(taken: Taken, tmp_path: Path, key: tuple[str, Place], variant: str):
    """In each of its layouts, experts stacked or each by itself: read without the config that came along."""
    folder = taken.jobs[key].again / variant
    assert MARKS[variant] in dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    found = TensorFolder(convert(folder, tmp_path / "hf", "hf"))
    expected = load_file(taken.models[key[0]] / "model.safetensors")
    assert set(found.files) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(found.read(name), tensor), name
