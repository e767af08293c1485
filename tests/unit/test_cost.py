"""What a run costs, against what torch counts on the real modules; schedules replayed against hand-made ones."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from deepspeed.runtime.pipe.schedule import TrainSchedule
from helpers.models import SHORTLIST, VOCAB, some_tokens, tiny_config
from helpers.supernet import encoder_config
from megatron.core.tensor_parallel import layers as megatron_layers
from megatron.core.tensor_parallel import mappings
from replay import Op, operations, replay
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, BertConfig

from ee_scale.backbone.parallel import swap_projections
from ee_scale.backbone.shard import tensor_plan
from ee_scale.config.compose import compose_config
from ee_scale.elastic.factors import FactorSet
from ee_scale.elastic.stage import ElasticStage
from ee_scale.engine.schedule import FrozenSchedule, SupernetSchedule
from ee_scale.errors import UserError
from ee_scale.exits.joint import JointStage, output_copies
from ee_scale.exits.stage import build_stage
from ee_scale.modeling.heads import HEADS, ExitTaps, build_exit_heads, run_single_layer
from ee_scale.modeling.kinds import KINDS, Tap
from ee_scale.planning.exit_costs import exit_passes
from ee_scale.planning.fits import check_fits
from ee_scale.planning.passes import LiveBytes, layer_call, layer_passes, local_model, watch
from ee_scale.planning.phase_costs import drawn_specs, phase_parameters, phase_work
from ee_scale.planning.supernet import SupernetPlan, plan_supernet
from ee_scale.planning.tune import TunePlan, plan_tune

ROWS, LENGTH = 2, 16
TUNE = ["model=tiny", "data=python", f"data.seq_length={LENGTH}", f"train.micro_batch_size={ROWS}"]
TUNE += ["train.global_batch_size=8", "exits.layers=[2,4]", "exits.rank=4", f"exits.shortlist={SHORTLIST}"]


def tune_plan(family: str = "llama", *overrides: str, **changes: Any) -> TunePlan:
    config = compose_config("tune", [*TUNE, *overrides])
    plan = plan_tune(config, Path("nowhere"), tiny_config(family, **changes))
    # Costs follow from the number of tokens alone; the modules they are compared with want the tokens.
    return replace(plan, spec=replace(plan.spec, shortlist_ids=tuple(some_tokens(plan.spec.shortlist))))


def supernet_plan(model_config: Any, *overrides: str) -> SupernetPlan:
    arguments = ["model=tiny", "data=python", f"data.seq_length={LENGTH}", f"train.micro_batch_size={ROWS}"]
    space = "space={hidden: [64, 32], ffn: [128, 64], depth: [4, 2]}"
    stages = "stages=[{name: a, axes: [], steps: 1, rank: 4}, {name: b, axes: [hidden, ffn, depth], steps: 3, rank: 2}]"
    config = compose_config("supernet", [*arguments, space, stages, "train.global_batch_size=8", *overrides])
    return plan_supernet(config, Path("nowhere"), model_config, ["a", "b"] if "bert" in model_config.model_type else [])


class Group:
    """A tensor group of which this process plays the first rank."""

    def __init__(self, size: int):
        self._size = size

    def size(self) -> int:
        return self._size

    def rank(self) -> int:
        return 0


def grid_of(plan: Any, stage: int, device: str = "cpu") -> Any:
    group = Group(plan.layout.tp)
    return SimpleNamespace(stage=stage, layout=plan.layout, device=torch.device(device), tp_group=group, tp_rank=0)


@pytest.fixture
def groups_without_processes():
    """Megatron takes a group's word for its size, though no process group is there."""
    size = mock.patch.object(megatron_layers, "get_pg_size", lambda group=None: 1 if group is None else group.size())
    name, same = "get_tensor_model_parallel_group_if_none", lambda group, **_: group
    rank = mock.patch.object(megatron_layers, "get_pg_rank", return_value=0)
    with size, rank, mock.patch.object(mappings, name, same), mock.patch.object(megatron_layers, name, same):
        yield


