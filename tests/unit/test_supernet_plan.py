"""The plan of a supernet run: what it refuses, how stages follow each other, what the table of phases says."""

from pathlib import Path
from typing import Any

import pytest
from helpers.models import tiny_config
from helpers.supernet import encoder_config
from transformers import BertConfig, DistilBertConfig

from ee_scale.config.checks import check_supernet
from ee_scale.config.compose import compose_config
from ee_scale.config.supernet import DistillConfig, FactorsConfig, SamplingConfig, SpaceConfig
from ee_scale.elastic.order import UnitOrder
from ee_scale.elastic.subnet import SubnetSpec
from ee_scale.errors import UserError
from ee_scale.planning.phase_costs import kept_teacher
from ee_scale.planning.phases import Phases
from ee_scale.planning.supernet import SupernetPlan, phase_rows, plan_supernet, task_of

GIVEN = ["model=m", "data=d.txt", "data.seq_length=64"]
TEACHER, ALL = "{name: t, axes: [], steps: 3, rank: 2}", "{name: a, axes: [hidden, heads, ffn, depth], steps: 4}"
LABELS = ("bad", "good", "so so")


def compose(*overrides: str) -> Any:
    return compose_config("supernet", [*GIVEN, *overrides])


def plan(*overrides: str, model: Any = None, labels: tuple[str, ...] = ()) -> SupernetPlan:
    """Of a Llama with 5 layers, width 64, 8 heads over 4 KV heads, 128 MLP units."""
    return plan_supernet(compose(*overrides), Path("m"), model or tiny_config("llama"), labels)


def bert() -> BertConfig:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
    return BertConfig(vocab_size=99, max_position_embeddings=64, **sizes)


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("parallel.tp=0", "parallel.tp=0: must be at least 1"),
        ("distill.feature_dim=0", "distill.feature_dim=0: must be at least 1"),
        ("importance.samples=0", "importance.samples=0: must be at least 1"),
        ("importance.batch_size=0", "importance.batch_size=0: must be at least 1"),
        ("importance.layers=norm", "importance.layers=norm: choose one of divergence, influence"),
        ("importance.layer_samples=0", "importance.layer_samples=0: must be at least 1"),
        ("train.save_every=0", "train.save_every=0: must be at least 1"),
        ("train.keep=0", "train.keep=0: must be at least 1"),
        ("logging.every=0", "logging.every=0: must be at least 1"),
        ("data.seq_length=0", "data.seq_length=0: must be at least 1"),
        ("distill.loss_chunk_tokens=0", "distill.loss_chunk_tokens=0: must be at least 1"),
        ("distill.feature_weight=-0.1", "distill.feature_weight=-0.1: must be at least 0"),
        ("sampling.full_every=-1", "sampling.full_every=-1: must be at least 0"),
        ("sampling.palette_share=1.5", "sampling.palette_share=1.5: must be in [0, 1]"),
        ("distill.cache_gb=0", "distill.cache_gb=0.0: must be above 0"),
        ("distill.cache_samples=0", "distill.cache_samples=0: must be at least 1"),
        ("sampling.randoms=-1", "sampling.randoms=-1: must be at least 0"),
        ("optim.min_lr=-1", "optim.min_lr=-1.0: must be at least 0"),
        ("optim.betas=[0.9]", "optim.betas=[0.9]: two numbers in [0, 1)"),
        ("optim.betas=[0.9,1]", "optim.betas=[0.9, 1.0]: two numbers in [0, 1)"),
        ("optim.warmup_fraction=1", "optim.warmup_fraction=1.0: must be in [0, 1)"),
        ("train.micro_batch_size=3", "train.global_batch_size=16 is not a multiple of train.micro_batch_size x"),
        (
            "parallel.dp=3",
            "train.global_batch_size=16 is not a multiple of train.micro_batch_size x parallel.dp = 4 x 3",
        ),
        ("stages=[]", "stages=[]: give at least one stage, or choose recipe=mlfs"),
        ("stages=[{name: a, steps: 0}]", "stages[0].steps=0: must be at least 1"),
        ("stages=[{name: a, steps: 1, rank: -1}]", "stages[0].rank=-1: must be at least 0"),
        ("stages=[{name: a, steps: 1, lr: -1}]", "stages[0].lr=-1.0: must be at least 0"),
        ("optim.min_lr=0.01", "optim.min_lr=0.01 is above stages[0].lr=0.001"),
        (f"stages=[{ALL},{TEACHER}]", "stages[1].axes=[]: stages without axes come first, they make the teacher"),
        ("distill.kl_weight=1.5", "distill.kl_weight=1.5: must be in [0, 1]; the task's loss has the rest"),
        ("distill.kl_weight=-1", "distill.kl_weight=-1.0: must be in [0, 1]"),
        ("distill.temperature=0", "distill.temperature=0.0: must be above 0"),
        ("factors.targets=[mlp,mlps]", "factors.targets=['mlps']: choose among attention, mlp, embeddings, head"),
    ],
)
def test_checks_that_need_no_model(override: str, message: str):
    with pytest.raises(UserError) as error:
        check_supernet(compose(override))
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_something_must_train_beside_the_full_net():
    with pytest.raises(UserError, match="no subnet would train beside the full model"):
        check_supernet(compose("sampling.smallest=false", "sampling.randoms=0"))
    check_supernet(compose("sampling.smallest=false", "sampling.randoms=1"))
    check_supernet(compose("sampling.smallest=true", "sampling.randoms=0"))


