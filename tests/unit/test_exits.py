"""Exits: where they sit, what they weigh, how they are stored, how they start."""

import json
from math import sqrt
from pathlib import Path

import pytest
import torch
from helpers.models import SHORTLIST, VOCAB, load_whole, some_tokens, spec_of, tiny_config, write_model
from transformers import AutoModelForCausalLM

from ee_scale.backbone import loading
from ee_scale.backbone.exit_layers import read_spec, resolve_exit_layers
from ee_scale.backbone.loading import TensorFolder
from ee_scale.backbone.parallel import padded_vocab
from ee_scale.errors import UserError
from ee_scale.exits.losses import loss_weight
from ee_scale.exits.placement import exit_cost, exit_parameters, exit_spec, resolve_loss_weights
from ee_scale.exits.stage import copy_source, local_slice, whole_low_rank, whole_random
from ee_scale.families.sizes import ModelShape, shape_of
from ee_scale.modeling.heads import HEADS, ExitSpec, build_exit_heads
from ee_scale.modeling.kinds import KINDS


@pytest.mark.parametrize(
    ("wanted", "layers"),
    [
        ([3, 6, 9], [3, 6, 9]),
        (4, [4]),
        (0.5, [6]),
        ([0.25, 0.5, 1.0], [3, 6, 12]),
        ([1], [1]),  # the first layer; 1.0 is the last
        ([0.01], [1]),
        ([0.25, 12], [3, 12]),
        ([4.0], [4]),
    ],
)
def test_exit_layers(wanted: object, layers: list[int]) -> None:
    assert resolve_exit_layers(wanted, 12) == layers


def test_exits_at_stage_boundaries() -> None:
    assert resolve_exit_layers("stages", 12, pp=4) == [3, 6, 9]
    assert resolve_exit_layers("stages", 12, pp=3, stages=[2, 6, 4]) == [2, 8]
    assert len(resolve_exit_layers("stages", 5, pp=4)) == 3


@pytest.mark.parametrize(
    ("wanted", "text"),
    [
        ([13], r"13 is not in 1..12 \(the model's layers\)"),
        ([0], "0 is not in 1..12"),
        ([-1], "-1 is not in 1..12"),
        ([1.5], "1.5 is not in 1..12"),
        ([float("inf")], "inf is not in 1..12"),
        ([float("nan")], "nan is not in 1..12"),
        ([3, 0.25], "layer 3 is named twice"),
        ([9, 3], "name the exits in order of depth"),
        ([0.9, 6], "name the exits in order of depth"),
        ([], "give layer numbers"),
        ("all", "exits.layers=all: give layer numbers"),
        ([True], "give layer numbers"),
        (["3"], "give layer numbers"),
        ("stages", "parallel.pp=1 has no stage boundary"),
    ],
)
def test_wrong_exit_layers(wanted: object, text: str) -> None:
    with pytest.raises(UserError, match=text):
        resolve_exit_layers(wanted, 12)


def test_loss_weights() -> None:
    assert resolve_loss_weights(0.5, [2, 4]) == {2: 0.5, 4: 0.5}
    assert resolve_loss_weights([1, 0], [2, 4]) == {2: 1.0, 4: 0.0}
    with pytest.raises(UserError, match="3 weights for 2 exits"):
        resolve_loss_weights([1, 2, 3], [2, 4])
    with pytest.raises(UserError, match="cannot be negative"):
        resolve_loss_weights([1, -0.1], [2, 4])


def test_loss_weight_warm_up() -> None:
    assert loss_weight(2.0, 0.5, step=0, warmup_steps=0, style="linear") == 2.0
    assert [loss_weight(2.0, 1.0, step, 4, "linear") for step in (0, 1, 2, 4, 9)] == [1.0, 1.25, 1.5, 2.0, 2.0]
    cosine = [loss_weight(1.0, 0.0, step, 4, "cosine") for step in range(5)]
    assert cosine == pytest.approx([0.0, (1 - sqrt(0.5)) / 2, 0.5, (1 + sqrt(0.5)) / 2, 1.0])


