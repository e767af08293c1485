"""A subnet inside the supernet, the folder that is cut from it, and a model that is cut by hand say the same."""

import copy
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import pytest
import torch
from helpers.clutter import check_copy, clutter
from helpers.models import VOCAB, write_model
from helpers.supernet import (
    FUSED,
    OF_ENCODERS,
    PADDING,
    SupernetJob,
    encoder_config,
    inputs_of,
    scrambled_order,
    start_noise,
    write_base,
)
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, LlamaModel

from ee_scale.backbone.loading import read_config
from ee_scale.backbone.stages import plan_stages
from ee_scale.config.supernet import FactorsConfig
from ee_scale.elastic.architecture import ElasticMap
from ee_scale.elastic.factors import FactorPlan, FactorSet
from ee_scale.elastic.order import UnitOrder
from ee_scale.elastic.stage import ElasticStage, base_tensors
from ee_scale.elastic.subnet import SubnetSpec, drop_order
from ee_scale.errors import UserError
from ee_scale.families.build import AUTO_CLASS
from ee_scale.grid import Grid, Layout, join_grid, leave_grid
from ee_scale.palettes.cut_out import TrainedSupernet, subnet_model, write_subnet

TOLERANCE = 1e-5
SLIDING, FULL = "sliding_attention", "full_attention"
Factors = tuple[FactorsConfig, int]  # the group, and the rank
TARGETS = ["attention", "mlp", "embeddings", "head"]
ALL = (FactorsConfig(TARGETS), 3)
BODY = (FactorsConfig(["attention", "mlp"]), 3)
MODERN_OPTIONS = dict.fromkeys(("attention_bias", "mlp_bias", "norm_bias", "classifier_bias"), True)
MODERN_OPTIONS |= {"classifier_pooling": "mean", "layer_types": [FULL, FULL, SLIDING, SLIDING]}
# name -> (family, changes of its config, what trains)
CASES: dict[str, tuple[str, dict[str, Any], Factors]] = {
    "llama": ("llama", {}, ALL),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}, ALL),
    "llama-tied": ("llama", {"tie_word_embeddings": True}, BODY),
    "llama-untied-by-training": ("llama", {"tie_word_embeddings": True}, ALL),
    "llama-whole": ("llama", {}, (FactorsConfig(TARGETS), 0)),
    "mistral": ("mistral", {}, BODY),
    "qwen2": ("qwen2", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2}, ALL),
    "qwen3": (
        "qwen3",
        {"use_sliding_window": True, "sliding_window": 6, "layer_types": [SLIDING, FULL, FULL, SLIDING]},
        ALL,
    ),
    "bert": ("bert", {}, ALL),
    "bert-whole": ("bert", {}, (FactorsConfig(TARGETS, vectors=False), 0)),
    "roberta": ("roberta", {}, ALL),
    "xlm-roberta": ("xlm-roberta", {}, BODY),
    "modernbert": ("modernbert", {}, ALL),
    "modernbert-biases-mean": ("modernbert", MODERN_OPTIONS, ALL),
}
EVERY = (0, 1, 2, 3)
ALONE = {
    "full": SubnetSpec(64, 4, 128, EVERY),
    "hidden": SubnetSpec(32, 4, 128, EVERY),
    "heads": SubnetSpec(64, 2, 128, EVERY),
    "ffn": SubnetSpec(64, 4, 40, EVERY),
    "depth": SubnetSpec(64, 4, 128, (0, 2)),
    "exit": SubnetSpec(64, 4, 128, (0, 1)),
    "last": SubnetSpec(64, 4, 128, (3,)),
}