def test_shipped_recipes_and_spaces_pass():
    for recipe in ("mlfs", "one_stage", "paper", "pretrained"):
        check_supernet(compose(f"recipe={recipe}"))
    for space in ("halves", "decoder", "bert_small", "encoder_deep_cut"):
        plan(f"space={space}", "recipe=one_stage")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.seq_length=65"], "data.seq_length=65 is above the model's max_position_embeddings=64"),
        (["parallel.pp=6"], "parallel.pp=6: more stages than the model's 5 layers"),
        (["parallel.tp=3"], "parallel.tp=3 does not divide num_key_value_heads=4 of the model"),
        (["parallel.tp=8"], "parallel.tp=8 does not divide num_key_value_heads=4 of the model"),
        (["parallel.tp=4", "space.heads=[1.0,0.5]"], "space.heads (as KV heads): 2 is not divisible by parallel.tp=4"),
        (["parallel.tp=2", "space.ffn=[1.0,33]"], "space.ffn: 33 is not divisible by parallel.tp=2"),
        (["space.heads=[3]"], "space.heads: 3 is not a multiple of the 2 query heads that share a KV head"),
        (["space.hidden=[65]"], "space.hidden: 65 is not between 1 and the model's 64"),
        (["space.ffn=[1.5]"], "space.ffn: 1.5 is no fraction of the full 128"),
        (["space.depth=[]"], "space.depth=[]: no size; give at least [1.0]"),
        (["space.exits=[5]"], "space.exits=[5]: give layers from 1 to 4"),
        (["space.depth_parts=6"], "space.depth_parts=6: give 1 to 5, the model's layers"),
        (["parallel.pp=2", "parallel.stages=[2,2]"], "parallel.stages=[2, 2]"),
        (["stages=[{name: a, axes: [width], steps: 1}]"], "stages: 'a' has axes=['width']; known: hidden, heads, ffn,"),
        (
            ["space.hidden=[1.0]", "stages=[{name: narrow, axes: [hidden, heads], steps: 1}]"],
            "stages: nothing can shrink in 'narrow': space.* has the full size alone for ['hidden', 'heads']",
        ),
        (["task=classify"], "task=classify: 'llama' is trained with task=causal_lm"),
        (["task=regress"], "task=regress: choose one of causal_lm, classify"),
    ],
)
def test_refused_for_this_model(overrides: list[str], message: str):
    with pytest.raises(UserError) as error:
        plan(*overrides)
    assert str(error.value).startswith(message)


def test_exits_are_sizes_of_depth_alone():
    full = "space={hidden: [1.0], ffn: [1.0], depth: [1.0], exits: [2]}"
    plan(full, "stages=[{name: a, axes: [depth], steps: 1}]")
    with pytest.raises(UserError, match="nothing can shrink in 'a'"):
        plan(full, "stages=[{name: a, axes: [ffn], steps: 1}]")


def test_the_mlp_must_divide_too():
    with pytest.raises(UserError, match=r"parallel\.tp=2 does not divide intermediate_size=127 of the model"):
        plan("parallel.tp=2", model=tiny_config("llama", intermediate_size=127))


def test_architectures_are_refused_by_name():
    with pytest.raises(
        UserError, match="architecture 'gemma2' is not elastic; known: llama, mistral, qwen2, qwen3, bert"
    ):
        plan(model=tiny_config("gemma2"))
    with pytest.raises(UserError, match="task=causal_lm: 'bert' is trained with task=classify"):
        plan("task=causal_lm", model=bert())
    with pytest.raises(UserError, match=r"space\.heads=\[1\.0\].* leave space\.heads=null"):
        plan("space.heads=[1.0]", model=bert(), labels=LABELS)
    with pytest.raises(UserError, match=r"architecture 'distilbert' is not elastic; known: .*, roberta, .*modernbert$"):
        plan(model=DistilBertConfig(), labels=LABELS)
    assert task_of(compose(), bert()) == "classify"
    assert task_of(compose(), tiny_config("qwen3")) == "causal_lm"


def test_roberta_reads_less_than_its_positions():
    given = {"model": encoder_config("roberta"), "labels": LABELS}  # 64 positions, ids to 1 are padding's
    assert plan("space=bert_small", "data.seq_length=62", **given)
    message = "data.seq_length=63 is above the model's max_position_embeddings=64, of which a text has 62"
    with pytest.raises(UserError, match=f"{message}$"):
        plan("space=bert_small", "data.seq_length=63", **given)


def test_a_teacher_that_trains_is_neither_kept_nor_left_out():
    live = ["recipe=one_stage", "data.sequences=8"]
    with pytest.raises(UserError, match=r"sampling\.full_every=2 with distill\.teacher=live: the full net teaches"):
        plan(*live, "sampling.full_every=2")
    with pytest.raises(UserError, match=r"distill\.cache=true with distill\.teacher=live"):
        plan(*live, "distill.cache=true")


def test_a_teacher_is_kept_for_texts_that_come_again():
    for sequences in ("null", "64"):
        message = f"distill.cache=true with data.sequences={sequences}: none of the 64 sequences"
        with pytest.raises(UserError, match=message):
            plan("distill.cache=true", f"data.sequences={sequences}", f"stages=[{ALL}]")


def test_a_stage_that_shrinks_nothing_of_the_palette_is_refused():
    deep = ["space.palette=[{depth: 0.5}]"]
    with pytest.raises(UserError, match=r"nothing of space\.palette can shrink in 'width' \(axes=\['hidden', 'heads'"):
        plan(*deep, "stages=[{name: width, axes: [hidden, heads, ffn], steps: 3}]")
    assert plan(*deep, "recipe=paper").total_steps == 900  # which draws from the whole space
    assert plan(*deep, f"stages=[{TEACHER},{ALL}]").total_steps == 7


# -- what a plan says --------------------------------------------------------------------------------------------------


def test_labels_become_the_models_classes():
    made = plan("space=bert_small", "recipe=one_stage", model=bert(), labels=LABELS)
    config = made.map.config
    assert (made.task, made.labels, config.num_labels) == ("classify", LABELS, 3)
    assert config.id2label == {0: "bad", 1: "good", 2: "so so"}
    assert config.label2id == {"bad": 0, "good": 1, "so so": 2}
    assert made.map.full_shape("classifier.weight") == (3, 64)


