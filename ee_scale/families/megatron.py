"""What Megatron calls a tensor, which of the model's tensors it holds, how ranks cut it: rows that families choose of.

The same rows serve both directions. Names of Megatron-Core: GPTModel of release 0.16, with Transformer Engine's fused
norms (`core`, also the keys on disk of `torch_dist`) or its own layers (`local`); `legacy`: the classes of Megatron-LM
before 0.18, which EE-LLM extends. Nothing here permutes rotary halves: both worlds rotate half against half.
"""

from dataclasses import dataclass
from enum import Enum
from functools import lru_cache

from ee_scale.families.experts import ExpertNames


class Rule(Enum):
    """How a Megatron tensor is made of the model's, and how tensor ranks cut it."""

    WHOLE = "whole on every rank"
    COLUMNS = "input features cut over ranks"
    QKV = "query heads of a group, its key head, its value head; cut over ranks"
    GATE_UP = "gates, then ups, each cut over ranks"
    VOCAB = "words, padded to a multiple, cut over ranks"


@dataclass(frozen=True)
class Row:
    """One Megatron tensor.

    Attributes:
        hf: the model's tensors it holds, in this order; names are relative to a layer, or to the model.
        local: its name with Megatron's own layers where that differs; legacy: None where those classes have none.
        alias: another name that `torch_dist` may have for it; expert: whose matrix it is, of the layer's experts.
    """

    hf: tuple[str, ...]
    core: str
    legacy: str | None
    rule: Rule
    local: str | None = None
    alias: str | None = None
    expert: int | None = None

    @property
    def numbered(self) -> str:
        """Its name in `torch_dist` where experts are not stacked, each has a key of its own."""
        return self.core if self.expert is None else self.core.replace(STACKED, f"{STACKED}{self.expert}.")

    @property
    def has_extra_state(self) -> bool:
        """Whether it is the weight of a module that has an entry for Transformer Engine's state."""
        return self.core.endswith(LINEAR)

    @property
    def dim(self) -> int:
        """The dimension that ranks cut and spans join."""
        return 1 if self.rule is Rule.COLUMNS else 0


# Modules whose checkpoints carry an entry for Transformer Engine's extra state (None without it).
LINEAR = ("linear_qkv.weight", "linear_proj.weight", "linear_fc1.weight", "linear_fc2.weight")
STACKED = "mlp.experts.experts."  # on disk; a rank's parameters are below LOCAL_EXPERTS
LOCAL_EXPERTS = "mlp.experts.local_experts."

QKV_SOURCES = tuple(f"self_attn.{name}_proj" for name in "qkv")
ATTENTION = (
    Row(
        ("input_layernorm.weight",),
        "self_attention.linear_qkv.layer_norm_weight",
        "input_norm.weight",
        Rule.WHOLE,
        local="input_layernorm.weight",
    ),
    Row(
        tuple(f"{name}.weight" for name in QKV_SOURCES),
        "self_attention.linear_qkv.weight",
        "self_attention.query_key_value.weight",
        Rule.QKV,
    ),
    Row(("self_attn.o_proj.weight",), "self_attention.linear_proj.weight", "self_attention.dense.weight", Rule.COLUMNS),
)
MLP = (
    Row(
        ("post_attention_layernorm.weight",),
        "mlp.linear_fc1.layer_norm_weight",
        "post_attention_norm.weight",
        Rule.WHOLE,
        local="pre_mlp_layernorm.weight",
    ),
    Row(
        ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
        "mlp.linear_fc1.weight",
        "mlp.dense_h_to_4h.weight",
        Rule.GATE_UP,
    ),
    Row(("mlp.down_proj.weight",), "mlp.linear_fc2.weight", "mlp.dense_4h_to_h.weight", Rule.COLUMNS),
)
# In front of a router the norm is a module of its own, but on disk Megatron's own layers call it as if it were fused.
ROUTER_NORM = Row(
    ("post_attention_layernorm.weight",),
    "pre_mlp_layernorm.weight",
    None,
    Rule.WHOLE,
    alias="mlp.linear_fc1.layer_norm_weight",
)
QKV_BIAS = Row(
    tuple(f"{name}.bias" for name in QKV_SOURCES),
    "self_attention.linear_qkv.bias",
    "self_attention.query_key_value.bias",
    Rule.QKV,
)
QK_NORMS = tuple(
    Row((f"self_attn.{name}_norm.weight",), f"self_attention.{name}_layernorm.weight", None, Rule.WHOLE)
    for name in "qk"
)
EMBEDDING = Row(
    ("model.embed_tokens.weight",), "embedding.word_embeddings.weight", "embedding.word_embeddings.weight", Rule.VOCAB
)
FINAL_NORM = Row(("model.norm.weight",), "decoder.final_layernorm.weight", "encoder.final_norm.weight", Rule.WHOLE)
HEAD = Row(("lm_head.weight",), "output_layer.weight", "output_layer.weight", Rule.VOCAB)


@dataclass(frozen=True)
class MegatronNames:
    """What Megatron's GPT model needs to be a family, beside Llama's layers.

    Attributes:
        qkv_bias, qk_norms: arguments `add_qkv_bias` and `qk_layernorm`.
        wide_norms: its q and k norms go over all heads at once; Megatron-Bridge's layers for it do, Megatron-Core's
            own have one norm for each head.
        head_dim: the config may say a width of heads that is not hidden_size / num_attention_heads.
        windowed: a window needs no other setting (`use_sliding_window`, `max_window_layers`).
        experts: names of its experts, if it has any.
    """

    qkv_bias: bool = False
    qk_norms: bool = False
    wide_norms: bool = False
    head_dim: bool = True
    windowed: bool = False
    experts: ExpertNames | None = None

    def rows(self, experts: int = 0) -> tuple[Row, ...]:
        """The tensors of one layer with that many experts."""
        mlp = _expert_rows(self.experts, experts) if self.experts else MLP
        return (*ATTENTION, *mlp, *[QKV_BIAS] * self.qkv_bias, *QK_NORMS * self.qk_norms)

    @property
    def in_ee_llm(self) -> bool:
        """Whether EE-LLM has its layers: Llama's."""
        return not (self.qkv_bias or self.qk_norms or self.experts)


@lru_cache
def _expert_rows(experts: ExpertNames, count: int) -> tuple[Row, ...]:
    """Norm, router and every expert's matrices."""
    rows = [ROUTER_NORM, Row((experts.router,), "mlp.router.weight", None, Rule.WHOLE)]
    for number in range(count):
        gate, up, down = experts.names(number)
        rows.append(Row((gate, up), f"{STACKED}linear_fc1.weight", None, Rule.GATE_UP, expert=number))
        rows.append(Row((down,), f"{STACKED}linear_fc2.weight", None, Rule.COLUMNS, expert=number))
    return tuple(rows)


# What the layers of other families have, and those of Megatron-Core's GPT model (to release 0.16) lack.
BEHIND = "norms behind attention and MLP"
