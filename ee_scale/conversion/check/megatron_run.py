"""Megatron's GPT model computed from its own stored tensors, layer by layer, in plain torch.

It knows nothing of the spans that the converter moves: ranks' slices are joined as Megatron's modules would use them,
and rotary base, scaling and window come from the checkpoint's `args`. So it tells a wrong map, and a wrong argument.
"""

import math
from argparse import Namespace
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch.nn import functional

from ee_scale.conversion.check.hugging_face_run import Step
from ee_scale.conversion.copying import read_extent
from ee_scale.conversion.model import Opened
from ee_scale.conversion.tensors import Stored
from ee_scale.families.megatron import STACKED


@dataclass(frozen=True)
class _Names:
    """What the parts of a layer are called."""

    input_norm: str
    qkv: str
    proj: str
    mlp_norm: str
    fc1: str
    fc2: str


CORE = _Names(
    "self_attention.linear_qkv.layer_norm_weight",
    "self_attention.linear_qkv",
    "self_attention.linear_proj",
    "mlp.linear_fc1.layer_norm_weight",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
)
LOCAL = _Names(
    "input_layernorm.weight", CORE.qkv, CORE.proj, "pre_mlp_layernorm.weight", "mlp.linear_fc1", "mlp.linear_fc2"
)
LEGACY = _Names(
    "input_norm.weight",
    "self_attention.query_key_value",
    "self_attention.dense",
    "post_attention_norm.weight",
    "mlp.dense_h_to_4h",
    "mlp.dense_4h_to_h",
)


