"""The object: what a family's tensors are called, along which axes they lie, and what can be done with it."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from ee_scale.families.llama_cpp import LlamaCpp
from ee_scale.families.megatron import MegatronNames
from ee_scale.modeling.heads import ExitSpec

# Axes by name. HEADS, KV and FFN are dealt to tensor ranks; VOCAB is cut by them, but never elastic.
HIDDEN, HEADS, KV, FFN, VOCAB, HEAD_DIM = "hidden", "heads", "kv", "ffn", "vocab", "head_dim"
SHARDED = (HEADS, KV, FFN)


@dataclass(frozen=True)
class Elastic:
    """What binds the sizes of a subnet to one another.

    Attributes:
        head_dim_is_derived: the config has no head_dim of its own, so hidden = heads x head_dim in every subnet.
        heads_divide_hidden: the config refuses a width that is not a multiple of its heads, though it has a head_dim.
        first_layer_stays: the first layer is made otherwise than the rest, so that no other can be the first.
    """

    head_dim_is_derived: bool = False
    heads_divide_hidden: bool = False
    first_layer_stays: bool = False


@dataclass(frozen=True)
class Family:
    """A family by its `model_type`.

    Attributes:
        task: 'causal_lm' takes exits; 'classify' reads a whole text.
        axes: module name ('*' for a layer's number) -> axes of its weight; a bias lies along the first. Supernets and
            GGUF files need them.
        fused: module (its last name) -> names of the matrices of one size that lie in it one below the other; `axes`
            names those, each as a module inside of it.
        layers: place of the layers in the base model.
        final_norm: place of the norm behind them, or None.
        heads: matrices behind the last layer, the output matrix last.
        head_norms: norms between the heads of a text.
        attention, mlp: how names of their modules begin inside a layer.
        mlp_input_norm: norm whose input is the residual stream and whose output feeds the MLP;
            None when the MLP reads the residual stream itself.
        mlp_output_norm: norm between the MLP and the residual addition, or None.
        logit_softcap, logit_scale, logit_divisor: config attributes that cap, multiply and divide the final logits,
            or None.
        residual_multiplier: config attribute that multiplies what attention and MLP add to the residual stream.
        embedding_scale: attribute of the embedding that multiplies its output, or None.
        gated: whether an MLP has three matrices (gate, up, down), not two.
        parallel: attention and MLP read the same state, side by side, and both are added: an MLP beside it is no exit.
        neutral_norm: weight of a norm that only normalises (Gemma multiplies by 1 + weight).
        counts_from_padding: the table of positions starts with those up to the padding token's id, which no text has.
        gguf: whether GGUF files of it are read.
        llama_cpp: how llama.cpp runs it; None: no GGUF file of it is written.
        megatron: what Megatron's GPT model needs to be it; None: no map to Megatron.
        beyond_megatron: what it has and that model lacks.
        elastic: None where it is no supernet.
    """

    name: str
    axes: Mapping[str, tuple[str, ...]] = field(repr=False, default_factory=dict)
    task: str = "causal_lm"
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    layers: str = "layers"
    final_norm: str | None = "norm"
    heads: tuple[str, ...] = ("lm_head",)
    head_norms: tuple[str, ...] = ()
    attention: tuple[str, ...] = ("self_attn.",)
    mlp: tuple[str, ...] = ("mlp.",)
    mlp_input_norm: str | None = "post_attention_layernorm"
    mlp_output_norm: str | None = None
    logit_softcap: str | None = None
    logit_scale: str | None = None
    logit_divisor: str | None = None
    residual_multiplier: str | None = None
    gated: bool = True
    embedding_scale: str | None = None
    parallel: bool = False
    neutral_norm: float = 1.0
    counts_from_padding: bool = False
    gguf: bool = False
    llama_cpp: LlamaCpp | None = None
    megatron: MegatronNames | None = None
    beyond_megatron: str = ""
    elastic: Elastic | None = None

    @property
    def is_decoder(self) -> bool:
        """Whether it takes exits."""
        return self.task == "causal_lm"

    @property
    def text_heads(self) -> tuple[str, ...]:
        """What reads one vector of a text, not one of each token. A base model may lack it."""
        return () if self.is_decoder else (*self.heads, *self.head_norms)

    def axes_of(self, module: str) -> tuple[str, ...] | None:
        """Of the weight of a module by its full name ('model.layers.3.mlp.up_proj'); None: it is not known."""
        return self.axes.get(re.sub(r"\.\d+\.", ".*.", module))

    @property
    def classifier(self) -> str | None:
        """What gives the logits of classes; None of a decoder."""
        return None if self.is_decoder else self.heads[-1]

    def parts_of(self, module: str) -> tuple[str, ...]:
        """Modules that `axes` names in the place of a module of the model: those inside a fused one, or itself."""
        inside = self.fused.get(module.rpartition(".")[2], ())
        return tuple(f"{module}.{part}" for part in inside) or (module,)

    def whole_of(self, name: str) -> str:
        """The tensor of the model ('model.layers.3.attn.Wqkv.weight') that one of a part of a module lies in."""
        module, leaf = name.rsplit(".", 1)
        whole = module.rpartition(".")[0]
        return f"{whole}.{leaf}" if module in self.parts_of(whole) else name

    def prefixes(self, targets: Sequence[str]) -> tuple[str, ...]:
        """How names inside a layer begin that belong to 'attention' or 'mlp', where targets have those."""
        places = {"attention": self.attention, "mlp": self.mlp}
        return tuple(prefix for target in targets for prefix in places.get(target, ()))

    def target_of(self, module: str) -> str:
        """'attention', 'mlp', 'embeddings' or 'head': what a matrix belongs to, by its full name."""
        inside = re.split(r"\.\d+\.", module)[-1]
        targets = [target for target in ("attention", "mlp") if inside.startswith(self.prefixes([target]))]
        return targets[0] if targets else "embeddings" if "embed" in module else "head"

    def scale_of(self, embedding: nn.Module) -> float | None:
        """What an embedding of a model of the family multiplies its output by."""
        return getattr(embedding, self.embedding_scale) if self.embedding_scale else None

    def exit_settings(self, config: PreTrainedConfig) -> dict[str, Any]:
        """What `ExitSpec` says of the model that exits stand in."""
        settings = ("logit_softcap", "logit_scale", "logit_divisor", "residual_multiplier")
        named = {name: getattr(self, name) for name in settings}
        return {
            "mlp_input_norm": self.mlp_input_norm,
            "mlp_output_norm": self.mlp_output_norm,
            **{name: getattr(config, source) if source else None for name, source in named.items()},
        }

    def cap(self, logits: torch.Tensor, config: PreTrainedConfig) -> torch.Tensor:
        """What the model's output matrix gives, scaled and capped as the model does it."""
        return ExitSpec((), **self.exit_settings(config)).capped(logits)