def numel(parameters: Any) -> int:
    return sum(parameter.numel() for parameter in {id(p): p for p in parameters}.values())


# -- parameters --------------------------------------------------------------------------------------------------------

CASES = [(kind, head) for kind in KINDS for head in HEADS if (kind, head) != ("embedding", "tied")]


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma2"])
def test_parameters_are_those_of_the_real_stages(groups_without_processes, family: str, tied: bool, tp: int) -> None:
    for number, (kind, head) in enumerate(CASES):
        teacher = number % 2 == 0
        overrides = [f"exits.kind={kind}", f"exits.head={head}", f"parallel.tp={tp}", "parallel.pp=2"]
        plan = tune_plan(
            family, *overrides, f"exits.kl_weight={0.5 * teacher}", tie_word_embeddings=tied, vocab_size=131
        )
        for stage in range(plan.stages.launched):
            real = build_stage(
                plan.model_config, plan.stages, plan.spec, grid_of(plan, stage), torch.float32, teacher=teacher
            )
            found = plan.parameters(stage)
            assert found.trained == numel(real.exit_heads.parameters()), (kind, head, stage)
            assert found.frozen == numel(real.backbone.parameters()), (kind, head, stage)
            assert found.largest == max((p.numel() for p in real.exit_heads.parameters()), default=0)


GATHERING = ("olmo2", "glm4", "phi3")  # attention, the MLP, both


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("family", GATHERING)
def test_parameters_of_gathered_projections(groups_without_processes, family: str, tp: int) -> None:
    for kind in ("mlp", "layer"):
        plan = tune_plan(family, f"exits.kind={kind}", f"parallel.tp={tp}")
        real = build_stage(plan.model_config, plan.stages, plan.spec, grid_of(plan, 0), torch.float32)
        found = plan.parameters(0)
        assert found.frozen == numel(real.backbone.parameters())
        assert found.trained == numel(real.exit_heads.parameters())


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("mode", ["low_rank", "full"])
def test_joint_parameters_are_those_of_the_real_stages(
    groups_without_processes, mode: str, tied: bool, tp: int
) -> None:
    for kind, head in (("mlp", "low_rank"), ("norm", "full"), ("norm", "shortlist")):
        overrides = [f"exits.kind={kind}", f"exits.head={head}", f"parallel.tp={tp}", "parallel.pp=2"]
        plan = tune_plan("qwen2", *overrides, f"backbone={mode}", tie_word_embeddings=tied)
        copies = output_copies(plan.stages, plan.spec, tied)
        for stage in range(2):
            grid = grid_of(plan, stage)
            real = build_stage(
                plan.model_config, plan.stages, plan.spec, grid, torch.float32, own_logits=True, cls=JointStage
            )
            real.train_backbone(plan.backbone, copies, grid, 0)
            found = plan.parameters(stage)
            assert found.trained == numel(real.parameters())
            assert found.held == numel([*real.parameters(), *real.backbone.parameters()])
            assert found.largest == max(p.numel() for p in real.parameters())
            if mode == "low_rank" and tp == 1:
                adapters = numel(real.trained.values())
                assert plan._adapter_parameters * len(plan.stages.layers(stage)) == adapters


def bert(**changes: Any) -> BertConfig:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
    return BertConfig(vocab_size=131, max_position_embeddings=64, **(sizes | changes))