class MegatronRun:
    """The model of an opened Megatron checkpoint, in fp32 on the CPU."""

    def __init__(self, opened: Opened):
        self.args: Namespace = opened.args
        self.words = opened.model.map.shape.vocab_size
        self.stored: dict[str, list[Stored]] = defaultdict(list)
        for item in opened.stored:
            if not item.piece.copy:
                self.stored[item.name].append(item)
        self.legacy = any(name.startswith("language_model.") for name in self.stored)
        # A rank of mp_rank holds gates and ups of its own; the whole tensor of torch_dist has all gates first.
        self.by_rank = opened.format == "megatron_legacy"
        local = "layers.0.input_layernorm.weight" in self.stored
        self.names = LEGACY if self.legacy else LOCAL if local else CORE
        self.experts = getattr(self.args, "num_experts", None) or 0
        if self.experts:
            self.names = replace(self.names, mlp_norm=LOCAL.mlp_norm)
        self.numbers = list(getattr(self.args, "exit_layer_nums", None) or [])
        self.pre = bool(getattr(self.args, "pre_exit", False))

    @torch.no_grad()
    def steps(self, ids: torch.Tensor) -> Iterator[Step]:
        """As `HuggingFaceRun.steps`."""
        embedding = (
            "language_model.embedding.word_embeddings.weight" if self.legacy else "embedding.word_embeddings.weight"
        )
        words = self._joined(embedding)
        x = functional.embedding(ids[0], words)
        yield "embedding", x[None]
        for layer in range(self.args.num_layers):
            attended = x + self._attention(x, f"layers.{layer}.")
            normed = self._norm(attended, f"layers.{layer}.{self.names.mlp_norm}")
            branches = f"layers.{layer}.mlp.trunk.dense_h_to_4h.weight" in self.stored
            if self.experts:
                x = attended + self._mixture(normed, f"layers.{layer}.")
            else:
                x = attended + self._mlp(normed, f"layers.{layer}.", "mlp.trunk." if branches else "mlp.")
            yield f"layer {layer + 1}", x[None]
            for number in self.numbers:
                if number - self.pre == layer + 1:
                    yield f"exit {layer + 1}", self._exit(number, x, attended, normed)[None]
        x = self._norm(
            x, "language_model.encoder.final_norm.weight" if self.legacy else "decoder.final_layernorm.weight"
        )
        head = "language_model.output_layer.weight" if self.legacy else "output_layer.weight"
        tied = not getattr(self.args, "untie_embeddings_and_output_weights", False)
        yield "logits", (x @ (words if tied else self._joined(head))[: self.words].T)[None]

    def _exit(self, number: int, x: torch.Tensor, attended: torch.Tensor, normed: torch.Tensor) -> torch.Tensor:
        """EE-LLM: [branch beside the layer's MLP, or a layer] -> norm -> output matrix."""
        prefix = f"layers.{number - 1}."
        if getattr(self.args, "use_exit_mlp", False):
            x = attended + self._mlp(normed, prefix, "mlp.branch.")
        if getattr(self.args, "use_exit_block", False):
            block = f"{prefix}exit_block."
            x = x + self._attention(x, block)
            x = x + self._mlp(self._norm(x, f"{block}{self.names.mlp_norm}"), block, "mlp.")
        if getattr(self.args, "use_exit_norm", False):
            x = self._norm(x, f"{prefix}exit_norm.weight")
        own = f"exit_output_layer.{number - self.pre}"
        head = own if own in self.stored else "language_model.embedding.word_embeddings.weight"
        return x @ self._joined(head)[: self.words].T

    def _attention(self, x: torch.Tensor, prefix: str) -> torch.Tensor:
        args, names = self.args, self.names
        heads = args.num_attention_heads
        groups = args.num_query_groups if getattr(args, "group_query_attention", False) else heads
        per_group = heads // groups
        joined = self._linear(self._norm(x, prefix + names.input_norm), prefix + names.qkv)
        size = joined.shape[-1] // (heads + 2 * groups)
        length = x.shape[0]
        parts = joined.view(length, groups, per_group + 2, size)
        query = parts[:, :, :per_group].reshape(length, heads, size)
        key, value = parts[:, :, per_group], parts[:, :, per_group + 1]
        if getattr(args, "qk_layernorm", False):
            query = self._head_norm(query, f"{prefix}self_attention.q_layernorm.weight")
            key = self._head_norm(key, f"{prefix}self_attention.k_layernorm.weight")
        key, value = key.repeat_interleave(per_group, 1), value.repeat_interleave(per_group, 1)
        cos, sin = self._rotation(length, size)
        query, key = _rotate(query, cos, sin), _rotate(key, cos, sin)
        scores = torch.einsum("qhd,khd->hqk", query, key) / math.sqrt(size)
        context = scores.masked_fill(self._masked(length), -torch.inf).softmax(-1)
        mixed = torch.einsum("hqk,khd->qhd", context, value).reshape(length, heads * size)
        return mixed @ self._joined(f"{prefix}{names.proj}.weight", dim=1).T

    def _mlp(self, x: torch.Tensor, prefix: str, place: str) -> torch.Tensor:
        first, second = (f"{prefix}{name.replace('mlp.', place)}.weight" for name in (self.names.fc1, self.names.fc2))
        if not self.by_rank:
            gate, up = self._joined(first).chunk(2)
        else:
            halves = [part.chunk(2) for part in self._parts(first)]
            gate, up = (torch.cat([half[i] for half in halves]) for i in (0, 1))
        return (functional.silu(x @ gate.T) * (x @ up.T)) @ self._joined(second, dim=1).T

    def _mixture(self, x: torch.Tensor, prefix: str) -> torch.Tensor:
        """Router and experts: weights are a softmax over the chosen, or (pre-softmax) the chosen of one over all."""
        logits = x @ self._joined(f"{prefix}mlp.router.weight").T
        before = getattr(self.args, "moe_router_pre_softmax", False)
        scores, chosen = (logits.softmax(-1) if before else logits).topk(self.args.moe_router_topk)
        weights = scores if before else scores.softmax(-1)
        mixed = torch.zeros_like(x)
        for expert in range(self.experts):
            rows, places = torch.where(chosen == expert)
            if len(rows):
                out = self._mlp(x[rows], prefix, f"{STACKED}{expert}.")
                mixed[rows] += weights[rows, places, None] * out
        return mixed

    def _linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        bias = self._joined(f"{name}.bias") if f"{name}.bias" in self.stored else None
        return functional.linear(x, self._joined(f"{name}.weight"), bias)

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        epsilon = getattr(self.args, "norm_epsilon", None) or self.args.layernorm_epsilon
        return functional.rms_norm(x, x.shape[-1:], self._parts(name)[0], epsilon)

    def _head_norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """Of [S, H, size]: each head by itself, or with a weight for all of them all heads at once."""
        whole = self._parts(name)[0].numel() != x.shape[-1]
        return self._norm(x.flatten(1), name).view_as(x) if whole else self._norm(x, name)

    def _rotation(self, length: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """cos, sin [S, 1, size] of Megatron's rotary embedding, its llama3 scaling included."""
        args = self.args
        frequencies = 1.0 / getattr(args, "rotary_base", 10000) ** (
            torch.arange(0, size, 2, dtype=torch.float32) / size
        )
        if getattr(args, "use_rope_scaling", False):
            wave = 2 * math.pi / frequencies
            share = ((8192 / wave - 1) / (4 - 1)).clamp(0, 1)  # low 1, high 4, trained length 8192: built in there
            frequencies = frequencies * (share + (1 - share) / getattr(args, "rope_scaling_factor", 8.0))
        positions = torch.arange(length, dtype=torch.float32)
        positions = positions / (getattr(args, "rotary_seq_len_interpolation_factor", None) or 1)
        angles = torch.outer(positions, frequencies).repeat(1, 2)[:, None]
        return angles.cos(), angles.sin()

    def _masked(self, length: int) -> torch.Tensor:
        row, column = torch.arange(length)[:, None], torch.arange(length)[None]
        masked = column > row
        if window := getattr(self.args, "window_size", None):
            masked |= column < row - window[0]
        return masked

    def _joined(self, name: str, dim: int = 0) -> torch.Tensor:
        return torch.cat(self._parts(name), dim)

    def _parts(self, name: str) -> list[torch.Tensor]:
        return [read_extent(item.extent).float() for item in sorted(self.stored[name], key=lambda item: item.place)]


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Half against half."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin
