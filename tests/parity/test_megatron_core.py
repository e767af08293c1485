"""Our layouts are Megatron-Core's own: its GPTModel takes what we write, and we take what it writes."""

import dataclasses
import re
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers.convert import convert
from helpers.megatron import VARIANTS, Grid, RankFiles, Sharded, index_on_disk, take_rank_files, take_sharded
from helpers.models import load_whole, tiny_config, write_model
from helpers.spawn import spawn
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer import TransformerConfig
from safetensors.torch import load_file
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from ee_scale.backbone.loading import TensorFolder
from ee_scale.conversion.args import to_args, to_config
from ee_scale.errors import UserError

VOCAB, LAYERS, LENGTH = 250, 4, 40
DIVISOR = 28  # pads 250 words to 252 for one tensor rank, to 280 for two
RELATIVE = 1e-5
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 8192}
THETA = {"rope_type": "default", "rope_theta": 1e6}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"rope_parameters": THETA}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-llama3": ("llama", {"rope_parameters": {**LLAMA3, "factor": 32.0}}),
    "llama-linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "mistral": ("mistral", {}),
    "mistral-unlimited-tied": ("mistral", {"sliding_window": None, "tie_word_embeddings": True}),
    "qwen2": ("qwen2", {"rope_parameters": THETA}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True, "num_key_value_heads": 8}),
    "qwen3": ("qwen3", {"rope_parameters": THETA}),
    "qwen3-tied": ("qwen3", {"tie_word_embeddings": True}),
}
GRIDS = ((1, 1), (2, 1), (1, 2), (2, 2))
BEYOND = ("llama-two-groups", (4, 1))  # more tensor ranks than key heads: slices go through the middle of groups
VIRTUAL = ("qwen2-tied in chunks", (1, 2))
MARKS = {  # a key that only this layout has
    "stacked": "decoder.layers.mlp.linear_fc1.weight",
    "by_layer": "decoder.layers.3.mlp.linear_fc1.weight",
    "halves": "decoder.layers.3.mlp.linear_fc1.weight_w",
}
AGAIN = ("llama", "qwen2-tied", "qwen3")  # saved by Megatron in every layout
# At every grid; the other cases where nothing is cut and where everything is.
PLACES = [(name, grid) for grid in GRIDS for name in CASES if name in AGAIN or grid in (GRIDS[0], GRIDS[-1])]


@dataclass
class Written:
    """Model folders by name, and what was made of them by (name, grid)."""

    models: dict[str, Path]
    rank_files: dict[tuple[str, Grid], Path]
    sharded: dict[tuple[str, Grid], Path]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """Every case at every grid, by our converter."""
    root = tmp_path_factory.mktemp("written")
    small = {"vocab_size": VOCAB, "num_hidden_layers": LAYERS}
    models = {name: write_model(root / name, family, **small, **more) for name, (family, more) in CASES.items()}
    models[BEYOND[0]] = write_model(root / BEYOND[0], "llama", num_key_value_heads=2, **small)
    made = Written(models, {}, {})
    for name, (tp, pp) in [*PLACES, BEYOND]:
        grid = {"tp": tp, "pp": pp, "vocab_divisor": DIVISOR}
        out, changes = root / f"{name}-{tp}-{pp}", {"classes": "core", "spec": "local"}
        made.rank_files[name, (tp, pp)] = convert(models[name], out / "ranks", "megatron_legacy", **changes, **grid)
        made.sharded[name, (tp, pp)] = convert(models[name], out / "sharded", "megatron_core", **grid)
    return made


@pytest.fixture(scope="module")
def taken(written: Written, tmp_path_factory: pytest.TempPathFactory) -> "Results":
    """Megatron's ranks with our rank files; (name, grid) -> what each rank has."""
    root = tmp_path_factory.mktemp("taken")
    jobs = [
        RankFiles(*key, out / "release", again(root, key) / "iter_0000010") for key, out in in_order(written.rank_files)
    ]
    return Results(root, spawn(take_rank_files, 4, jobs, tokens()))


@pytest.fixture(scope="module")
def loaded(written: Written, tmp_path_factory: pytest.TempPathFactory) -> "Results":
    """Megatron's ranks that load, each grid, what we wrote for another grid."""
    root = tmp_path_factory.mktemp("loaded")
    jobs = []
    for key, _ in in_order(written.sharded):
        name, grid = key
        grids = [place[1] for place in PLACES if place[0] == name] or [grid]
        other = grids[(grids.index(grid) + 1) % len(grids)]
        saved = {variant: again(root, key) / variant for variant in VARIANTS} if name in AGAIN else {}
        jobs.append(Sharded(name, grid, written.sharded[name, other] / "release", again=saved))
    name, grid = VIRTUAL
    jobs.append(
        Sharded(
            name,
            grid,
            written.sharded["qwen2-tied", (2, 1)] / "release",
            chunks=2,
            again={"stacked": again(root, VIRTUAL) / "stacked"},
            by_rank=again(root, VIRTUAL) / "ranks" / "iter_0000010",
        )
    )
    return Results(root, spawn(take_sharded, 4, jobs))


