"""Subnets, the space they are drawn from, and what they cost, against stock transformers models."""

import json
import re
from itertools import pairwise
from random import Random
from typing import Any

import pytest
import torch
from helpers.models import VOCAB, tiny_config
from helpers.supernet import OF_ENCODERS, encoder_config
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, Gemma2Config

from ee_scale.config.supernet import FactorsConfig, SizeConfig, SpaceConfig
from ee_scale.elastic.architecture import ElasticMap
from ee_scale.elastic.extract import subnet_config
from ee_scale.elastic.factors import FactorPlan
from ee_scale.elastic.subnet import ElasticShape, SearchSpace, SubnetSpec, drop_order, resolve_space
from ee_scale.errors import UserError
from ee_scale.families.build import meta_model
from ee_scale.reading import checked

SHAPE = ElasticShape(64, 4, 128, 4, 16, 2, head_dim_is_derived=False)  # 8 query heads, 2 for each KV head
BERT_SHAPE = ElasticShape(64, 4, 128, 4, 16, 1, head_dim_is_derived=True)
DROPS = (2, 1, 0, 3)
BERT = {"vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_labels": 5}


def space_config(**changes: Any) -> SpaceConfig:
    values = {"hidden": [1.0, 0.75, 0.5], "heads": [1.0, 0.5], "ffn": [1.0, 0.5], "depth": [1.0, 0.5], "exits": []}
    return SpaceConfig(**(values | changes))


def resolve(shape: ElasticShape = SHAPE, tp: int = 1, **changes: Any) -> SearchSpace:
    return resolve_space(space_config(**changes), shape, DROPS[-shape.num_layers :], tp)


# ---------------------------------------------------------------- sizes from the config


def test_sizes_that_will_be_shipped() -> None:
    space = resolve(palette=[SizeConfig(), SizeConfig(hidden=48, heads=0.5, ffn=0.5), SizeConfig(0.5, 4, 128, 2)])
    full, wide, small = space.palette_members()
    assert (full, wide) == (SHAPE.full, SubnetSpec(48, 2, 64, (0, 1, 2, 3)))
    assert small == SubnetSpec(32, 2, 128, (0, 3))
    assert set(space.palette_members()) <= set(space.members())
    # Axes that may not shrink are whole; two sizes may become one.
    assert space.palette_members(("heads", "ffn"))[1:] == (
        SubnetSpec(64, 2, 64, (0, 1, 2, 3)),
        SubnetSpec(64, 2, 128, (0, 1, 2, 3)),
    )
    assert resolve(palette=[SizeConfig(ffn=0.5), SizeConfig(ffn=0.5, depth=0.5)]).palette_members(("ffn",)) == (
        SubnetSpec(64, 4, 64, (0, 1, 2, 3)),
    )
    assert resolve(BERT_SHAPE, heads=None, palette=[SizeConfig(hidden=0.5)]).palette_members() == (
        SubnetSpec(32, 2, 128, (0, 1, 2, 3)),
    )


def test_only_sizes_of_the_space_are_shipped() -> None:
    with pytest.raises(UserError, match=r"palette\[1\]\.ffn: 0\.7 is 96, which is none of space\.ffn \(128, 64\)"):
        resolve(palette=[SizeConfig(), SizeConfig(ffn=0.7)])
    with pytest.raises(UserError, match=r"space\.palette\[0\]\.depth: 3 is 3, which is none of space\.depth \(4, 2\)"):
        resolve(palette=[SizeConfig(depth=3)])


def test_sizes_of_fractions_and_whole_numbers() -> None:
    space = resolve(hidden=[0.5, 40], heads=[0.5, 6], ffn=[0.3, 7, 128], depth=[3, 0.6])
    assert space.hidden == (64, 40, 32)  # the full size is always there, the largest first
    assert space.groups == (4, 3, 2)  # in groups of two query heads
    assert space.ffn == (128, 32, 7)  # 38.4 -> 32: fractions are rounded to 16, whole numbers are taken as they are
    assert space.depth == (4, 3, 2)
    assert space.kept == {4: (0, 1, 2, 3), 3: (0, 1, 3), 2: (0, 3)}