def elastic_stage(plan: SupernetPlan, stage: int, device: str = "meta") -> tuple[ElasticStage, list[FactorSet]]:
    real = ElasticStage(plan.map, plan.stages, grid_of(plan, stage, device), torch.float32, "eager")
    plans = [plan.factors(i) for i in range(len(plan.phases))]
    return real, [FactorSet(real, factors, i, 0) for i, factors in enumerate(plans)]


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize(
    "make",
    [
        lambda: tiny_config("llama", num_hidden_layers=4, tie_word_embeddings=True),
        bert,
        lambda: encoder_config("modernbert", classifier_bias=True),
    ],
)
@pytest.mark.parametrize("rank", [2, 0])
def test_supernet_parameters_are_those_of_the_real_stages(make: Any, tp: int, rank: int) -> None:
    stages = f"stages=[{{name: a, axes: [], steps: 1, rank: {rank}}}, {{name: b, axes: [hidden], steps: 3, rank: 3}}]"
    plan = supernet_plan(make(), f"parallel.tp={tp}", "parallel.pp=2", stages)
    for stage in range(2):
        real, factors = elastic_stage(plan, stage)
        backbone = numel(p for module in real.elastic.values() for p in module.parameters())
        for index in range(2):
            found = phase_parameters(plan, index, stage)
            assert found.trained == numel(factors[index].parameters())
            assert found.frozen == backbone + sum(numel(f.parameters()) for f in factors[:index])
            assert found.largest == max(p.numel() for p in factors[index].parameters())


# -- FLOPs -------------------------------------------------------------------------------------------------------------


def count_flops(work: Any) -> int:
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def eager_model(family: str) -> nn.Module:
    return AutoModelForCausalLM.from_config(
        tiny_config(family), dtype=torch.float32, attn_implementation="eager"
    ).eval()


def exit_losses(plan: TunePlan, model: nn.Module, taps: dict[int, Tap], heads: nn.ModuleDict) -> torch.Tensor:
    """Losses of all exits, as plain torch computes them."""
    total = torch.zeros(())
    for k, head in heads.items():
        layer = model.model.layers[int(k) - 1]
        output_norm = getattr(layer, plan.spec.mlp_output_norm) if plan.spec.mlp_output_norm else None
        hidden = head.hidden(taps[int(k)], output_norm, lambda own, x: run_single_layer(model.model, own, x))
        total = total + head.logits(hidden, model.lm_head).sum()
    return total


FLOP_CASES = [("llama", *case) for case in CASES] + [("olmo2", "mlp", "tied"), ("olmo2", "layer", "low_rank")]


@pytest.mark.parametrize(("family", "kind", "head"), FLOP_CASES)
def test_frozen_flops_are_those_that_torch_counts(family: str, kind: str, head: str) -> None:
    plan = tune_plan(family, f"exits.kind={kind}", f"exits.head={head}")
    model = eager_model(family).requires_grad_(False)
    heads = build_exit_heads(plan.spec, model.model.layers, model.model.norm, plan.shape.vocab_size)
    heads.requires_grad_(True)
    tokens = torch.zeros(ROWS, LENGTH, dtype=torch.long)
    x = torch.randn(ROWS, LENGTH, plan.shape.hidden_size)
    taps = {k: Tap(x, x if kind == "mlp" else None) for k in plan.spec.layers}
    exits = count_flops(lambda: exit_losses(plan, model, taps, heads).backward())
    model.model.config.num_hidden_layers = plan.stages.depth
    model.model.layers = model.model.layers[: plan.stages.depth]
    forward = count_flops(lambda: model.model(tokens, use_cache=False))
    (work,) = plan.work()
    assert work.forward * ROWS * LENGTH == forward
    assert work.exits * ROWS * LENGTH == exits
    assert work.backward == work.teacher == 0


JOINT_CASES = [("mlp", "full"), ("layer", "low_rank"), ("embedding", "low_rank"), ("norm", "shortlist")]


@pytest.mark.parametrize(("kind", "head"), JOINT_CASES)
def test_joint_flops_are_those_that_torch_counts(kind: str, head: str) -> None:
    plan = tune_plan("llama", f"exits.kind={kind}", f"exits.head={head}", "backbone=full")
    model = eager_model("llama")
    heads = build_exit_heads(plan.spec, model.model.layers, model.model.norm, plan.shape.vocab_size)
    taps = ExitTaps(plan.spec, {k: model.model.layers[k - 1] for k in plan.spec.layers})

    def step() -> None:
        logits = model(torch.zeros(ROWS, LENGTH, dtype=torch.long), use_cache=False).logits
        (logits.sum() + exit_losses(plan, model, taps.pop(), heads)).backward()

    counted = count_flops(step)
    (work,) = plan.work()
    assert work.total * ROWS * LENGTH == counted
    again = tune_plan(
        "llama", f"exits.kind={kind}", f"exits.head={head}", "backbone=full", "backbone.activation_checkpointing=true"
    )
    assert again.work()[0].total - work.total == work.forward


