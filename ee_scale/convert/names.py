"""One table per family: what Megatron calls a tensor, which of the model's tensors it holds, how ranks cut it.

The same rows serve both directions. Names of Megatron-Core: GPTModel of release 0.16, with Transformer Engine's fused
norms (`core`, also the keys on disk of `torch_dist`) or its own layers (`local`); `legacy`: the classes of Megatron-LM
before 0.18, which EE-LLM extends. Nothing here permutes rotary halves: both worlds rotate half against half.
"""

from dataclasses import dataclass
from enum import Enum
from typing import Any

from ee_scale.backbone.families import ModelShape, shape_of
from ee_scale.convert.tensors import Span, TensorInfo, cut
from ee_scale.errors import UserError


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
    """

    hf: tuple[str, ...]
    core: str
    legacy: str | None
    rule: Rule
    local: str | None = None

    @property
    def dim(self) -> int:
        """The dimension that ranks cut and spans join."""
        return 1 if self.rule is Rule.COLUMNS else 0


QKV_SOURCES = tuple(f"self_attn.{name}_proj" for name in "qkv")
LAYER = (
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
    Row(
        ("self_attn.o_proj.weight",),
        "self_attention.linear_proj.weight",
        "self_attention.dense.weight",
        Rule.COLUMNS,
    ),
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
    ("model.embed_tokens.weight",),
    "embedding.word_embeddings.weight",
    "embedding.word_embeddings.weight",
    Rule.VOCAB,
)
FINAL_NORM = Row(("model.norm.weight",), "decoder.final_layernorm.weight", "encoder.final_norm.weight", Rule.WHOLE)
HEAD = Row(("lm_head.weight",), "output_layer.weight", "output_layer.weight", Rule.VOCAB)

FAMILY_LAYERS = {"llama": LAYER, "mistral": LAYER, "qwen2": (*LAYER, QKV_BIAS), "qwen3": (*LAYER, *QK_NORMS)}

# Modules whose checkpoints carry an entry for Transformer Engine's extra state (None without it).
EXTRA_STATE = ("self_attention.linear_proj", "self_attention.linear_qkv", "mlp.linear_fc1", "mlp.linear_fc2")


class ModelMap:
    """The spans of every Megatron tensor of one model."""

    def __init__(self, config: Any, padded_vocab: int):
        """`config`: of transformers; `padded_vocab`: rows of Megatron's vocabulary matrices. Raises `UserError`."""
        if config.model_type not in FAMILY_LAYERS:
            raise UserError(
                f"config.model_type={config.model_type}: no map to Megatron; known: {', '.join(FAMILY_LAYERS)}"
            )
        self.shape: ModelShape = shape_of(config)
        self.layer_rows = FAMILY_LAYERS[config.model_type]
        self.padded_vocab = padded_vocab

    def info(self) -> dict[str, TensorInfo]:
        """Every tensor of the model (without exits): shape, and the dimension that ranks cut."""
        found: dict[str, TensorInfo] = {}
        for layer in range(self.shape.num_layers):
            found |= self.rows_info(self.layer_rows, f"model.layers.{layer}.")
        top = (EMBEDDING, FINAL_NORM) if self.shape.tied_embeddings else (EMBEDDING, FINAL_NORM, HEAD)
        return found | self.rows_info(top, "")

    def rows_info(self, rows: tuple[Row, ...], prefix: str) -> dict[str, TensorInfo]:
        """The tensors of some rows."""
        return {prefix + name: TensorInfo(self._tensor_shape(name), row.dim) for row in rows for name in row.hf}

    def joined(self, row: Row, prefix: str = "") -> tuple[Span, ...]:
        """The spans of the whole tensor, as `torch_dist` orders them."""
        sizes = [self._tensor_shape(name)[row.dim] for name in row.hf]
        names = [prefix + name for name in row.hf]
        if row.rule is Rule.QKV:
            return tuple(
                Span(name, group * size // groups, (group + 1) * size // groups)
                for groups in [self.shape.num_kv_heads]
                for group in range(groups)
                for name, size in zip(names, sizes, strict=True)
            )
        spans = tuple(Span(name, 0, size) for name, size in zip(names, sizes, strict=True))
        if row.rule is Rule.VOCAB and self.padded_vocab > self.shape.vocab_size:
            spans += (Span(None, 0, self.padded_vocab - self.shape.vocab_size),)
        return spans

    def rank_spans(self, row: Row, prefix: str, rank: int, tp: int) -> tuple[Span, ...]:
        """What one tensor rank holds, as a module's parameter."""
        joined = self.joined(row, prefix)
        if row.rule is Rule.WHOLE:
            return joined
        size = self.stored_shape(row)[row.dim]
        if row.rule is Rule.GATE_UP:  # each rank has a part of the gates and the same part of the ups
            half = size // 2
            ranges = [(start + rank * half // tp, start + (rank + 1) * half // tp) for start in (0, half)]
        else:
            ranges = [(rank * size // tp, (rank + 1) * size // tp)]
        return tuple(span for start, stop in ranges for span in cut(joined, start, stop))

    def cut_vocab(self, spans: tuple[Span, ...], rank: int, tp: int) -> tuple[Span, ...]:
        """One tensor rank's part of a vocabulary matrix."""
        return cut(spans, rank * self.padded_vocab // tp, (rank + 1) * self.padded_vocab // tp)

    def stored_shape(self, row: Row) -> tuple[int, ...]:
        """Shape of the whole Megatron tensor."""
        shapes = [self._tensor_shape(name) for name in row.hf]
        length = self.padded_vocab if row.rule is Rule.VOCAB else sum(shape[row.dim] for shape in shapes)
        return (*shapes[0][: row.dim], length, *shapes[0][row.dim + 1 :])

    def check_tensor_parallel(self, tp: int) -> None:
        """Raise `UserError` if `tp` ranks cannot cut the model."""
        for name, size in (
            ("num_attention_heads", self.shape.num_heads),
            ("intermediate_size", self.shape.intermediate_size),
            ("the padded vocabulary", self.padded_vocab),
        ):
            if size % tp:
                raise UserError(f"tp={tp}: does not divide {name}={size}")
        groups = self.shape.num_kv_heads
        if groups % tp and tp % groups:
            raise UserError(f"tp={tp}: neither divides num_key_value_heads={groups} nor is a multiple of it")

    def _tensor_shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor by the last words of its name."""
        shape, (module, kind) = self.shape, name.split(".")[-2:]
        hidden, heads = shape.hidden_size, shape.head_dim
        rows = {
            "q_proj": shape.num_heads * heads,
            "k_proj": shape.num_kv_heads * heads,
            "v_proj": shape.num_kv_heads * heads,
            "o_proj": hidden,
            "gate_proj": shape.intermediate_size,
            "up_proj": shape.intermediate_size,
            "down_proj": hidden,
            "embed_tokens": shape.vocab_size,
            "lm_head": shape.vocab_size,
            "q_norm": heads,
            "k_norm": heads,
        }.get(module, hidden)
        if kind == "bias" or module.endswith("norm"):
            return (rows,)
        columns = {"o_proj": shape.num_heads * heads, "down_proj": shape.intermediate_size}
        return (rows, columns.get(module, hidden))
