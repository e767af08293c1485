"""A model is taken because it was tried, and each try notices what is broken."""

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.models import MIXTURES, tiny_config, write_model
from transformers import GPT2Config, PreTrainedConfig
from transformers.models.llama import modeling_llama

from ee_scale.backbone import proof, proof_checks, shard, stacked
from ee_scale.backbone.experts import CUTS
from ee_scale.backbone.proof import check_decoding_proof, check_tensor_proof, prove
from ee_scale.backbone.stacked import StackedExperts, StackedLinear
from ee_scale.cli.main import main
from ee_scale.errors import UserError
from ee_scale.exits.placement import exit_spec
from ee_scale.families.build import meta_model
from ee_scale.families.decoders import DECODERS
from ee_scale.families.family import Family
from ee_scale.families.registry import FAMILIES
from ee_scale.families.sizes import PER_LAYER, ModelShape
from ee_scale.modeling import heads
from ee_scale.modeling.kinds import Mlp
from ee_scale.modeling.layer_runner import LayerRunner


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """Neither this process nor the disk has seen a proof."""
    monkeypatch.setattr(proof, "_known", {})
    monkeypatch.setenv("EE_SCALE_CACHE", str(tmp_path))


def with_plan(config: PreTrainedConfig, **changes: str | None) -> PreTrainedConfig:
    """Another tensor-parallel plan: style by module, None: it says nothing of it."""
    config = copy.deepcopy(config)
    plan = dict(config.base_model_tp_plan)
    for name, style in changes.items():
        place = "layers.*." + name.replace("__", ".")
        plan = {key: value for key, value in plan.items() if key != place}
        if style is not None:
            plan[place] = style
    config.base_model_tp_plan = plan
    return config


def refusal(config: PreTrainedConfig) -> str:
    with pytest.raises(UserError) as caught:
        prove(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("family", DECODERS, ids=lambda family: family.name)
def test_known_families_are_proved(family: Family) -> None:
    config = tiny_config(family.name)
    before, random = json.dumps(config.to_dict(), sort_keys=True, default=str), torch.get_rng_state()
    found = prove(config)
    assert (found.tensor, found.decoding) == ("", "")
    kinds = [values for name in PER_LAYER if (values := getattr(config, name, None)) is not None]
    if family.name in MIXTURES:
        kinds.append([i in getattr(config, "mlp_only_layers", []) for i in range(config.num_hidden_layers)])
    assert found.layers == 2 * max(1, len(set(zip(*kinds, strict=True))))
    assert json.dumps(config.to_dict(), sort_keys=True, default=str) == before
    assert torch.equal(torch.get_rng_state(), random)  # nobody else's random numbers are drawn


# -- what is broken on purpose ----------------------------------------------------------------------------------------


def test_stages_that_mistake_their_layers_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second stage reads the types of the first one's layers."""
    cut = shard.with_layers
    monkeypatch.setattr(shard, "with_layers", lambda config, kept: cut(config, range(len(kept))))
    assert "'gemma2' is not supported: pipeline stages chained == the whole: behind layer 3 of 4: off by" in refusal(
        tiny_config("gemma2")
    )


def test_stages_that_lose_the_scale_of_the_embedding_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Family, "scale_of", lambda self, embedding: None)
    assert "pipeline stages chained == the whole: behind layer 1" in refusal(tiny_config("gemma2"))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"mlp_input_norm": "post_attention_layernorm"}, "kind=mlp at layer 1 of 4"),
        ({"mlp_output_norm": None}, "kind=mlp at layer 1 of 4"),
        ({"logit_softcap": None}, "kind=mlp at layer 1 of 4"),
        ({"mlp_input_norm": "no_such_norm"}, "has no attribute 'no_such_norm'"),
    ],
)
def test_a_wrong_row_of_a_family_is_noticed(monkeypatch: pytest.MonkeyPatch, change: dict, told: str) -> None:
    monkeypatch.setitem(FAMILIES, "gemma2", replace(FAMILIES["gemma2"], **change))
    assert "copied exit == logit lens: " in (found := refusal(tiny_config("gemma2")))
    assert told in found