def test_what_fractions_are_rounded_to() -> None:
    assert resolve(ffn=[0.01]).ffn == (128, 16)  # never below one multiple
    assert resolve(heads=[0.4, 0.01]).groups == (4, 2, 1)  # 3.2 query heads -> 4, 0.08 -> 2
    assert resolve(heads=None).groups == resolve(heads=[1.0]).groups == (4,)
    odd = ElasticShape(28, 1, 8, 3, 28, 1, head_dim_is_derived=False)
    space = resolve(odd, hidden=[0.95], heads=None, ffn=[0.5], depth=[0.67])
    assert (space.hidden, space.ffn) == ((28,), (8,))  # 26.6 -> 32 and 4 -> 16, but not above the full size
    assert space.depth == (3, 2)


def test_heads_follow_from_the_width_where_the_config_has_no_head_dim() -> None:
    space = resolve(BERT_SHAPE, hidden=[0.7, 0.3], heads=None)
    assert (space.hidden, space.groups) == ((64, 48, 16), ())  # 44.8 and 19.2 in heads of 16
    assert {(spec.hidden, spec.groups) for spec in space.members()} == {(64, 4), (48, 3), (16, 1)}


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"hidden": []}, "space.hidden=[]: no size; give at least [1.0]"),
        ({"ffn": ["half"]}, "space.ffn: 'half' is no number"),
        ({"depth": [True]}, "space.depth: True is no number"),
        ({"hidden": [1.5]}, "space.hidden: 1.5 is no fraction of the full 64; give 0 < x <= 1.0, or a whole number"),
        ({"ffn": [0.0]}, "space.ffn: 0.0 is no fraction of the full 128"),
        ({"ffn": [float("nan")]}, "space.ffn: nan is no fraction of the full 128"),
        ({"ffn": [129]}, "space.ffn: 129 is not between 1 and the model's 128"),
        ({"depth": [0]}, "space.depth: 0 is not between 1 and the model's 4"),
        ({"heads": [3]}, "space.heads: 3 is not a multiple of the 2 query heads that share a KV head"),
        ({"heads": [6], "tp": 2}, "space.heads (as KV heads): 3 is not divisible by parallel.tp=2"),
        ({"ffn": [0.5, 63], "tp": 2}, "space.ffn: 63 is not divisible by parallel.tp=2"),
        ({"exits": [4]}, "space.exits=[4]: give layers from 1 to 3"),
        ({"exits": [2, 0]}, "space.exits=[2, 0]: give layers from 1 to 3"),
        ({"exits": [2, "a"]}, "space.exits=[2, 'a']: give layers from 1 to 3"),
        ({"exits": [True]}, "space.exits=[True]: give layers from 1 to 3"),
        ({"shape": BERT_SHAPE}, "space.heads=[1.0, 0.5]: this architecture's config has no head_dim"),
        ({"shape": BERT_SHAPE}, "(hidden / 16); leave space.heads=null"),
        ({"shape": BERT_SHAPE, "heads": None, "hidden": [40]}, "space.hidden: 40 is not a multiple of head_dim=16"),
        (
            {"shape": BERT_SHAPE, "heads": None, "hidden": [0.75], "tp": 2},
            "space.hidden (as heads): 3 is not divisible by parallel.tp=2",
        ),
    ],
)
def test_what_is_refused(changes: dict, text: str) -> None:
    with pytest.raises(UserError, match=re.escape(text)) as error:
        resolve(**changes)
    assert "\n" not in str(error.value)


def test_shapes_that_the_stock_config_refuses() -> None:
    """Llama's config wants a width that is a multiple of its heads, whatever its head_dim."""
    llama, qwen3 = (ElasticMap(tiny_config(name, num_hidden_layers=4), "causal_lm") for name in ("llama", "qwen3"))
    with pytest.raises(UserError, match=r"space.hidden: 64 is not a multiple of the 6 heads of space.heads"):
        resolve(llama.shape, heads=[6])
    with pytest.raises(UserError, match=r"space.hidden: 60 is not a multiple of the 8 heads"):
        resolve(llama.shape, hidden=[60], heads=None)
    for elastic_map, sizes in ((llama, {}), (qwen3, {"heads": [6], "hidden": [60]})):
        for spec in resolve(elastic_map.shape, **sizes).members():
            config = subnet_config(elastic_map, spec, tied=False)
            type(config)(**config.to_dict())  # as who opens the folder makes it


# ---------------------------------------------------------------- members and draws