@pytest.mark.parametrize(("head", "words"), [("tied", VOCAB), ("shortlist", SHORTLIST)])
def test_teacher_and_confidence_cost_a_pass_of_the_head(head: str, words: int) -> None:
    more = ["exits.kl_weight=1", "exits.confidence_weighting=true"]
    plain, both = tune_plan("llama", f"exits.head={head}"), tune_plan("llama", f"exits.head={head}", *more)
    once = 2 * words * plain.shape.hidden_size
    extra = both.work()[0].exits - plain.work()[0].exits
    assert extra == 2 * once * 2  # two exits, two passes each


def test_stages_share_the_work() -> None:
    one, several = tune_plan(), tune_plan("llama", "parallel.pp=2")
    assert len(several.work()) == 2
    assert several.flops_per_token == one.work()[0].total
    longer = several.with_config(replace(several.config, data=replace(several.config.data, seq_length=2 * LENGTH)))
    assert longer.flops_per_token > several.flops_per_token  # attention to more positions


@pytest.mark.parametrize("make", [lambda: tiny_config("llama", num_hidden_layers=4), bert])
@pytest.mark.parametrize("rank", [2, 0])
def test_supernet_flops_are_those_that_torch_counts(groups_without_processes, make: Any, rank: int) -> None:
    """The full net's draw alone, through the real elastic modules; their losses are left out."""
    stages = f"stages=[{{name: a, axes: [], steps: 1, rank: {rank}}}]"
    plan = supernet_plan(make(), stages, "factors.targets=[attention,mlp,head,embeddings]")
    stage, _ = elastic_stage(plan, 0, "cpu")
    for spec in (plan.map.shape.full, plan.space(_identity(plan)).smallest()):
        stage.select(spec)
        stage.active.phases = 1
        batch = {"tokens": torch.zeros(ROWS, LENGTH, dtype=torch.long)}
        if plan.task == "classify":
            batch |= {"attention_mask": torch.ones_like(batch["tokens"]), "token_type_ids": batch["tokens"]}
        with mock.patch("ee_scale.planning.phase_costs.drawn_specs", lambda *_, spec=spec: [(spec, 1.0)]):
            (work,) = phase_work(plan, 0)

        def step(batch: Any = batch) -> None:
            hidden, _ = stage(batch["tokens"], batch)
            stage.head(hidden).sum().backward()

        embeddings = _embedding_factor_flops(plan, spec, rank)
        counted = count_flops(step) / (ROWS * LENGTH)
        assert work.total == pytest.approx(counted - embeddings, rel=1e-9)


def _identity(plan: SupernetPlan) -> Any:
    from ee_scale.elastic.order import UnitOrder

    return UnitOrder.identity(plan.map.shape)


def _embedding_factor_flops(plan: SupernetPlan, spec: Any, rank: int) -> float:
    """Looked up rows times their second factor: forward, and both gradients."""
    return 3 * 2 * rank * spec.hidden


def test_draws_of_a_phase() -> None:
    plan = supernet_plan(tiny_config("llama", num_hidden_layers=4), "recipe=paper")
    specs = drawn_specs(plan, 1)
    assert sum(times for _, times in specs) == pytest.approx(4)
    assert next(times for spec, times in specs if spec == plan.map.shape.full) == 1
    assert [times for _, times in drawn_specs(plan, 0)] == [1]
    mean = plan.work()[0].total
    first, second = (plan.phase_flops(i) for i in (0, 1))
    assert mean == pytest.approx(0.25 * first + 0.75 * second)
    assert 2 * first < second < 4 * first