def specs_of(case: str) -> list[SubnetSpec]:
    """Every axis alone, and subnets with all axes cut. Llama's and BERT's configs tie heads to the width; ModernBERT's
    first layer is another one than the rest."""
    family = CASES[case][0]
    random, encoder = Random(case), family in OF_ENCODERS
    specs = [spec for axis, spec in ALONE.items() if not (encoder and axis in ("hidden", "heads"))]
    for _ in range(4):
        hidden = random.choice((32, 48) if encoder else (32, 48, 64))
        groups = hidden // 16 if encoder else random.choice((1, 2))
        layers = tuple(sorted(random.sample(EVERY, random.choice((1, 2, 3)))))
        specs.append(SubnetSpec(hidden, groups, random.choice((24, 56, 128)), layers))
    return [replace(spec, layers=(0, *spec.layers[1:])) if family == "modernbert" else spec for spec in specs]


@dataclass
class Net:
    """A supernet in this process, with the values that its factors have after training."""

    folder: Path
    map: ElasticMap
    order: UnitOrder
    stage: ElasticStage
    trained: dict[str, torch.Tensor]

    @property
    def task(self) -> str:
        return self.map.family.task

    @torch.no_grad()
    def logits(self, spec: SubnetSpec) -> torch.Tensor:
        """Inside the supernet."""
        self.stage.select(spec)
        return self.run()

    @torch.no_grad()
    def run(self) -> torch.Tensor:
        """Of what is active now."""
        data = inputs(self.map.family.name)
        batch = {"tokens": data.pop("input_ids"), **data}
        output, _ = self.stage(batch["tokens"], batch)
        return self.stage.head(output)

    def extracted(self, spec: SubnetSpec) -> torch.nn.Module:
        return subnet_model(self.map, base_tensors(self.folder, self.map), self.order, self.supernet, spec)

    def write(self, folder: Path, spec: SubnetSpec) -> Path:
        write_subnet(folder, self.extracted(spec), self.supernet, spec, "Facts.", "a teacher")
        return folder

    @property
    def supernet(self) -> TrainedSupernet:
        return TrainedSupernet({"task": self.task, "base_fingerprint": "f"}, self.folder, 7, 2, self.trained)


def inputs(family: str) -> dict[str, torch.Tensor]:
    """[2, 24]: longer than the sliding windows; for encoders with padding and two kinds of segments."""
    ids = torch.randint(3, VOCAB, (2, 24), generator=torch.Generator().manual_seed(1))
    if family not in OF_ENCODERS:
        return {"input_ids": ids}
    mask = torch.ones_like(ids)
    mask[1, 17:] = 0
    ids = ids.masked_fill(mask == 0, PADDING)
    given = {"attention_mask": mask, "token_type_ids": ids % 2 * mask}
    return {"input_ids": ids, **{name: given[name] for name in inputs_of(family)}}


def stock_logits(model: torch.nn.Module) -> torch.Tensor:
    family = model.config.model_type
    extra = {} if family in OF_ENCODERS else {"use_cache": False}
    with torch.no_grad():
        return model(**inputs(family), **extra).logits


def make_net(
    folder: Path, grid: Grid, settings: Factors, *, sort: bool = True, phases: int = 2, noise: float = 1.0
) -> Net:
    """Load a base folder and give its factors the start values plus `noise` x random ones."""
    config = read_config(folder)
    elastic_map = ElasticMap(config, "classify" if config.model_type in OF_ENCODERS else "causal_lm")
    layers = elastic_map.shape.num_layers
    order = scrambled_order(elastic_map.shape) if sort else UnitOrder.identity(elastic_map.shape)
    plan = plan_stages(layers, 1, [layers], whole_model=True)
    stage = ElasticStage(elastic_map, plan, grid, config.dtype or torch.float32)
    stage.load(base_tensors(folder, elastic_map), order)
    trained = {}
    for index in range(phases):
        factors = FactorSet(stage, FactorPlan(elastic_map, *settings, stage.new), index, seed=3)
        with torch.no_grad():
            for name, parameter in factors.named.items():
                parameter.add_(noise * start_noise(name, parameter.shape))
                trained[name] = parameter.detach()
    return Net(folder, elastic_map, order, stage, trained)