@pytest.mark.parametrize("family", ["llama", "gemma2", "olmo2"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head", HEADS)
def test_spec_survives_json(family: str, kind: str, head: str) -> None:
    if (kind, head) == ("embedding", "tied"):
        with pytest.raises(UserError, match="nothing to train"):
            exit_spec(tiny_config(family), [1, 3], kind, head, 8)
        return
    spec = spec_of(tiny_config(family), [1, 3], kind, head, 8)
    assert ExitSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    assert ("shortlist_ids" in spec.to_dict()) == (head == "shortlist")  # other files are what they were
    names = {
        "llama": ("post_attention_layernorm", None, None),
        "gemma2": ("pre_feedforward_layernorm", "post_feedforward_layernorm", 4.0),
        "olmo2": (None, "post_feedforward_layernorm", None),
    }
    assert (spec.mlp_input_norm, spec.mlp_output_norm, spec.logit_softcap) == names[family]


@pytest.mark.parametrize("change", [{"kind": "attention"}, {"head": "none"}])
def test_spec_refuses_unknown_kinds(change: dict) -> None:
    with pytest.raises(ValueError, match="early_exit: kind="):
        ExitSpec.from_dict({"layers": [1], **change})
    with pytest.raises(TypeError):
        ExitSpec.from_dict({"layers": [1], "colour": "red"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shortlist": 4}, "shortlist=4 is not the number of shortlist_ids, 3"),
        ({"shortlist": 1, "shortlist_ids": [5]}, "or is below 2"),
        ({"shortlist_ids": 3}, "shortlist_ids is no list"),
        ({"shortlist_ids": [5, 0, 5]}, "each of them once"),
        ({"shortlist_ids": [5, -1, 7]}, "whole numbers from 0 on"),
        ({"shortlist_ids": [5, 0, True]}, "whole numbers from 0 on"),
        ({"head": "full"}, "head='full' has no shortlist"),
    ],
)
def test_spec_refuses_wrong_shortlists(change: dict, message: str) -> None:
    values = {"layers": [1], "head": "shortlist", "shortlist": 3, "shortlist_ids": [5, 0, 7]}
    assert ExitSpec.from_dict(values).shortlist_ids == (5, 0, 7)
    with pytest.raises(ValueError, match=message):
        ExitSpec.from_dict({**values, **change})


def test_a_shortlist_has_tokens_of_the_vocabulary() -> None:
    values = {"layers": [1], "head": "shortlist", "shortlist": 2, "shortlist_ids": [5, VOCAB]}
    with pytest.raises(UserError, match=rf"here: early_exit: shortlist_ids: {VOCAB} is not in 0..{VOCAB - 1}"):
        read_spec(values, "here", tiny_config("llama"))
    with pytest.raises(UserError, match=f"exits.shortlist={VOCAB + 1} is above the model's vocab_size={VOCAB}"):
        exit_spec(tiny_config("llama"), [1], "norm", "shortlist", 4, VOCAB + 1)


def test_a_shortlist_head_is_a_full_head_with_some_rows() -> None:
    """Its logits are those rows' of a full head, by token id; no other token can be chosen."""
    model = AutoModelForCausalLM.from_config(tiny_config("llama"))
    heads = {}
    for head in ("full", "shortlist"):
        spec = spec_of(model.config, [2], "norm", head)
        heads[head] = build_exit_heads(spec, model.model.layers, model.model.norm, VOCAB)["2"]
    tokens, hidden = torch.tensor(some_tokens()), torch.randn(2, 3, 64)
    with torch.no_grad():
        heads["shortlist"].head.weight.copy_(heads["full"].head.weight[tokens])
        whole, some = (heads[head].logits(hidden, None) for head in ("full", "shortlist"))
        scored = heads["shortlist"].scored_logits(hidden, None)
    assert some.shape == whole.shape
    assert scored.shape == (2, 3, SHORTLIST)
    torch.testing.assert_close(some[..., tokens], whole[..., tokens])
    assert torch.equal(some[..., tokens], scored)
    assert some.isneginf().sum() == 6 * (VOCAB - SHORTLIST)
    places = heads["shortlist"].shortlist.places(torch.arange(VOCAB))
    assert torch.equal(places[tokens], torch.arange(SHORTLIST))
    assert int((places == -1).sum()) == VOCAB - SHORTLIST


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head", HEADS)
def test_parameter_count_and_cost(kind: str, head: str) -> None:
    """The count is that of the modules themselves, vectors left out."""
    if (kind, head) == ("embedding", "tied"):
        return
    config = tiny_config("llama")
    spec, shape = spec_of(config, [2], kind, head, 8), shape_of(config)
    model = meta_model_of(config)
    exit_head = build_exit_heads(spec, model.model.layers, model.model.norm, VOCAB)["2"]
    matrices = sum(p.numel() for p in exit_head.parameters() if p.ndim > 1)
    assert exit_parameters(spec, shape) == matrices
    frozen = 0 if head in ("full", "shortlist") else VOCAB * 64
    assert exit_cost(spec, shape) == 3 * matrices + 2 * frozen
    assert (exit_head.norm is None) == (kind == "embedding")


def meta_model_of(config: object) -> torch.nn.Module:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def test_model_shape() -> None:
    expected = ModelShape(5, 64, 128, 8, 4, 16, VOCAB, 64, False)
    assert shape_of(tiny_config("llama")) == expected
    assert shape_of(tiny_config("qwen2", tie_word_embeddings=True)).tied_embeddings
    assert shape_of(tiny_config("qwen2")).head_dim == 8  # hidden / heads where the config names none


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), "llama", tie_word_embeddings=request.param)