# -- memory ------------------------------------------------------------------------------------------------------------


def saved_bytes(family: str, dtype: torch.dtype) -> int:
    """What autograd keeps of one real layer beside its input, its parameters and the rotary tables; with its output."""
    config = tiny_config(family, num_hidden_layers=1)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    x = torch.zeros(ROWS, LENGTH, config.hidden_size, dtype=dtype, requires_grad=True)
    positions = torch.arange(LENGTH)[None]
    rotary = model.model.rotary_emb(x, positions)
    ignored = {t.untyped_storage()._cdata for t in (*model.parameters(), x, *rotary)}
    seen: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        seen[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model.model.layers[0](x, position_embeddings=rotary, attention_mask=None, position_ids=positions)
    kept = sum(t.untyped_storage().nbytes() for key, t in seen.items() if key not in ignored)
    return kept + out.nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "olmo2"])
def test_activations_of_a_layer_are_what_autograd_keeps(family: str, dtype: torch.dtype) -> None:
    local = local_model(tiny_config(family), 1, dtype)
    layer, call = layer_call(local, ROWS, LENGTH)
    x = torch.empty(ROWS, LENGTH, local.config.hidden_size, dtype=dtype, device="meta")
    assert watch(call, layer, x, needs=True).kept == saved_bytes(family, dtype)


def test_frozen_layers_keep_nothing_and_adapters_less_than_all() -> None:
    local = local_model(tiny_config("llama"), 1, torch.float32)
    full = layer_passes(local, ROWS, LENGTH, None, 0)
    pairs = layer_passes(local, ROWS, LENGTH, ("self_attn.",), 4)
    state = ROWS * LENGTH * 64 * 4
    assert state < full.forward < full.kept + full.working
    assert state < pairs.kept < full.kept
    # Nothing of one question is left for the next.
    assert layer_passes(local, ROWS, LENGTH, None, 0) == full
    assert local_model(tiny_config("llama"), 2, torch.float32).model.layers[0].mlp.up_proj.weight.shape == (64, 64)


def test_live_bytes_sees_the_peak() -> None:
    with LiveBytes() as live:
        a = torch.empty(1000, device="meta")
        b = a + 1
        view = b.view(10, 100)
        del a, b
        c = torch.empty(500, device="meta")
    assert live.peak == 8000
    assert live.now == view.untyped_storage().nbytes() + c.nbytes == 6000


def test_memory_follows_the_grid() -> None:
    one = tune_plan("llama", "parallel.device=cpu")
    memory = one.memory(bf16=False, device="cpu")[0]
    parameters = one.parameters(0)
    assert memory.weights == 4 * parameters.held
    assert (memory.gradients, memory.optimizer) == (4 * parameters.trained, 12 * parameters.trained)
    replicas = tune_plan("llama", "parallel.dp=4").memory(bf16=True)[0]
    assert (replicas.weights, replicas.optimizer) == (2 * parameters.held, 3 * parameters.trained)
    assert replicas.gradients == memory.gradients
    body = exit_passes(local_model(one.model_config, 1, torch.float32), one.spec, ROWS, LENGTH, through=False)
    assert memory.activations > body.kept


def test_a_run_that_cannot_fit_is_refused_with_what_would() -> None:
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "head_dim": 64}
    plan = tune_plan("llama", "parallel.device=cpu", **sizes)
    needed = max(m.total for m in plan.memory(bf16=False, device="cpu")) / 2**30
    plan.config.parallel.device_memory_gb = needed * 1.001
    check_fits(plan)
    plan.config.parallel.device_memory_gb = needed * 0.999
    with pytest.raises(UserError, match=r"a rank of stage 0 needs .* and the device has .*: parallel.tp=2 would need"):
        check_fits(plan)
    halved = max(m.total for m in tune_plan("llama", "parallel.tp=2", **sizes).memory(bf16=False, device="cpu"))
    plan.config.parallel.device_memory_gb = halved / 2**30 - 1e-4
    with pytest.raises(UserError) as refused:
        check_fits(plan)
    assert "parallel.tp=2 " not in str(refused.value)
    assert "would need" in str(refused.value)
    plan.config.parallel.device_memory_gb = 0.1
    with pytest.raises(UserError, match="no small change"):
        check_fits(plan)