@pytest.fixture(scope="module")
def grid() -> Iterator[Grid]:
    with mock.patch.dict(os.environ):
        yield join_grid(Layout(), torch.device("cpu"))
    leave_grid()


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root, written = tmp_path_factory.mktemp("bases"), {}

    def base(case: str) -> Path:
        family, changes, _ = CASES[case]
        if case not in written and family in OF_ENCODERS:
            written[case] = write_base(root / case, SupernetJob(family), **changes)
        elif case not in written:
            written[case] = write_model(root / case, family, num_hidden_layers=4, **changes)
        return written[case]

    return base


@pytest.fixture(scope="module")
def nets(grid: Grid, bases: Callable[[str], Path]) -> Callable[[str], Net]:
    made: dict[str, Net] = {}

    def net(case: str) -> Net:
        if case not in made:
            made[case] = make_net(bases(case), grid, CASES[case][2])
        return made[case]

    return net


# ---------------------------------------------------------------- a model that is cut by hand

MATRICES = {  # last names of a module -> its rows, its columns
    "embed_tokens": (None, "hidden"),
    "lm_head": (None, "hidden"),
    "q_proj": ("query", "hidden"),
    "k_proj": ("key", "hidden"),
    "v_proj": ("key", "hidden"),
    "o_proj": ("hidden", "query"),
    "gate_proj": ("ffn", "hidden"),
    "up_proj": ("ffn", "hidden"),
    "down_proj": ("hidden", "ffn"),
    "q_norm": (None,),
    "k_norm": (None,),
    "word_embeddings": (None, "hidden"),
    "position_embeddings": (None, "hidden"),
    "token_type_embeddings": (None, "hidden"),
    "self.query": ("query", "hidden"),
    "self.key": ("key", "hidden"),
    "self.value": ("key", "hidden"),
    "attention.output.dense": ("hidden", "query"),
    "intermediate.dense": ("ffn", "hidden"),
    "output.dense": ("hidden", "ffn"),
    "pooler.dense": ("hidden", "hidden"),
    "classifier": (None, "hidden"),
    "classifier.dense": ("hidden", "hidden"),
    "out_proj": (None, "hidden"),
    "tok_embeddings": (None, "hidden"),
    "Wqkv.query": ("query", "hidden"),
    "Wqkv.key": ("query", "hidden"),
    "Wqkv.value": ("query", "hidden"),
    "attn.Wo": ("hidden", "query"),
    "Wi.input": ("ffn", "hidden"),
    "Wi.gate": ("ffn", "hidden"),
    "mlp.Wo": ("hidden", "ffn"),
    "head.dense": ("hidden", "hidden"),
}


def hand_cut(net: Net, spec: SubnetSpec, phases: int = 2) -> torch.Tensor:
    """Logits of a stock model whose tensors are picked one by one from the base model and the factors."""
    config = net.map.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    queries = config.num_attention_heads // (getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
    base = AUTO_CLASS[net.task].from_pretrained(net.folder, dtype=torch.float32)
    state = {}
    for name, whole in base.state_dict().items():
        module, leaf = name.rsplit(".", 1)
        layer = next((int(part) for part in name.split(".") if part.isdigit()), None)
        if layer is not None and layer not in spec.layers:
            continue
        groups = [] if layer is None else net.order.groups[layer].tolist()
        rows = {
            "hidden": net.order.hidden.tolist(),
            "ffn": [] if layer is None else net.order.ffn[layer].tolist(),
            "query": [g * queries * head_dim + i for g in groups for i in range(queries * head_dim)],
            "key": [g * head_dim + i for g in groups for i in range(head_dim)],
        }
        count = {
            "hidden": spec.hidden,
            "ffn": spec.ffn,
            "query": spec.groups * queries * head_dim,
            "key": spec.groups * head_dim,
        }
        inside = FUSED.get(module.rsplit(".", 1)[-1], ("",))
        pieces = []
        for part, value in zip(inside, whole.chunk(len(inside)), strict=True):
            full_name = f"{module}.{part}".rstrip(".")
            axes = next((axes for end, axes in MATRICES.items() if full_name.endswith(end)), ("hidden",))[: value.dim()]
            for dim, axis in enumerate(axes):
                if axis is not None:
                    value = torch.stack([value.select(dim, row) for row in rows[axis]], dim)
            for phase in range(phases):
                mine = {key: net.trained.get(f"{phase}.{full_name}.{key}") for key in ("A", "B", leaf)}
                if mine["A"] is not None and leaf == "weight":
                    value = value + mine["A"].float() @ mine["B"].float()
                if mine[leaf] is not None:
                    value = value + mine[leaf].float()
            for dim, axis in enumerate(axes):
                if axis is not None:
                    value = value.narrow(dim, 0, count[axis])
            pieces.append(value)
        if layer is not None:
            name = ".".join(str(spec.layers.index(layer)) if part == str(layer) else part for part in name.split("."))
        state[name] = torch.cat(pieces)
    model = AUTO_CLASS[net.task].from_config(hand_config(config, spec, queries, head_dim), dtype=torch.float32)
    model.load_state_dict(state)
    return stock_logits(model.eval())


def hand_config(config: Any, spec: SubnetSpec, queries: int, head_dim: int) -> Any:
    config = copy.deepcopy(config)
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = spec.hidden, spec.ffn, len(spec.layers)
    config.num_attention_heads = spec.groups * queries
    if config.model_type not in OF_ENCODERS:
        config.num_key_value_heads, config.head_dim, config.tie_word_embeddings = spec.groups, head_dim, False
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[layer] for layer in spec.layers]
    return config


# ---------------------------------------------------------------- the start


@pytest.mark.parametrize("case", CASES)
def test_the_full_net_starts_as_the_base_model_to_the_bit(case: str, grid: Grid, bases: Callable) -> None:
    net = make_net(bases(case), grid, CASES[case][2], sort=False, noise=0.0)
    expected = stock_logits(AUTO_CLASS[net.task].from_pretrained(net.folder).eval())
    assert torch.equal(net.logits(ALONE["full"]), expected)
    assert net.stage.new == set()


@pytest.mark.parametrize("case", CASES)
def test_sorting_changes_no_output(case: str, grid: Grid, bases: Callable) -> None:
    net = make_net(bases(case), grid, CASES[case][2], noise=0.0)
    expected = stock_logits(AUTO_CLASS[net.task].from_pretrained(net.folder).eval())
    assert expected.std() > 0.1
    torch.testing.assert_close(net.logits(ALONE["full"]), expected, atol=TOLERANCE, rtol=TOLERANCE)


# ---------------------------------------------------------------- any subnet, three ways


@pytest.mark.parametrize("case", CASES)
def test_supernet_folder_and_hand_agree(case: str, nets: Callable, tmp_path: Path) -> None:
    net, before = nets(case), None
    for number, spec in enumerate(specs_of(case)):
        inside = net.logits(spec)
        folder = net.write(tmp_path / str(number), spec)
        stock, info = AUTO_CLASS[net.task].from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
        assert not any(info.values()), (spec, info)
        assert type(stock).__module__.startswith("transformers.models.")
        torch.testing.assert_close(stock_logits(stock.eval()), inside, atol=TOLERANCE, rtol=TOLERANCE)
        torch.testing.assert_close(hand_cut(net, spec), inside, atol=TOLERANCE, rtol=TOLERANCE)
        tied = stock.config.tie_word_embeddings and net.task == "causal_lm"
        extra = VOCAB * spec.hidden if net.map.config.tie_word_embeddings and not tied else 0
        if net.task == "causal_lm":
            assert sum(p.numel() for p in stock.parameters()) == net.map.parameters(spec) + extra
        assert inside.std() > 0.05
        assert before is None or (inside - before).abs().max() > 1e-3  # a size that did nothing would agree as well
        before = inside


def test_factors_are_not_negligible(nets: Callable) -> None:
    for case in CASES:
        net = nets(case)
        once, twice = (hand_cut(net, ALONE["full"], phases) for phases in (1, 2))
        assert (once - twice).abs().max() > 1e-2, case