def test_copies_come_from_where_the_paper_takes_them(folder: Path) -> None:
    """mlp <- the same layer, layer <- the last layer, norm <- the final norm, head <- the output matrix."""
    tensors = TensorFolder(folder)
    output = "lm_head.weight" if "lm_head.weight" in tensors else "model.embed_tokens.weight"
    assert ("lm_head.weight" in tensors) != load_whole(folder).config.tie_word_embeddings
    sources = {
        "3.mlp.up_proj.weight": "model.layers.2.mlp.up_proj.weight",
        "1.mlp.down_proj.weight": "model.layers.0.mlp.down_proj.weight",
        "3.layer.self_attn.q_proj.weight": "model.layers.4.self_attn.q_proj.weight",
        "3.layer.input_layernorm.weight": "model.layers.4.input_layernorm.weight",
        "3.norm.weight": "model.norm.weight",
        "3.head.weight": output,
        "3.head.up.weight": None,
        "3.head.down.weight": None,
    }
    for name, source in sources.items():
        kind = KINDS.get(name.split(".")[1], KINDS["norm"])
        assert copy_source(kind, name, 5, tensors) == source


@pytest.mark.parametrize("block", [1, 64 * 5, 64 * 131, 1 << 22])
def test_rows_are_read_a_block_at_a_time(folder: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(loading, "BLOCK", block)
    tensors, rows = TensorFolder(folder), torch.tensor(some_tokens())
    name = "model.embed_tokens.weight"
    assert torch.equal(tensors.read_rows(name, rows), tensors.read(name)[rows])
    assert tensors.read_rows(name, rows[:0]).shape == (0, 64)


def test_low_rank_factors_start_as_no_update() -> None:
    up = whole_low_rank("3.head.up.weight", torch.empty(66, 8), VOCAB, seed=0)
    assert up.shape == (VOCAB, 8)  # the whole vocabulary, whatever the shard
    assert not up.any()
    down = whole_low_rank("3.head.down.weight", torch.empty(8, 64), VOCAB, seed=0)
    assert down.shape == (8, 64)
    assert 0.9 / 8 < down.abs().max() <= 1 / 8
    again, other_seed, other_exit = (
        whole_low_rank(name, torch.empty(8, 64), VOCAB, seed)
        for name, seed in (("3.head.down.weight", 0), ("3.head.down.weight", 1), ("4.head.down.weight", 0))
    )
    assert torch.equal(down, again)
    assert not torch.equal(down, other_seed)
    assert not torch.equal(down, other_exit)


@pytest.mark.parametrize(
    ("name", "source", "std"),
    [
        ("2.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight", 0.02),
        ("2.mlp.down_proj.weight", "model.layers.1.mlp.down_proj.weight", 0.02 / sqrt(4)),
        ("5.layer.self_attn.o_proj.weight", "model.layers.4.self_attn.o_proj.weight", 0.02 / sqrt(10)),
        ("5.layer.self_attn.q_proj.weight", "model.layers.4.self_attn.q_proj.weight", 0.02),
        ("5.head.weight", "model.embed_tokens.weight", 0.02),
    ],
)
def test_random_matrices(folder: Path, name: str, source: str, std: float) -> None:
    """N(0, 0.02); output projections smaller by sqrt(2 k) for an exit at layer k (EE-LLM's rule)."""
    config, tensors = load_whole(folder).config, TensorFolder(folder)
    whole = whole_random(name, source, tensors, config, seed=1)
    assert tuple(whole.shape) == tensors.shape(source)
    assert whole_random(name, source, tensors, config, 1, rows=SHORTLIST).shape == (SHORTLIST, whole.shape[1])
    assert whole.std().item() == pytest.approx(std, rel=0.05)
    assert abs(whole.mean().item()) < 0.05 * std
    assert torch.equal(whole, whole_random(name, source, tensors, config, seed=1))
    assert not torch.equal(whole, whole_random(name, source, tensors, config, seed=2))


@pytest.mark.parametrize(("family", "neutral"), [("qwen2", 1.0), ("gemma2", 0.0)])
def test_random_vectors_are_neutral(tmp_path: Path, family: str, neutral: float) -> None:
    """Gemma's norms multiply by 1 + weight."""
    folder = write_model(tmp_path, family)
    config, tensors = load_whole(folder).config, TensorFolder(folder)
    assert (whole_random("2.norm.weight", "model.norm.weight", tensors, config, 0) == neutral).all()
    if family == "qwen2":
        source = "model.layers.4.self_attn.q_proj.bias"
        assert not whole_random("2.layer.self_attn.q_proj.bias", source, tensors, config, 0).any()


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_slices_of_a_padded_vocabulary(tp: int) -> None:
    whole = torch.arange(1.0, 2 * VOCAB + 1).view(VOCAB, 2)
    rows = padded_vocab(VOCAB, tp) // tp
    assert 0 <= rows * tp - VOCAB < tp
    parameter = torch.empty(rows, 2)
    parameter.tensor_model_parallel, parameter.partition_dim = True, 0
    joined = torch.cat([local_slice(whole, parameter, rank) for rank in range(tp)])
    assert torch.equal(joined[:VOCAB], whole)
    assert not joined[VOCAB:].any()
    assert torch.equal(local_slice(whole, torch.empty(VOCAB, 2), 0), whole)