def test_layout_and_micro_batches():
    made = plan("parallel.tp=2", "parallel.pp=2", "parallel.dp=2", "train.micro_batch_size=2", "space.hidden=[1.0,0.5]")
    assert (made.layout.tp, made.layout.pp, made.layout.dp, made.layout.world_size) == (2, 2, 2, 8)
    assert made.num_micro_batches == 4
    assert made.parts == 2  # the stages
    assert [len(made.stages.layers(stage)) for stage in (0, 1)] in ([3, 2], [2, 3])
    assert plan("parallel.pp=2", "space.depth_parts=1").parts == 1


def test_the_residual_stream_is_whole_unless_asked_for():
    """In the default space, that of the dataclass, and the decoders' own."""
    for settings in ([], ["space=decoder"]):
        space = plan(*settings).space(UnitOrder.identity(plan().map.shape))
        assert space.hidden == (64,)
        assert len(space.ffn) > 1
        assert len(space.depth) > 1
    assert SpaceConfig().hidden == [1.0]


@pytest.mark.parametrize(
    ("layers", "depths"),
    [
        (12, (12, 11, 10, 9, 8)),
        (24, (24, 22, 20, 18, 16)),
        (30, (30, 27, 25, 22, 20)),
        (32, (32, 29, 27, 24, 21)),
        (36, (36, 32, 30, 27, 24)),
    ],
)
def test_a_decoder_shrinks_to_two_thirds(layers: int, depths: tuple[int, ...]):
    """Of its layers by depth alone; of SmolLM2 as a whole with five sixths of the MLP units too."""
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
    model = tiny_config("llama", num_hidden_layers=layers, vocab_size=49152, tie_word_embeddings=True, **sizes)
    made = plan("space=decoder", "recipe=one_stage", "data.seq_length=16", model=model)
    space = made.space(UnitOrder.identity(made.map.shape))
    assert (space.depth, space.ffn) == (depths, (1536, 1280))
    assert abs(depths[-1] / layers - 2 / 3) < 0.02
    if layers == 30:
        assert 0.66 < made.map.parameters(space.smallest()) / made.map.parameters(made.map.shape.full) < 0.68


def test_layers_of_a_decoder_go_by_what_it_says():
    assert plan().layers_by == "divergence"
    assert plan("importance.layers=influence").layers_by == "influence"
    encoder = {"model": bert(), "labels": LABELS}
    assert plan("space=bert_small", "recipe=one_stage", **encoder).layers_by == "influence"
    with pytest.raises(UserError, match=r"importance\.layers=divergence with task=classify: a new head has no"):
        plan("space=bert_small", "recipe=one_stage", "importance.layers=divergence", **encoder)


def test_the_space_drops_what_matters_least():
    made = plan("space={hidden: [64], ffn: [128], depth: [5, 3]}", "recipe=one_stage")
    order = UnitOrder.identity(made.map.shape)
    assert made.space(order).smallest() == SubnetSpec(64, 4, 128, (0, 1, 2))


def test_settings_reach_the_parts_that_read_them():
    made = plan(
        "recipe=one_stage",
        f"stages=[{TEACHER},{ALL}]",
        "factors={targets: [mlp], vectors: false}",
        "sampling={smallest: false, randoms: 3, gamma: -0.5}",
        "distill={teacher: live, kl_weight: 0.25, feature_weight: 0.5, feature_dim: 7, temperature: 2.0, "
        "loss_chunk_tokens: 11}",
        "train.seed=9",
    )
    first, second = made.factors(0), made.factors(1)
    assert (first.rank, second.rank, first.config) == (2, 8, FactorsConfig(["mlp"], vectors=False))
    assert made.config.sampling == SamplingConfig(smallest=False, randoms=3, gamma=-0.5)
    assert made.config.distill == DistillConfig("live", 0.25, 0.5, 7, 2.0, 11)