def test_what_the_folder_says_about_itself(nets: Callable, bases: Callable, tmp_path: Path) -> None:
    (bases("qwen2") / "tokenizer.json").write_text("{}")
    net = nets("qwen2")
    spec = SubnetSpec(32, 2, 40, (1, 2, 3))
    folder = net.write(tmp_path / "small", spec)
    config = AutoConfig.from_pretrained(folder)
    assert (config.hidden_size, config.intermediate_size, config.num_hidden_layers) == (32, 40, 3)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (4, 2, 8)
    assert config.layer_types == [FULL, SLIDING, SLIDING]
    assert config.max_window_layers == 1  # the first so many layers see everything
    assert config.architectures == ["Qwen2ForCausalLM"]
    assert config.dtype == torch.float32
    kept = ("vocab_size", "rope_parameters", "rms_norm_eps", "sliding_window", "use_sliding_window", "eos_token_id")
    assert all(getattr(config, name) == getattr(net.map.config, name) for name in kept)
    assert {"tokenizer.json", "config.json", "generation_config.json", "README.md"} <= {
        p.name for p in folder.iterdir()
    }
    card = (folder / "README.md").read_text()
    assert "width 32, 4 heads, 40 MLP units, layers 2, 3, 4 of the base" in card
    assert "7 steps" in card
    assert "Facts." in card
    bert = nets("bert").write(tmp_path / "bert", SubnetSpec(32, 2, 40, (3,)))
    config = AutoConfig.from_pretrained(bert)
    assert (config.hidden_size, config.num_attention_heads, config.num_labels) == (32, 2, 5)
    assert getattr(config, "head_dim", None) is None


def test_names_of_classes_stay(grid: Grid, bases: Callable, tmp_path: Path) -> None:
    net = make_net(bases("bert"), grid, BODY)
    net.map.config.id2label = {0: "red", 1: "green", 2: "blue", 3: "grey", 4: "pink"}
    net.map.config.label2id = {name: i for i, name in net.map.config.id2label.items()}
    config = AutoConfig.from_pretrained(net.write(tmp_path / "small", SubnetSpec(32, 2, 40, (3,))))
    assert config.id2label == net.map.config.id2label
    assert config.label2id == net.map.config.label2id


