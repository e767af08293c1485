"""The tensors of one model as Megatron's: which spans of the model's each holds, and each rank's part of it."""

from transformers import PreTrainedConfig

from ee_scale.conversion.tensors import Span, TensorInfo, cut
from ee_scale.errors import UserError
from ee_scale.families.decoders import K_NORM, LLAMA, Q_NORM
from ee_scale.families.family import FFN, HEAD_DIM, HEADS, HIDDEN, KV
from ee_scale.families.megatron import EMBEDDING, FINAL_NORM, HEAD, MegatronNames, Row, Rule
from ee_scale.families.registry import megatron_family
from ee_scale.families.sizes import ModelShape, shape_of

EXPERTS = "experts"  # an axis


class ModelMap:
    """The spans of every Megatron tensor of one model."""

    def __init__(self, config: PreTrainedConfig, padded_vocab: int):
        """`config`: of transformers; `padded_vocab`: rows of Megatron's vocabulary matrices. Raises `UserError`."""
        names = megatron_family(config).megatron
        self.shape: ModelShape = shape_of(config)
        self.num_experts = config.num_experts if names.experts else 0
        self.inner_width = names.experts.width if names.experts else "intermediate_size"
        self.lengths = self.shape.lengths | {EXPERTS: self.num_experts, FFN: getattr(config, self.inner_width)}
        self.layer_rows = names.rows(self.num_experts)
        self.axes = {name.rpartition(".")[-1]: axes for name, axes in _axes(names).items()}
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
            (self.inner_width, self.lengths[FFN]),
            ("the padded vocabulary", self.padded_vocab),
        ):
            if size % tp:
                raise UserError(f"tp={tp}: does not divide {name}={size}")
        groups = self.shape.num_kv_heads
        if groups % tp and tp % groups:
            raise UserError(f"tp={tp}: neither divides num_key_value_heads={groups} nor is a multiple of it")

    def check_expert_parallel(self, ep: int) -> None:
        """Raise `UserError` if `ep` ranks cannot share the experts."""
        if ep > 1 and (not self.num_experts or self.num_experts % ep):
            raise UserError(f"ep={ep}: does not divide num_experts={self.num_experts}")

    def _tensor_shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor by the last words of its name."""
        module, kind = name.split(".")[-2:]
        lengths = tuple(self.lengths[axis] for axis in self.axes[module])
        return lengths[:1] if kind == "bias" else lengths


def _axes(names: MegatronNames) -> dict[str, tuple[str, ...]]:
    """Module -> axes of its weight."""
    norms = (HEADS, KV) if names.wide_norms else (HEAD_DIM, HEAD_DIM)
    found = LLAMA | {Q_NORM: norms[:1], K_NORM: norms[1:]}
    if names.experts:
        gate, up, down = names.experts.matrices
        found |= {gate: (FFN, HIDDEN), up: (FFN, HIDDEN), down: (HIDDEN, FFN), "gate": (EXPERTS, HIDDEN)}
    return found