def in_order(made: dict[tuple[str, Grid], Path]) -> Iterator[tuple[tuple[str, Grid], Path]]:
    """Grid by grid."""
    return iter(sorted(made.items(), key=lambda item: item[0][1]))


def again(root: Path, key: tuple[str, Grid]) -> Path:
    name, (tp, pp) = key
    return root / f"{name}-{tp}-{pp}"


class Results:
    """What the ranks returned, and the folder they saved to."""

    def __init__(self, root: Path, by_rank: list[dict[tuple[str, Grid], Any]]):
        self.root, self.by_rank = root, by_rank

    def __getitem__(self, key: tuple[str, Grid]) -> dict[Grid, Any]:
        """By tensor rank and stage."""
        found = {results[key].place: results[key] for results in self.by_rank if key in results}
        assert len(found) == key[1][0] * key[1][1]
        return found


def tokens() -> torch.Tensor:
    return torch.randint(VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(0))


def same_model(folder: Path, model: Path) -> None:
    """A Hugging Face folder made from Megatron's files and `args` alone: the same numbers, and it computes the same."""
    found, expected = TensorFolder(folder), load_file(model / "model.safetensors")
    assert set(found.files) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(found.read(name), tensor), name
    assert torch.equal(load_whole(folder)(tokens()).logits, load_whole(model)(tokens()).logits)


def rank_tensors(out: Path, place: Grid, stages: int) -> dict[str, torch.Tensor]:
    folder = f"mp_rank_{place[0]:02d}" + (f"_{place[1]:03d}" if stages > 1 else "")
    content = torch.load(out / "release" / folder / "model_optim_rng.pt", weights_only=False)
    return {key: value for key, value in content["model"].items() if value is not None}


@pytest.mark.parametrize("key", [*PLACES, BEYOND], ids=str)
def test_rank_files(written: Written, taken: "Results", key: tuple[str, Grid]):
    """Keys, empty entries and shapes of GPTModel's own state dict, strictly loaded, and transformers' logits."""
    ranks = taken[key]
    for rank in ranks.values():
        assert rank.found == rank.asked
        assert rank.error == ""
    logits = [rank.logits for rank in ranks.values() if rank.logits is not None]
    assert len(logits) == key[1][0]
    expected = load_whole(written.models[key[0]])(tokens()).logits
    for found in logits:
        assert (found[..., :VOCAB] - expected).abs().max() <= RELATIVE * expected.abs().max()


@pytest.mark.parametrize("key", [*PLACES, BEYOND], ids=str)
def test_rank_files_of_megatron(written: Written, taken: "Results", tmp_path: Path, key: tuple[str, Grid]):
    """Saved by torch.save of GPTModel's state dict beside an optimizer, random states and Megatron-LM's enums."""
    assert not any(rank.error for rank in taken[key].values())
    same_model(convert(again(taken.root, key), tmp_path / "hf", "hf"), written.models[key[0]])


@pytest.mark.parametrize("key", [*PLACES, BEYOND], ids=str)
def test_index(written: Written, loaded: Results, key: tuple[str, Grid]):
    """Keys, whole shapes, offsets, shapes and types of our `torch_dist` are those of GPTModel.sharded_state_dict()."""
    asked: dict[str, tuple] = {}
    for rank in loaded[key].values():
        assert not asked.keys() & rank.index.keys()  # each part is written once
        asked |= rank.index
    assert index_on_disk(written.sharded[key] / "release") == asked


@pytest.mark.parametrize("key", [*PLACES, BEYOND], ids=str)
def test_loading_at_another_grid(written: Written, loaded: Results, key: tuple[str, Grid]):
    """By Megatron-Core's own loading, strict as by default; every rank then has what its rank file would have."""
    for place, rank in loaded[key].items():
        expected = rank_tensors(written.rank_files[key], place, key[1][1])
        assert rank.state.keys() == {f"model.{name}" for name in expected}
        for name, tensor in expected.items():
            assert torch.equal(rank.state[f"model.{name}"], tensor), name


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("key", [(name, grid) for grid in GRIDS for name in AGAIN], ids=str)
def test_sharded_of_megatron(written: Written, loaded: Results, tmp_path: Path, key: tuple[str, Grid], variant: str):
    """Saved by Megatron-Core's own saving, in each of its layouts, with counters and an optimizer's tensor."""
    folder = again(loaded.root, key) / variant
    keys = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata.keys()
    assert MARKS[variant] in keys
    same_model(convert(folder, tmp_path / "hf", "hf"), written.models[key[0]])


def test_virtual_stages(written: Written, loaded: Results, tmp_path: Path):
    """Two chunks of layers on each of two stages, saved in both ways: layers are counted chunk by chunk."""
    key = VIRTUAL
    for rank in loaded[key].values():
        assert {name.partition(".")[0] for name in rank.state} == {"model0", "model1"}
    for saved in ("ranks/iter_0000010", "stacked"):
        same_model(
            convert(again(loaded.root, key) / saved, tmp_path / saved / "hf", "hf"), written.models["qwen2-tied"]
        )