def test_what_is_kept_of_the_teacher():
    cached = ["distill.cache=true", "data.sequences=32", "distill.feature_dim=10", "distill.cache_samples=7"]
    made = plan(*cached, f"stages=[{TEACHER},{ALL}]", "parallel.pp=2", "distill.cache_gb=0.001")
    kept = kept_teacher(made, 4)
    assert kept.token_bytes == 3 * 10 * 4 + (7 + 1) * 4  # the deeper stage, and the samples
    assert kept.most_tokens == 1_000_000 // kept.token_bytes
    assert made.notes()["teacher"] == f"kept: {kept.words}"
    assert "152 B a token, 6,578 tokens at most (distill.cache_gb=0.001), of 2,048" in kept.words
    classes = plan("distill.cache=true", "space=bert_small", model=bert(), labels=LABELS)
    assert kept_teacher(classes, 4).token_bytes == 4 * 64 * 4 + 3 * 4


def test_a_kept_teacher_and_a_rare_full_net_cost_less():
    stages = f"stages=[{ALL}]"
    paper = ["recipe=paper", stages, "data.sequences=16"]
    whole, rare, never = (plan(*paper, f"sampling.full_every={every}") for every in (1, 4, 0))
    kept = plan(*paper, "distill.cache=true")
    assert kept.work()[0].teacher == pytest.approx(whole.work()[0].teacher * 16 / 64)
    assert kept.work()[0].exits < whole.work()[0].exits  # no logits of the teacher
    assert (kept.work()[0].forward, kept.work()[0].backward) == (whole.work()[0].forward, whole.work()[0].backward)
    saved = whole.work()[0].forward - rare.work()[0].forward
    alone = plan(f"stages=[{TEACHER},{ALL}]").phase_flops(0)
    assert 0 < saved < 0.75 * alone
    assert whole.work()[0].forward - never.work()[0].forward == pytest.approx(saved / 0.75)


def test_the_teacher_of_classes_is_kept_unless_it_trains():
    given = {"model": bert(), "labels": LABELS}
    assert plan("space=bert_small", **given).keeps_teacher
    assert not plan("space=bert_small", "distill.cache=false", **given).keeps_teacher
    assert not plan("space=bert_small", "recipe=one_stage", **given).keeps_teacher
    assert not plan().keeps_teacher  # texts of a corpus come once


def test_stages_follow_each_other():
    phases = Phases(compose(f"stages=[{TEACHER},{TEACHER},{ALL}]").stages)
    assert (phases.ends, phases.total_steps) == ([3, 6, 10], 10)
    assert [phases.index_at(step) for step in range(10)] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 2]
    assert [phases.start(index) for index in range(3)] == [0, 3, 6]
    assert phases.of_teacher == 2
    assert Phases(compose(f"stages=[{ALL}]").stages).of_teacher == 0
    assert Phases(compose(f"stages=[{TEACHER}]").stages).of_teacher == 1


def test_the_table_of_phases():
    rows = phase_rows(plan(f"stages=[{TEACHER},{ALL}]", "space={hidden: [32], ffn: [64], depth: [5, 2]}"))
    made = plan(f"stages=[{TEACHER},{ALL}]", "space={hidden: [32], ffn: [64], depth: [5, 2]}").map
    full, least = made.parameters(made.shape.full), made.parameters(SubnetSpec(32, 4, 64, (0, 1)))
    # Per layer and rank: q 64+128, k and v 64+64 each, o 128+64, three of the MLP 64+128; the head 64+131; 11 norms.
    trained = [rank * (5 * (2 * 192 + 2 * 128 + 3 * 192) + 195) + 11 * 64 for rank in (2, 8)]
    assert [row[:4] for row in rows] == [
        ("t", "nothing", "3", "2"),
        ("a", "hidden, heads, ffn, depth", "4", "8"),
    ]
    assert [row[4] for row in rows] == [f"{count:,}" for count in trained]
    assert [row[5] for row in rows] == [f"{full:,} of {full:,}", f"{least:,} of {full:,}"]
    assert phase_rows(plan("stages=[{name: w, axes: [ffn], steps: 1, rank: 0}]"))[0][3] == "whole"


def test_layers_without_anything_to_train_are_refused():
    config = compose("factors.vectors=false")
    check_supernet(config)
    config.factors.targets = ["head"]
    with pytest.raises(UserError, match=r"factors.targets=\['head'\] and factors.vectors=false: .* nothing to train"):
        check_supernet(config)