# -- traffic -----------------------------------------------------------------------------------------------------------


def test_traffic_by_hand() -> None:
    plan = tune_plan("llama", "parallel.pp=2", "parallel.tp=2", "parallel.dp=2", "exits.head=tied")
    state = ROWS * LENGTH * 64 * 4
    first, last = plan.traffic(bf16=False)
    assert (first.stages, last.stages) == (2 * state, 0)  # two micro-batches, nothing comes back
    layers, exits = len(plan.stages.layers(0)), len(plan.stages.exits(0))
    calls = 2 * (2 * layers + 2 * exits + 1)  # exits: MLP forward and head backward; the embedding once
    assert first.tensor_calls == calls
    assert first.tensor == calls * state  # a ring over two: each rank sends half twice
    trained = plan.parameters(0).trained
    assert (first.reduce, first.gather) == (2 * trained, 2 * trained)
    assert plan.traffic(bf16=True)[0].reduce == 4 * trained


@pytest.mark.parametrize("family", ["llama", *GATHERING])
def test_traffic_of_a_layer_is_what_its_collectives_send(groups_without_processes, family: str) -> None:
    """One layer of a stage, its collectives replaced by ones that count, against the plan of one layer more."""
    few, more = (
        tune_plan(family, "parallel.tp=2", "backbone=full", "exits.layers=[1]", "exits.kind=norm", num_hidden_layers=n)
        for n in (2, 3)
    )
    sent, group = [], Group(2)
    layer, call = layer_call(local_model(few.model_config, 1, torch.float32, "eager"), ROWS, LENGTH)
    with torch.device("meta"):
        swap_projections(layer, tensor_plan(few.model_config, 2), "", group, torch.float32)

    def reduce(tensor: torch.Tensor, **_: Any) -> mock.Mock:
        sent.append(tensor.nbytes)
        return mock.Mock()  # with a `wait`

    def gather(parts: list[torch.Tensor], part: torch.Tensor, **_: Any) -> None:
        sent.append(part.nbytes)

    with mock.patch("torch.distributed.all_reduce", reduce), mock.patch("torch.distributed.all_gather", gather):
        out = call(torch.empty(ROWS, LENGTH, 64, device="meta", requires_grad=True))
        out.backward(torch.empty_like(out))
    (before,), (after,) = few.traffic(bf16=False), more.traffic(bf16=False)
    count = few.num_micro_batches
    assert after.tensor_calls - before.tensor_calls == count * len(sent)
    assert after.tensor - before.tensor == count * sum(sent)  # a ring over two: half, twice; or its half


def test_copies_of_the_output_matrix_are_summed_over_their_stages() -> None:
    given = ("parallel.pp=4", "exits.head=tied", "backbone=full", "exits.layers=[2]")
    plan = tune_plan("llama", *given, tie_word_embeddings=True)
    state, matrix = ROWS * LENGTH * 64 * 4, VOCAB * 64 * 4
    holders = {stage for stage in range(4) if 2 in plan.stages.exits(stage)} | {0, 3}
    count = plan.num_micro_batches
    for stage, traffic in enumerate(plan.traffic(bf16=False)):
        crossing = count * state * ((stage < 3) + (stage > 0))
        copies = 2 * matrix * (len(holders) - 1) / len(holders) if stage in holders else 0
        assert traffic.stages == pytest.approx(crossing + copies)


# -- schedules ---------------------------------------------------------------------------------------------------------