def test_an_exit_that_is_nearly_the_lens_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit: another order of the same sum is another number."""
    monkeypatch.setattr(
        Mlp, "states", lambda self, body, tap, norm, run: tap.residual * (1 + 2**-22) + body(tap.mlp_input)
    )
    assert "copied exit == logit lens: kind=mlp at layer 1 of 2: off by" in refusal(tiny_config("llama"))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"self_attn__o_proj": None}, "the weights of self_attn.o_proj are whole on every rank, and see a part there"),
        ({"self_attn__v_proj": None}, "behind layer 1 of 2: off by"),
        ({"mlp__down_proj": "colwise"}, "Error"),
        ({"mlp__gate_proj": None, "mlp__up_proj": None, "mlp__down_proj": None}, ""),
        ({"mlp__up_proj": "packed_colwise"}, "its plan asks for 'packed_colwise' on layers.*.mlp.up_proj"),
    ],
)
def test_a_wrong_plan_is_noticed(changes: dict, told: str) -> None:
    config = with_plan(tiny_config("llama"), **changes)
    found = prove(config).tensor
    assert found.startswith("tensor-parallel slices == the whole: ") == bool(told)
    assert told in found
    check_tensor_proof(config, 1)
    if told:
        with pytest.raises(
            UserError, match=r"^parallel.tp=2: 'llama': tensor-parallel slices == the whole: .*; use tp=1$"
        ):
            check_tensor_proof(config, 2)


def test_weights_that_would_learn_from_a_part_are_noticed() -> None:
    found = prove(with_plan(tiny_config("qwen3"), self_attn__q_norm=None)).tensor
    assert "the weights of self_attn.q_norm are whole on every rank, and see a part there" in found


def test_slices_that_are_not_summed_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def alone(self: Any, x: torch.Tensor) -> torch.Tensor:
        out = whole(self, x)
        return out if self.style == "colwise" else out * 0.5

    whole = StackedLinear.forward
    monkeypatch.setattr(StackedLinear, "forward", alone)
    assert "tensor-parallel slices == the whole: behind layer 1 of 2: off by" in prove(tiny_config("llama")).tensor


def test_a_cache_that_is_read_wrongly_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    block = LayerRunner.block
    monkeypatch.setattr(LayerRunner, "block", lambda self, starts, n: block(self, [max(starts)] * len(starts), n))
    config = tiny_config("mistral")
    assert "blocks with a cache == whole texts: the exit at 3 positions behind [12, 9] others" in prove(config).decoding
    with pytest.raises(UserError, match="'mistral' is not decoded with exits: blocks with a cache"):
        check_decoding_proof(config)


def test_granite_without_its_numbers_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its base multiplies what every stage is given; its layers and logits have numbers of their own."""
    config = tiny_config("granite")
    with monkeypatch.context() as patch:
        patch.setattr(heads, "INPUT_FACTORS", ())
        assert "'granite' is not supported: pipeline stages chained == the whole: behind layer 2 of 2" in refusal(
            config
        )
    for name in ("residual_multiplier", "logit_divisor"):
        monkeypatch.setattr(proof, "_known", {})
        with monkeypatch.context() as patch:
            patch.setitem(FAMILIES, "granite", replace(FAMILIES["granite"], **{name: None}))
            assert "copied exit == logit lens: kind=mlp at layer 1 of 2" in refusal(config)


def test_matrices_that_nobody_counts_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "starcoder2", replace(FAMILIES["starcoder2"], gated=True))
    assert "counted sizes: layer 1 has " in refusal(tiny_config("starcoder2"))


# -- experts ----------------------------------------------------------------------------------------------------------