def test_more_virtual_stages_than_one_digit_counts(tmp_path: Path):
    """model2 comes before model10."""
    layers = 12
    model = write_model(tmp_path / "llama", "llama", vocab_size=VOCAB, num_hidden_layers=layers)
    out = convert(model, tmp_path / "out", "megatron_legacy", classes="core")
    path = out / "release" / "mp_rank_00" / "model_optim_rng.pt"
    content = torch.load(path, weights_only=False)
    content |= {f"model{chunk}": {} for chunk in range(layers)}
    for key, tensor in content.pop("model").items():
        match = re.fullmatch(r"(decoder\.layers\.)(\d+)(\..*)", key)
        chunk = int(match[2]) if match else 0 if key.startswith("embedding") else layers - 1
        content[f"model{chunk}"][f"{match[1]}0{match[3]}" if match else key] = tensor
    torch.save(content, path)
    same_model(convert(out, tmp_path / "hf", "hf"), model)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_common_state_inside_the_checkpoint(written: Written, loaded: Results, tmp_path: Path):
    """Release 0.19 has no common.pt: its content is one more item of the checkpoint."""
    old, new = again(loaded.root, ("qwen2-tied", (2, 2))) / "stacked", tmp_path / "new"
    content: dict[str, Any] = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in dcp.FileSystemReader(old).read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    dcp.load(content, checkpoint_id=old, no_dist=True)
    content["common_state/shard_0_1"] = [torch.load(old / "common.pt", weights_only=False)]
    content |= {f"decoder.layers.mlp.linear_fc1._extra_state/shard_{layer}_{LAYERS}": [None] for layer in range(LAYERS)}
    planner = dcp.DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    dcp.save(content, checkpoint_id=new, planner=planner, no_dist=True)
    (new / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
    same_model(convert(new, tmp_path / "hf", "hf"), written.models["qwen2-tied"])


def test_names_with_fused_norms(written: Written, tmp_path: Path):
    """spec=te: the local names, renamed by Megatron-Core's own table for what it stores."""
    table = get_gpt_layer_local_spec(normalization="RMSNorm").submodules.sharded_state_dict_keys_map
    assert table
    out = convert(written.models["qwen3"], tmp_path / "te", "megatron_legacy", classes="core", spec="te", tp=2, pp=2)
    local = rank_tensors(written.rank_files["qwen3", (2, 2)], (1, 1), 2)
    renamed = set()
    for key in local:
        start, layer, name = re.fullmatch(r"(decoder\.layers\.)?(\d+\.)?(.*)", key).groups(default="")
        for old, new in table.items():
            name = name.replace(old, new) if layer and name.startswith(old) else name
        renamed.add(start + layer + name)
    assert rank_tensors(out, (1, 1), 2).keys() == renamed


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 1e4},
        {"rope_type": "default", "rope_theta": 1e6},
        {**LLAMA3, "factor": 8.0},
        {**LLAMA3, "factor": 32.0},
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    ],
    ids=lambda rope: f"{rope['rope_type']}-{rope['rope_theta']:g}-{rope.get('factor')}",
)
@pytest.mark.parametrize("size", [16, 128])
def test_rotary_frequencies(rope: dict[str, Any], size: int):
    """Megatron-Core's embedding from our `args` turns by the same angles as transformers', to the last bit."""
    config = tiny_config("llama", head_dim=size, max_position_embeddings=131072, rope_parameters=rope)
    args = to_args(config, torch.float32, 1, 1, padded_vocab=256, divisor=128)
    theirs = rotary_embedding(args)
    ours = LlamaRotaryEmbedding(config).inv_freq
    positions = torch.arange(1000.0)
    assert torch.equal(theirs.get_freqs_non_repeated(1000), torch.outer(positions, ours))
    if rope["rope_type"] != "linear":  # there Megatron scales positions instead
        assert torch.equal(theirs.inv_freq, ours)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("window_attn_skip_freq", 2),
        ("no_rope_freq", [0, 0, 0, 1]),
        ("qk_l2_norm", True),
        ("softmax_type", "off-by-one"),
        ("attention_output_gate", True),
        ("apply_residual_connection_post_layernorm", True),
    ],
)
def test_settings_that_no_family_has(name: str, value: Any):
    """Other mathematics under the same keys and shapes, so nothing but `args` tells it."""
    assert name in {field.name for field in dataclasses.fields(TransformerConfig)}
    args = to_args(tiny_config("llama"), torch.float32, 1, 1, padded_vocab=256, divisor=128)
    setattr(args, name, value)
    with pytest.raises(UserError, match=f"args.{name}="):
        to_config(args, None)


def rotary_embedding(args: Namespace) -> RotaryEmbedding:
    return RotaryEmbedding(
        args.kv_channels,
        args.rotary_percent,
        args.rotary_interleaved,
        args.rotary_seq_len_interpolation_factor,
        args.rotary_base,
        args.use_rope_scaling,
        args.rope_scaling_factor,
        use_cpu_initialization=True,
    )