def run(schedule: Any, stages: int, times: dict[str, float], steps: int = 1, **options: Any) -> Any:
    def seconds(stage: int, name: str, index: int) -> float:
        value = times.get(name, 0.0)
        return value[stage] if isinstance(value, list) else value

    return replay(
        [
            [op for _ in range(steps) for op in operations(schedule(stage).steps(), stage, stages, seconds)]
            for stage in range(stages)
        ],
        **options,
    )


@pytest.mark.parametrize("rendezvous", [False, True])
@pytest.mark.parametrize(("stages", "count"), [(2, 4), (4, 8), (4, 2)])
def test_1f1b_has_the_bubble_of_the_formula(stages: int, count: int, rendezvous: bool) -> None:
    times = {"ForwardPass": 1.0, "BackwardPass": 2.0}
    found = run(lambda s: TrainSchedule(count, stages, s), stages, times, rendezvous=rendezvous)
    assert found.marks[0] == [3 * (count + stages - 1)]
    assert found.idle()[0] == pytest.approx((stages - 1) / (count + stages - 1))


@pytest.mark.parametrize("rendezvous", [False, True])
def test_frozen_stages_run_ahead(rendezvous: bool) -> None:
    times = {"ForwardPass": 1.0, "TrainExits": 2.0, "OptimizerStep": 0.5}
    found = run(lambda s: FrozenSchedule(2, 3, s, has_exits=True), 3, times, steps=5, rendezvous=rendezvous)
    assert found.step_seconds(2) == pytest.approx(6.5)
    assert found.idle(2) == pytest.approx([0, 0, 0])
    # The first step ends one forward later on each stage: the only time that anybody waits.
    assert [ends[0] for ends in found.marks] == [6.5, 7.5, 8.5]


def test_the_slowest_stage_sets_the_pace() -> None:
    times = {"ForwardPass": [1.0, 3.0], "TrainExits": 1.0}
    found = run(lambda s: FrozenSchedule(2, 2, s, has_exits=True), 2, times, steps=6, rendezvous=True)
    assert found.step_seconds(2) == pytest.approx(8)
    assert found.idle(2)[1] == pytest.approx(0)
    # A sender waits for the receiver, so the fast stage is not further ahead than one message.
    assert found.marks[0][-1] >= found.marks[1][-2]


def test_a_teacher_makes_the_stages_wait() -> None:
    times = {"ForwardPass": 1.0, "TrainExits": 1.0, "ShareFinalHidden": 0.25}
    found = run(lambda s: FrozenSchedule(2, 2, s, has_exits=True, share_final=True), 2, times)
    # The last stage has its second forward at 3; then twice a broadcast and the exits.
    assert found.marks == [[3 + 2 * 1.25], [3 + 2 * 1.25]]


def test_a_supernet_is_one_stream() -> None:
    times = {"Teach": 1.0, "ForwardPass": 1.0, "BackwardPass": 2.0}
    found = run(lambda s: SupernetSchedule(4, 2, s, teachers=[0, 1]), 2, times)
    assert found.marks[1][0] == found.marks[0][0] - 2  # stage 0 has the last backward
    assert found.marks[0] == [2 + 3 * (4 + 1)]


def test_messages_take_time_and_cores_are_shared() -> None:
    times = {"ForwardPass": 1.0, "TrainExits": 2.0, "SendActivation": 0.5}
    assert run(lambda s: FrozenSchedule(1, 2, s, has_exits=True), 2, times).marks == [[3.5], [4.5]]
    ops = [[Op("compute", 2.0), Op("mark")], [Op("compute", 1.0), Op("mark")]]
    assert replay(ops).marks == [[2.0], [1.0]]
    assert replay(ops, cores=1).marks == [[3.0], [2.0]]  # both at half speed until the short one is done
    assert replay(ops, cores=2, ranks=2).marks == [[3.0], [2.0]]  # two ranks each, on two cores


def test_who_waits_for_each_other_is_told() -> None:
    ops = [[Op("recv", peer=1, channel="a")], [Op("recv", peer=0, channel="a")]]
    with pytest.raises(RuntimeError, match="all stages wait"):
        replay(ops)