SLICES = "tensor-parallel slices == the whole: behind layer 1 of 2: off by"


def test_wrong_slices_of_experts_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gates for one rank, what they gate for the other."""
    monkeypatch.setattr(stacked, "own_units", lambda name, whole, rank, tp: whole.chunk(tp, CUTS[name][0])[rank])
    assert SLICES in prove(tiny_config("mixtral")).tensor


def test_experts_that_are_not_summed_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = StackedExperts.forward
    monkeypatch.setattr(StackedExperts, "forward", lambda self, *args: forward(self, *args) * 0.5)
    assert SLICES in prove(tiny_config("olmoe")).tensor


@pytest.mark.parametrize(
    ("family", "change"),
    [
        *(("qwen2_moe", {"norm_topk_prob": True}), ("qwen3_moe", {"norm_topk_prob": False})),
        *(("olmoe", {"norm_topk_prob": True}), ("mixtral", {"num_experts_per_tok": 1})),
    ],
)
def test_another_choice_or_weight_of_experts_is_noticed(monkeypatch: Any, family: str, change: dict) -> None:
    def other(config: Any, *args: Any, **options: Any) -> Any:
        config = copy.deepcopy(config)
        config.update(change)
        return meta_model(config, *args, **options)

    monkeypatch.setattr(proof_checks, "meta_model", other)
    assert "pipeline stages chained == the whole: behind layer 1 of" in refusal(tiny_config(family))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"mlp__shared_expert__down_proj": "colwise"}, "Error"),
        ({"mlp__experts__down_proj": None}, "its plan asks for 'moe_tp_experts' on layers.*.mlp.experts, which is not"),
        (
            {"mlp__experts__down_proj": "colwise"},
            "its plan asks for 'colwise' on layers.*.mlp.experts.down_proj",
        ),
        ({"mlp__experts": "ep_dispatch_experts"}, "its plan asks for 'packed_colwise' on layers.*.mlp.experts.gate_up"),
        ({"mlp__gate_proj": None, "mlp__up_proj": None, "mlp__down_proj": None}, ""),
    ],
)
def test_a_wrong_plan_of_experts_is_noticed(changes: dict, told: str) -> None:
    found = prove(with_plan(tiny_config("qwen2_moe"), **changes)).tensor
    assert told in found
    assert bool(found) == bool(told)


def test_a_router_that_nobody_counts_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    held = ModelShape.held
    monkeypatch.setattr(ModelShape, "held", lambda self, layer: held(self, layer) - self.hidden_size)
    assert "counted sizes: layer 1 has " in refusal(tiny_config("qwen2_moe"))


def test_an_exit_that_reads_something_else_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "mixtral", replace(FAMILIES["mixtral"], mlp_input_norm="input_layernorm"))
    assert "copied exit == logit lens: kind=mlp at layer 1 of 2" in refusal(tiny_config("mixtral"))


def test_layers_side_by_side_have_no_mlp_exit() -> None:
    message = "^exits.kind=mlp: 'cohere2' runs attention and MLP of a layer side by side"
    with pytest.raises(UserError, match=message):
        exit_spec(tiny_config("cohere2"), [1], "mlp", "full", 1)
    assert exit_spec(tiny_config("cohere2"), [1], "norm", "full", 1).logit_scale == 0.3


# -- models that somebody made up -------------------------------------------------------------------------------------


def patched_layer(monkeypatch: pytest.MonkeyPatch, change: Callable[[Any], Any]) -> None:
    forward = modeling_llama.LlamaDecoderLayer.forward
    monkeypatch.setattr(
        modeling_llama.LlamaDecoderLayer, "forward", lambda self, *args, **kw: change(forward(self, *args, **kw))
    )


def test_a_layer_that_returns_a_tuple_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    patched_layer(monkeypatch, lambda hidden: (hidden,))
    assert refusal(tiny_config("llama")).endswith("is not supported: layer 1 returns a tuple, not hidden states")


def test_a_layer_that_multiplies_its_sum_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    patched_layer(monkeypatch, lambda hidden: hidden * 0.5)
    assert "copied exit == logit lens: kind=mlp at layer 1" in refusal(tiny_config("llama"))


def test_numbers_that_are_none_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    patched_layer(monkeypatch, lambda hidden: hidden * float("inf"))
    assert refusal(tiny_config("llama")).endswith("its logits are not finite")


def test_without_a_plan_it_is_refused_by_name() -> None:
    assert refusal(GPT2Config()) == (
        "model.path: architecture 'gpt2' is not supported: transformers has no plan that cuts it into embedding, "
        "decoder layers and norm"
    )


# -- memory -----------------------------------------------------------------------------------------------------------


def test_a_proof_that_took_long_is_kept_on_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr(proof, "REMEMBERED", 1e9)
    prove(tiny_config("llama"))
    assert not (tmp_path / "proofs").exists()
    monkeypatch.setattr(proof, "REMEMBERED", 0.0)
    monkeypatch.setattr(proof, "_known", {})
    made = prove(tiny_config("llama"))
    (stored,) = (tmp_path / "proofs").iterdir()

    def never(config: PreTrainedConfig) -> Any:
        raise AssertionError("proved again")

    monkeypatch.setattr(proof, "_known", {})
    monkeypatch.setattr(proof, "_prove", never)
    assert prove(tiny_config("llama", vocab_size=999, num_hidden_layers=7)) == made  # the same small copy
    for other in ({"rms_norm_eps": 1e-3}, {"attention_bias": True}):
        with pytest.raises(AssertionError, match="proved again"):
            prove(tiny_config("llama", **other))
    stored.write_text("[]")
    monkeypatch.setattr(proof, "_known", {})
    with pytest.raises(AssertionError, match="proved again"):
        prove(tiny_config("llama"))


def test_what_was_refused_is_not_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr(proof, "REMEMBERED", 0.0)
    with monkeypatch.context() as patch:
        patched_layer(patch, lambda hidden: (hidden,))
        assert refusal(tiny_config("llama")) == refusal(tiny_config("llama"))
    assert not (tmp_path / "proofs").exists()


# -- what `check` prints ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "told"),
    [
        ("qwen3", ("tp 1, 2, 4;", "exits.kind=embedding|norm|mlp|layer", "decode with exits yes", "convert Megatron")),
        ("cohere2", ("exits.kind=embedding|norm|layer", "decode with exits yes", "supernet no", "convert no")),
        ("gemma3_text", ("exits.kind=embedding|norm|mlp|layer", "decode with exits yes")),
        (
            "qwen2_moe",
            (
                "experts 5 of 32 units in 4 of 5 layers, 3 of them for a token and one of 48 units for all",
                "weights 264,064 held, 214,912 for a token",
                "tp 1, 2, 4; pp 1 to 5; exits.kind=embedding|norm|mlp decode with exits yes supernet no",
            ),
        ),
    ],
)
def test_check_of_a_model(tmp_path: Any, capsys: pytest.CaptureFixture, family: str, told: tuple[str, ...]) -> None:
    folder = write_model(tmp_path / "model", family)
    assert main(["check", f"model={folder}"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert all(f"{name} holds" in printed for name in proof.NEEDED)
    for words in (f"{family}, tried on a copy of ", "pp 1 to 5", *told):
        assert words in printed


def test_check_of_what_is_no_model(tmp_path: Any, capsys: pytest.CaptureFixture) -> None:
    assert main(["check", f"model={tmp_path / 'nothing'}"]) == 2
    GPT2Config().save_pretrained(tmp_path / "gpt2")
    assert main(["check", f"model={tmp_path / 'gpt2'}"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in lines] == ["error", "error"]
    assert "architecture 'gpt2' is not supported" in lines[1]