@pytest.mark.parametrize(
    ("case", "targets", "tied"),
    [
        ("llama-tied", ("attention", "mlp"), True),
        ("llama-tied", ("mlp", "head"), False),
        ("llama-tied", ("embeddings",), False),
        ("llama", ("attention",), False),
    ],
)
def test_embeddings_stay_tied_unless_trained(
    case: str, targets: tuple, tied: bool, grid: Grid, bases: Callable, tmp_path: Path
) -> None:
    net = make_net(bases(case), grid, (FactorsConfig(list(targets)), 2))
    spec = SubnetSpec(32, 2, 40, (1, 3))
    folder = net.write(tmp_path / "small", spec)
    stock = AutoModelForCausalLM.from_pretrained(folder)
    assert stock.config.tie_word_embeddings is tied
    assert ("lm_head.weight" in load_file(folder / "model.safetensors")) is not tied
    assert (stock.lm_head.weight is stock.model.embed_tokens.weight) is tied
    torch.testing.assert_close(stock_logits(stock.eval()), net.logits(spec), atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("case", ["llama", "mistral", "qwen2", "qwen3"])
def test_an_extracted_decoder_generates(case: str, nets: Callable, tmp_path: Path) -> None:
    net, spec = nets(case), SubnetSpec(48, 2, 56, (0, 2, 3))
    stock = AutoModelForCausalLM.from_pretrained(net.write(tmp_path / "small", spec)).eval()
    prompt = inputs("llama")["input_ids"][:1, :12]
    text, again = (stock.generate(prompt, max_new_tokens=8, do_sample=False, eos_token_id=None) for _ in range(2))
    assert text.shape == (1, 20)
    assert torch.equal(text, again)
    net.stage.select(spec)
    with torch.no_grad():
        states, _ = net.stage(text[:, :-1], {})
        assert torch.equal(net.stage.head(states).argmax(-1)[:, 11:], text[:, 12:])  # without a cache, inside


def test_the_number_type_is_the_base_models(grid: Grid, bases: Callable, tmp_path: Path) -> None:
    base = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(bases("llama"), dtype=torch.bfloat16).save_pretrained(base)
    net = make_net(base, grid, ALL)
    assert {p.dtype for p in net.trained.values()} == {torch.bfloat16}
    spec = SubnetSpec(32, 2, 40, (1, 3))
    folder = net.write(tmp_path / "small", spec)
    assert {value.dtype for value in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}
    assert AutoConfig.from_pretrained(folder).dtype == torch.bfloat16
    # Rounded once: W + A B + A' B' is formed in fp32.
    name = "model.layers.1.mlp.up_proj"
    whole = load_file(base / "model.safetensors")[f"{name}.weight"].float()
    value = whole[net.order.ffn[1]][:, net.order.hidden]
    for stage in range(2):
        value = value + net.trained[f"{stage}.{name}.A"].float() @ net.trained[f"{stage}.{name}.B"].float()
    mine = load_file(folder / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    expected = value[:40, :32].to(torch.bfloat16)
    assert (mine == expected).float().mean() > 0.999  # sums in another order may round apart
    torch.testing.assert_close(mine, expected, rtol=2**-7, atol=0)


# ---------------------------------------------------------------- phases


@pytest.mark.parametrize("case", ["llama", "llama-biases", "llama-tied", "llama-whole", "qwen3", "bert", "bert-whole"])
def test_merging_changes_no_output(case: str, grid: Grid, bases: Callable) -> None:
    net = make_net(bases(case), grid, CASES[case][2])
    specs = [ALONE["full"], *specs_of(case)[-2:]]
    before = [net.logits(spec) for spec in specs]
    frozen = {name: module.weight.clone() for name, module in net.stage.elastic.items()}
    for index in (0, 1, 1):
        for module in net.stage.elastic.values():
            module.merge(index)
        for spec, expected in zip(specs, before, strict=True):
            apart = (net.logits(spec) - expected).abs().max() / expected.abs().max()
            assert apart < 2e-6, (index, spec)
        with net.stage.teaching(0):
            torch.testing.assert_close(net.run(), hand_cut(net, ALONE["full"], index + 1), atol=TOLERANCE, rtol=1e-5)
    changed = {name for name, module in net.stage.elastic.items() if not torch.equal(module.weight, frozen[name])}
    assert changed == {name.split(".", 1)[1].rsplit(".", 1)[0] for name in net.trained if not name.endswith(".bias")}


@pytest.mark.parametrize("case", ["llama", "qwen3", "bert"])
def test_the_teacher_is_the_full_net_of_the_first_phases(case: str, nets: Callable) -> None:
    net, spec = nets(case), specs_of(case)[-1]
    inside = net.logits(spec)
    for phases in (0, 1, 2):
        with net.stage.teaching(phases):
            taught = net.run()
        torch.testing.assert_close(taught, hand_cut(net, ALONE["full"], phases), atol=TOLERANCE, rtol=TOLERANCE)
        assert torch.equal(net.run(), inside)  # the subnet is back, with all phases
    with pytest.raises(ZeroDivisionError), net.stage.teaching(0):
        _ = 1 / 0
    assert torch.equal(net.run(), inside)


def test_modernbert_keeps_its_first_layer(nets: Callable, tmp_path: Path) -> None:
    """It has no norm in front of its attention: another layer in its place would lose one."""
    net = nets("modernbert")
    with pytest.raises(UserError, match="h64-g4-f128-l2: without layer 0 no 'modernbert' computes what the subnet"):
        net.extracted(SubnetSpec(64, 4, 128, (1, 3)))
    assert drop_order([1.0, 3.0, 2.0, 4.0], 2, first_stays=True) == [2, 1, 3, 0]
    net.order.save(tmp_path / "order")
    UnitOrder.load(tmp_path / "order", net.map.shape)
    replace(net.order, drop=torch.tensor([0, 1, 2, 3])).save(tmp_path / "order")
    with pytest.raises(UserError, match="'drop' ends with layer 3; this model cannot lose layer 0"):
        UnitOrder.load(tmp_path / "order", net.map.shape)


# ---------------------------------------------------------------- base folders of other shapes


ROBERTA_HEADS = {"classifier.dense", "classifier.out_proj"}
MASKED_LM, BARE = AutoModelForMaskedLM.from_config, AutoModel.from_config
# what a folder is saved from, and what a classifier of it lacks
BARE_ENCODERS = {
    "bert": ("bert", BARE, {"classifier"}),
    "bert-no-pooler": ("bert", partial(BARE, add_pooling_layer=False), {"classifier", "bert.pooler.dense"}),
    "roberta": ("roberta", BARE, ROBERTA_HEADS),
    "roberta-masked-lm": ("roberta", MASKED_LM, ROBERTA_HEADS),
    "modernbert": ("modernbert", BARE, {"classifier", "head.dense", "head.norm"}),
    "modernbert-masked-lm": ("modernbert", MASKED_LM, {"classifier"}),
}


@pytest.mark.parametrize("name", BARE_ENCODERS)
def test_a_bare_encoder_gets_a_new_classifier(name: str, grid: Grid, tmp_path: Path) -> None:
    family, make, fresh = BARE_ENCODERS[name]
    torch.manual_seed(2)
    bare = make(encoder_config(family))
    bare.save_pretrained(tmp_path / "base")
    net = make_net(tmp_path / "base", grid, (FactorsConfig(["attention"], vectors=False), 2), noise=0.0)
    assert net.stage.new == fresh
    whole = {name.split(".", 1)[1] for name in net.trained if name.endswith((".weight", ".bias"))}
    assert whole == {f"{name}.{leaf}" for name in fresh for leaf, _ in net.stage.elastic[name].named_parameters()}
    for module in fresh:  # random at first; the second phase starts where the first one ended
        weight = net.trained[f"0.{module}.weight"]
        if weight.dim() == 2:
            assert weight.std() == pytest.approx(0.02, rel=0.2)
        else:  # a norm begins by doing nothing
            assert torch.equal(net.stage.elastic[module].weight + weight, torch.ones(64))
        assert not net.trained.get(f"0.{module}.bias", torch.zeros(1)).any()
        assert not net.trained[f"1.{module}.weight"].any()
    again = make_net(tmp_path / "base", grid, (FactorsConfig(["attention"], vectors=False), 2), noise=0.0)
    assert all(torch.equal(value, again.trained[name]) for name, value in net.trained.items())
    # Behind the new head: the base model's own states.
    data = inputs(family)
    net.stage.select(ALONE["full"])
    expected: list[torch.Tensor] = []
    last = bare.base_model.get_submodule(f"{net.map.family.layers}.3")
    last.register_forward_hook(lambda _, __, output: expected.append(output[..., net.order.hidden]))
    with torch.no_grad():
        _, states = net.stage(data["input_ids"], data, features=True)
        bare.eval()(**data)
    torch.testing.assert_close(states[3], *expected, atol=TOLERANCE, rtol=TOLERANCE)
    for name, value in net.trained.items():
        value.add_(start_noise(name, value.shape))
    spec = SubnetSpec(32, 2, 40, (0, 3))
    stock, info = AUTO_CLASS["classify"].from_pretrained(net.write(tmp_path / "small", spec), output_loading_info=True)
    assert not any(info.values())
    torch.testing.assert_close(stock_logits(stock.eval()), net.logits(spec), atol=TOLERANCE, rtol=TOLERANCE)


def rename(folder: Path, change: Callable[[str], str | None]) -> None:
    """Rename tensors of a folder; None: leave out."""
    tensors = {change(name): value for name, value in load_file(folder / "model.safetensors").items()}
    tensors.pop(None, None)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_old_names_of_norms(grid: Grid, bases: Callable, tmp_path: Path) -> None:
    """bert-base-uncased has LayerNorm.gamma and LayerNorm.beta."""
    old = write_base(tmp_path / "old", SupernetJob("bert"))
    names = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}

    def rename_one(name: str) -> str:
        end = ".".join(name.split(".")[-2:])
        return name.removesuffix(end) + names.get(end, end)

    rename(old, rename_one)
    net, expected = make_net(old, grid, BODY), make_net(bases("bert"), grid, BODY)
    spec = SubnetSpec(32, 2, 40, (1, 3))
    assert torch.equal(net.logits(spec), expected.logits(spec))
    torch.testing.assert_close(stock_logits(net.extracted(spec)), net.logits(spec), atol=TOLERANCE, rtol=TOLERANCE)


def test_a_bare_decoder(grid: Grid, bases: Callable, tmp_path: Path) -> None:
    """LlamaModel's own folder: no prefix, no output matrix of its own."""
    LlamaModel.from_pretrained(bases("llama-tied")).save_pretrained(tmp_path / "bare")
    assert "embed_tokens.weight" in load_file(tmp_path / "bare" / "model.safetensors")
    net, expected = make_net(tmp_path / "bare", grid, BODY), make_net(bases("llama-tied"), grid, BODY)
    spec = SubnetSpec(32, 2, 40, (1, 3))
    assert torch.equal(net.logits(spec), expected.logits(spec))
    torch.testing.assert_close(stock_logits(net.extracted(spec)), net.logits(spec), atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("llama", "model.layers.2.mlp.up_proj.weight"),
        ("llama", "lm_head.weight"),  # untied: the embedding is no substitute
        ("qwen2", "model.layers.0.self_attn.k_proj.bias"),
        ("bert", "bert.encoder.layer.3.output.LayerNorm.weight"),
    ],
)
def test_a_missing_or_misshapen_tensor_is_named(family: str, name: str, grid: Grid, tmp_path: Path) -> None:
    def base(folder: str) -> Path:
        if family == "bert":
            return write_base(tmp_path / folder, SupernetJob("bert"))
        return write_model(tmp_path / folder, family, num_hidden_layers=4)

    gone, wrong = base("gone"), base("wrong")
    rename(gone, lambda each: None if each == name else each)
    with pytest.raises(UserError, match=f"no tensor '{name}'"):
        make_net(gone, grid, BODY)
    tensors = load_file(wrong / "model.safetensors")
    shape = list(tensors[name].shape)
    tensors[name] = tensors[name][:-1].clone()
    save_file(tensors, wrong / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError) as error:
        make_net(wrong, grid, BODY)
    assert f"'{name}' has shape {[shape[0] - 1, *shape[1:]]}, but the config asks for {shape}" in str(error.value)


def test_any_single_layer_is_a_model(nets: Callable) -> None:
    """Its number in the names is the subnet's, its type of attention the base's."""
    net = nets("qwen3")
    for layer in EVERY:
        spec = SubnetSpec(64, 4, 128, (layer,))
        stock = net.extracted(spec)
        assert stock.config.layer_types == [net.map.config.layer_types[layer]]
        torch.testing.assert_close(stock_logits(stock), net.logits(spec), atol=TOLERANCE, rtol=TOLERANCE)


def test_what_is_copied_is_true_in_the_copy(grid: Grid, tmp_path: Path) -> None:
    """The base's generation settings too, which transformers' own saving would replace by its defaults."""
    base = clutter(write_model(tmp_path / "base", "llama", num_hidden_layers=4))
    make_net(base, grid, BODY).write(tmp_path / "subnet", ALONE["depth"])
    check_copy(tmp_path / "subnet", base, {"model.safetensors", "README.md"})