def test_members_are_all_combinations_once_and_the_full_one_first() -> None:
    space = resolve(exits=[3, 1, 1])
    members = list(space.members())
    assert members[0] == SHAPE.full
    assert len(members) == len(set(members)) == 3 * 2 * 2 * 2 + 2
    assert {spec.hidden for spec in members} == {64, 48, 32}
    assert {spec.groups for spec in members} == {4, 2}
    assert {spec.ffn for spec in members} == {128, 64}
    assert {spec.layers for spec in members} == {(0, 1, 2, 3), (0, 3), (0,), (0, 1, 2)}
    assert members[-2:] == [SubnetSpec(64, 4, 128, (0,)), SubnetSpec(64, 4, 128, (0, 1, 2))]
    assert list(space.exit_members()) == members[-2:]


@pytest.mark.parametrize(
    ("axes", "expected"),
    [
        ((), {(64, 4, 128, 4)}),
        (("hidden",), {(64, 4, 128, 4), (48, 4, 128, 4), (32, 4, 128, 4)}),
        (("heads",), {(64, 4, 128, 4), (64, 2, 128, 4)}),
        (("ffn", "depth"), {(64, 4, 128, 4), (64, 4, 64, 4), (64, 4, 128, 2), (64, 4, 64, 2)}),
    ],
)
def test_axes_that_may_not_shrink_stay_full(axes: tuple[str, ...], expected: set) -> None:
    space, random = resolve(), Random(0)
    sizes = lambda spec: (spec.hidden, spec.groups, spec.ffn, spec.depth)  # noqa: E731
    assert {sizes(spec) for spec in space.members(axes)} == expected
    assert sizes(space.smallest(axes)) == min(expected)
    assert {sizes(space.draw(random, axes)) for _ in range(200)} == expected


def test_exits_are_members_only_where_depth_may_shrink() -> None:
    space = resolve(exits=[1])
    assert space.exit_members()[0] not in set(space.members(("hidden", "heads", "ffn")))
    # The first two layers are what depth 2 keeps as well: one member, not two.
    twice = resolve_space(space_config(exits=[2]), SHAPE, (3, 2, 1, 0), 1)
    assert len(set(twice.members())) == len(list(twice.members())) == 3 * 2 * 2 * 2


def test_draws_are_uniform_and_exits_are_as_likely_as_depths() -> None:
    space, random = resolve(exits=[1, 3]), Random(1)
    draws = [space.draw(random) for _ in range(4000)]
    share = lambda wanted: sum(map(wanted, draws)) / len(draws)  # noqa: E731
    for k in (1, 3):
        assert share(lambda spec, k=k: spec == SubnetSpec(64, 4, 128, tuple(range(k)))) == pytest.approx(
            1 / 4, abs=0.03
        )
    rest = [spec for spec in draws if spec.depth in (4, 2)]
    for name, sizes in (("hidden", (64, 48, 32)), ("groups", (4, 2)), ("ffn", (128, 64)), ("depth", (4, 2))):
        for size in sizes:
            part = sum(getattr(spec, name) == size for spec in rest) / len(rest)
            assert part == pytest.approx(1 / len(sizes), abs=0.04), name
    assert set(draws) == set(space.members())


# ---------------------------------------------------------------- which layers go


@pytest.mark.parametrize("count", [1, 4, 5, 7, 12])
@pytest.mark.parametrize("parts", [1, 2, 3, 4])
def test_layers_are_dropped_in_balance(count: int, parts: int) -> None:
    if parts > count:
        return
    random = Random(count * 10 + parts)
    for _ in range(20):
        importance = [random.random() for _ in range(count)]
        order = drop_order(importance, parts)
        assert sorted(order) == list(range(count))
        bounds = [round(part * count / parts) for part in range(parts + 1)]
        runs = [range(a, b) for a, b in pairwise(bounds)]
        for dropped in range(count + 1):
            lengths = [sum(layer not in order[:dropped] for layer in run) for run in runs]
            assert max(lengths) - min(lengths) <= 1, (order, dropped)
        for run in runs:  # inside a run the least important goes first
            mine = [importance[layer] for layer in order if layer in run]
            assert mine == sorted(mine)


def test_the_order_of_dropping_by_hand() -> None:
    assert drop_order([3.0, 1.0, 2.0, 4.0], 1) == [1, 2, 0, 3]
    assert drop_order([0.0, 1.0, 8.0, 9.0], 2) == [0, 2, 1, 3]  # in turn, though 0 and 1 matter least
    assert drop_order([8.0, 9.0, 1.0, 0.0], 2) == [3, 0, 2, 1]
    assert drop_order([0.0, 1.0, 2.0, 3.0, 4.0], 2) == [2, 0, 3, 1, 4]  # the longer run (2, 3, 4) first
    assert drop_order([1.0, 1.0, 1.0], 1) == [0, 1, 2]


def test_depths_keep_nested_layers() -> None:
    order = drop_order([0.3, 0.9, 0.1, 0.5], 2)
    space = resolve_space(space_config(depth=[1, 2, 3, 4]), SHAPE, order, 1)
    for larger, smaller in pairwise(space.depth):
        assert set(space.kept[smaller]) < set(space.kept[larger])
        assert list(space.kept[smaller]) == sorted(space.kept[smaller])


def test_a_spec_survives_json() -> None:
    spec = SubnetSpec(48, 2, 96, (0, 2, 3))
    assert checked(SubnetSpec, json.loads(json.dumps(spec.to_dict())), "spec") == spec
    assert (spec.name, spec.depth) == ("h48-g2-f96-l3", 3)


# ---------------------------------------------------------------- costs, against stock models


def model_config(name: str) -> tuple[Any, str]:
    if name in OF_ENCODERS:
        return encoder_config(name), "classify"
    family, _, extra = name.partition(" ")
    changes = {"tied": {"tie_word_embeddings": True}, "biases": {"attention_bias": True, "mlp_bias": True}, "": {}}
    return tiny_config(family, num_hidden_layers=4, **changes[extra]), "causal_lm"


MODELS = ("llama", "llama tied", "llama biases", "mistral", "qwen2", "qwen3", "bert", "roberta", "modernbert")
SPECS = (
    SubnetSpec(64, 4, 128, (0, 1, 2, 3)),
    SubnetSpec(48, 3, 128, (0, 1, 2, 3)),
    SubnetSpec(32, 2, 80, (0, 3)),
    SubnetSpec(16, 1, 16, (2,)),
)


def four_layers(elastic_map: ElasticMap) -> list[SubnetSpec]:
    """The specs; a decoder may cut its heads alone, ModernBERT has no subnet without its first layer."""
    alone = [] if elastic_map.shape.head_dim_is_derived else [SubnetSpec(64, 1, 128, (0, 1, 2, 3))]
    return [*(SPECS[:-1] if elastic_map.shape.first_layer_stays else SPECS), *alone]


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_those_of_the_stock_model(name: str) -> None:
    config, task = model_config(name)
    elastic_map = ElasticMap(config, task)
    for spec in four_layers(elastic_map):
        stock = subnet_config(elastic_map, spec, tied="tied" in name)
        model = meta_model(stock, torch.float32, task=task)
        assert elastic_map.parameters(spec) == sum(p.numel() for p in model.parameters()), spec
        layers = model.base_model.get_submodule(elastic_map.family.layers)
        assert elastic_map.parameters(spec, layers_only=True) == sum(p.numel() for p in layers.parameters()), spec
        fused = {name: len(elastic_map.family.parts_of(name.rsplit(".", 1)[0])) for name, _ in model.named_parameters()}
        shapes = {
            (name, i): tuple(part.shape)
            for name, p in model.named_parameters()
            for i, part in enumerate(p.chunk(fused[name]))
        }
        cut = {name: elastic_map.cut_shape(name, spec) for name in elastic_map.tensors}
        assert sorted(shapes.values()) == sorted(shape for shape in cut.values() if shape is not None)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("tokens", [1, 12])
def test_flops_are_those_that_torch_counts(name: str, tokens: int) -> None:
    config, task = model_config(name)
    elastic_map = ElasticMap(config, task)
    for spec in four_layers(elastic_map):
        stock = subnet_config(elastic_map, spec, tied="tied" in name)
        model = meta_model(stock, torch.float32, "sdpa", task=task)
        ids = torch.zeros(1, tokens, dtype=torch.long, device="meta")
        mask = torch.zeros(1, 1, tokens, tokens, device="meta")  # a ready one: meta tensors have no values to look at
        if getattr(config, "layer_types", None) is not None:
            mask = dict.fromkeys(("full_attention", "sliding_attention"), mask)
        with FlopCounterMode(display=False) as counter:
            model(input_ids=ids, attention_mask=mask, **({} if task == "classify" else {"use_cache": False}))
        assert elastic_map.flops(spec, tokens) == counter.get_total_flops(), spec


def test_trained_parameters_by_hand() -> None:
    elastic_map = ElasticMap(tiny_config("llama", num_hidden_layers=4), "causal_lm")
    spec = SubnetSpec(32, 2, 80, (1, 3))
    heads, kv, r = 2 * 2 * 16, 2 * 16, 3  # q and o are as wide as 2 groups of 2 query heads of 16
    attention = r * ((heads + 32) + 2 * (kv + 32) + (32 + heads))
    mlp = r * 3 * (32 + 80)
    norms = 2 * 32

    def counted(rank: int, **changes: Any) -> int:
        return FactorPlan(elastic_map, FactorsConfig(**changes), rank).parameters(spec)

    assert counted(rank=r) == 2 * (attention + mlp + norms) + 32 + r * (VOCAB + 32)  # the last norm, and lm_head
    assert counted(rank=r, vectors=False, targets=("mlp",)) == 2 * mlp
    assert counted(rank=r, vectors=False, targets=("embeddings",)) == r * (VOCAB + 32)
    assert counted(rank=0, vectors=False, targets=("mlp",)) == 2 * 3 * 32 * 80


@pytest.mark.parametrize("tied", [False, True])
def test_a_tied_output_matrix_has_factors_of_its_own(tied: bool) -> None:
    elastic_map = ElasticMap(tiny_config("llama", tie_word_embeddings=tied), "causal_lm")
    plan = FactorPlan(elastic_map, FactorsConfig(["head"], vectors=False), 4)
    assert {key: tensor.shape for key, tensor in plan.tensors.items()} == {
        ("lm_head", "A"): (VOCAB, 4),
        ("lm_head", "B"): (4, 64),
    }


def test_trained_parameters_of_a_classifier() -> None:
    elastic_map = ElasticMap(BertConfig(num_hidden_layers=1, max_position_embeddings=64, **BERT), "classify")
    head = 5 * 64 + 5
    plan = FactorPlan(elastic_map, FactorsConfig([], vectors=False), 2)
    assert plan.parameters(elastic_map.shape.full) == head  # always whole
    assert plan.parameters(SubnetSpec(32, 2, 128, (0,))) == 5 * 32 + 5
    attention = FactorPlan(elastic_map, FactorsConfig(["attention"], vectors=False), 2)
    assert attention.parameters(elastic_map.shape.full) == head + 4 * 2 * (64 + 64)
    mlp = FactorPlan(elastic_map, FactorsConfig(["mlp"], vectors=False), 2)
    assert mlp.parameters(elastic_map.shape.full) == head + 2 * 2 * (64 + 128)
    words = FactorPlan(elastic_map, FactorsConfig(["embeddings"], vectors=False), 2)
    assert words.parameters(elastic_map.shape.full) == head + 2 * (VOCAB + 64)  # not the tables of positions and types
    missing = FactorPlan(elastic_map, FactorsConfig([], vectors=False), 2, ("bert.pooler.dense", "classifier"))
    assert missing.parameters(elastic_map.shape.full) == head + 64 * 64 + 64
    vectors = FactorPlan(elastic_map, FactorsConfig([]), 2)
    # Biases of q, k, v, o, both MLP matrices, pooler; three norms of weight and bias.
    assert vectors.parameters(elastic_map.shape.full) == head + 4 * 64 + 128 + 64 + 64 + 3 * 2 * 64


def test_other_architectures_and_tasks_are_refused() -> None:
    with pytest.raises(UserError, match=r"architecture 'gemma2' is not elastic; known: llama, mistral, .*, bert"):
        ElasticMap(Gemma2Config(), "causal_lm")
    with pytest.raises(UserError, match="task=classify: 'llama' is trained with task=causal_lm"):
        ElasticMap(tiny_config("llama"), "classify")
    with pytest.raises(UserError, match="task=causal_lm: 'bert' is trained with task=classify"):
        ElasticMap(BertConfig(**BERT), "causal_lm")
    with pytest.raises(UserError, match="is_decoder=true; an encoder is wanted"):
        ElasticMap(BertConfig(is_decoder=True, **BERT), "classify")


def test_an_unknown_tensor_is_named() -> None:
    elastic_map = ElasticMap(tiny_config("llama"), "causal_lm")
    with pytest.raises(UserError, match=r"'model.layers.0.mlp.gate.weight' of 'llama' is not known"):
        elastic_map.describe("model.layers.0.mlp.gate.weight", (4, 64))
