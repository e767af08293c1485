"""An early exit: what it reads from the backbone, the modules it adds, and its logits.

Tensors: B sequences, S positions, D hidden size, V vocabulary (V/tp under tensor parallelism).
"""

import copy
import inspect
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedConfig

from .kinds import KINDS, ExitKind, Tap
from .shortlist import Shortlist

SHORTLIST = "shortlist"
HEADS = ("tied", "low_rank", "full", SHORTLIST)
LARGEST_RANK, LARGEST_CAP = 1 << 20, 1e30
FACTORS = ("logit_scale", "logit_divisor", "residual_multiplier")
# By which a base model multiplies what it is given, embeddings of a text or hidden states of another stage alike.
INPUT_FACTORS = ("embedding_multiplier",)
SMALLEST_SHORTLIST = 2  # a margin is between two


@dataclass(frozen=True)
class ExitSpec:
    """Everything that is needed to rebuild the exits of a model; stored in its config.json as `early_exit`.

    Attributes:
        layers: an exit at k reads the hidden state after k layers, k = 1..L.
        kind: a name of `KINDS`: what is in front of the head.
        head: `tied` (the frozen lm_head), `low_rank` (lm_head + up(down(x))), `full` (its own matrix), `shortlist` (its
            own matrix, with rows for some tokens only).
        rank: r of the low-rank head.
        mlp_input_norm, mlp_output_norm, logit_softcap, logit_scale, logit_divisor, residual_multiplier: see
            `ee_scale.families.family.Family`; those that are no norms are values here.
        shortlist: N, the tokens that a shortlist head scores; 0 for the others.
        shortlist_ids: those tokens, the most frequent ones first, the same at every exit; empty as long as nobody has
            counted the training data.
    """

    layers: tuple[int, ...]
    kind: str = "mlp"
    head: str = "low_rank"
    rank: int = 64
    mlp_input_norm: str | None = "post_attention_layernorm"
    mlp_output_norm: str | None = None
    logit_softcap: float | None = None
    logit_scale: float | None = None
    logit_divisor: float | None = None
    residual_multiplier: float | None = None
    shortlist: int = 0
    shortlist_ids: tuple[int, ...] = ()

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ExitSpec":
        """From the JSON form. Raises ValueError on values that no exit has, TypeError on unknown keys."""
        if not isinstance(values, dict) or not isinstance(values.get("layers"), list | tuple):
            raise ValueError("early_exit: 'layers' is missing or no list")
        ids = values.get("shortlist_ids", ())
        if not isinstance(ids, list | tuple):
            raise ValueError("early_exit: shortlist_ids is no list")
        spec = cls(**{**values, "layers": tuple(values["layers"]), "shortlist_ids": tuple(ids)})
        kinds = tuple(KINDS)  # unlike a dict it can be asked for anything that JSON holds
        if spec.kind not in kinds or spec.head not in HEADS:
            raise ValueError(f"early_exit: kind={spec.kind!r} (of {kinds}), head={spec.head!r} (of {HEADS})")
        if any(type(k) is not int or k < 1 for k in spec.layers):
            raise ValueError("early_exit: layers are not whole numbers from 1 on")
        if type(spec.rank) is not int or not 1 <= spec.rank <= LARGEST_RANK:
            raise ValueError(f"early_exit: rank is not a number from 1 to {LARGEST_RANK}")
        for name in ("mlp_input_norm", "mlp_output_norm"):
            if not isinstance(getattr(spec, name), str | None):
                raise ValueError(f"early_exit: {name} is not a name")
        cap = spec.logit_softcap
        if cap is not None and (type(cap) not in (int, float) or not 0 < cap <= LARGEST_CAP):
            raise ValueError("early_exit: logit_softcap is not a number above 0")
        for name in FACTORS:
            factor = getattr(spec, name)
            if factor is not None and (type(factor) not in (int, float) or not 0 < factor <= LARGEST_CAP):
                raise ValueError(f"early_exit: {name} is not a number above 0")
        spec._check_shortlist()
        return spec

    def _check_shortlist(self) -> None:
        count, ids = self.shortlist, self.shortlist_ids
        if self.head != SHORTLIST:
            if count != 0 or ids:
                raise ValueError(f"early_exit: head={self.head!r} has no shortlist")
            return
        if type(count) is not int or count < SMALLEST_SHORTLIST or count != len(ids):
            raise ValueError(
                f"early_exit: shortlist={count!r:.20} is not the number of shortlist_ids, {len(ids)}, or is below "
                f"{SMALLEST_SHORTLIST}"
            )
        if any(type(token) is not int or token < 0 for token in ids) or len(set(ids)) < count:
            raise ValueError("early_exit: shortlist_ids are not whole numbers from 0 on, each of them once")

    @property
    def exit_kind(self) -> ExitKind:
        """What `kind` names."""
        return KINDS[self.kind]

    @property
    def owns_matrix(self) -> bool:
        """Whether its head has an output matrix of its own."""
        return self.head in ("full", SHORTLIST)

    @property
    def reads_lm_head(self) -> bool:
        """Whether its head needs the backbone's output matrix."""
        return not self.owns_matrix

    def scored(self, vocab_size: int) -> int:
        """Tokens that its head scores, of so many: rows of its output matrix."""
        return self.shortlist or vocab_size

    def head_shapes(self, hidden_size: int, rows: int) -> dict[str, tuple[int, int]]:
        """The head's own tensors, by their names in the exit; rows: tokens that it scores, or those of a rank."""
        if self.head == "low_rank":
            return {"head.down.weight": (self.rank, hidden_size), "head.up.weight": (rows, self.rank)}
        return {"head.weight": (rows, hidden_size)} if self.owns_matrix else {}

    def output_norm(self, layer: nn.Module) -> nn.Module | None:
        """What stands between the MLP of a backbone's layer and the sum, where the family has that: a frozen norm, or a
        number that multiplies."""
        if self.mlp_output_norm:
            return getattr(layer, self.mlp_output_norm)
        return None if self.residual_multiplier is None else Multiplier(self.residual_multiplier)

    def capped(self, logits: torch.Tensor) -> torch.Tensor:
        """As the model scales and caps its own logits."""
        if self.logit_scale is not None:
            logits = logits * self.logit_scale
        if self.logit_divisor is not None:
            logits = logits / self.logit_divisor
        return soft_cap(logits, self.logit_softcap)

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        values = {**asdict(self), "layers": list(self.layers), "shortlist_ids": list(self.shortlist_ids)}
        if self.head != SHORTLIST:
            del values["shortlist"], values["shortlist_ids"]
        return {name: value for name, value in values.items() if name not in FACTORS or value is not None}


class ModelWithExits(Protocol):
    """What decoding asks of a causal language model with exits."""

    config: PreTrainedConfig
    exit_spec: ExitSpec
    exit_heads: nn.ModuleDict
    generation_config: GenerationConfig

    @property
    def base_model(self) -> nn.Module: ...

    @property
    def device(self) -> torch.device: ...

    def get_output_embeddings(self) -> nn.Module: ...


def soft_cap(logits: torch.Tensor, cap: float | None) -> torch.Tensor:
    """cap x tanh(logits / cap) for models that cap their logits (Gemma-2)."""
    return logits if cap is None else torch.tanh(logits / cap) * cap


class Multiplier(nn.Module):
    """x times a number."""

    def __init__(self, factor: float):
        super().__init__()
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.factor


class ExitTaps:
    """Hooks on the backbone's layers that keep the `Tap` of each exit during a forward pass."""

    def __init__(self, spec: ExitSpec, layers: dict[int, nn.Module], thread: int | None = None):
        """`layers`: exit layer k -> the k-th decoder layer of the backbone; `thread`: keep what this one runs only."""
        self.taps: dict[int, Tap] = {}
        self.thread = thread
        self.handles = [self._hook(spec, k, layer) for k, layer in layers.items()]

    def _hook(self, spec: ExitSpec, k: int, layer: nn.Module) -> Any:
        def keep(tap: Tap) -> None:
            if self.thread in (None, threading.get_ident()):
                self.taps[k] = tap

        return spec.exit_kind.watch(layer, spec.mlp_input_norm, keep)

    def pop(self) -> dict[int, Tap]:
        """The taps of the last forward pass; they are forgotten here, so that no activation outlives its use."""
        taps, self.taps = self.taps, {}
        return taps

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self.handles:
            handle.remove()


class LowRankHead(nn.Module):
    """logits = lm_head(x) + up(down(x)): the frozen output matrix plus an update of rank r.

    down [r, D], up [V, r]; up starts at zero, so the head starts as lm_head.
    """

    def __init__(self, hidden_size: int, vocab_size: int, rank: int):
        super().__init__()
        self.down = nn.Linear(hidden_size, rank, bias=False)
        self.up = nn.Linear(rank, vocab_size, bias=False)

    def forward(self, hidden: torch.Tensor, lm_head: nn.Module) -> torch.Tensor:
        """[..., D] -> [..., V]."""
        return lm_head(hidden) + self.up(self.down(hidden))


class ExitHead(nn.Module):
    """The trainable modules of one exit; which of them exist follows from `ExitSpec.kind` and `head`."""

    def __init__(
        self,
        spec: ExitSpec,
        hidden_size: int,
        vocab_size: int,
        body: nn.Module | None = None,
        norm: nn.Module | None = None,
    ):
        """body: goes by the name that the kind gives it, 'mlp' or 'layer', here and in files."""
        super().__init__()
        self.spec = spec
        if body is not None:
            self.add_module(spec.exit_kind.body.name, body)
        self.norm = norm
        self.shortlist = Shortlist(spec.shortlist_ids, vocab_size) if spec.shortlist else None
        self.head: nn.Module | None = None
        if spec.head == "low_rank":
            self.head = LowRankHead(hidden_size, vocab_size, spec.rank)
        elif spec.owns_matrix:
            self.head = nn.Linear(hidden_size, spec.scored(vocab_size), bias=False)

    @property
    def body(self) -> nn.Module | None:
        """What its kind copies of a decoder layer."""
        body = self.spec.exit_kind.body
        return None if body is None else getattr(self, body.name)

    def hidden(
        self,
        tap: Tap,
        mlp_output_norm: nn.Module | None = None,
        run_layer: Callable[[nn.Module, torch.Tensor], torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Tap -> [B, S, D], ready for the head; see `ExitKind.states`."""
        hidden = self.spec.exit_kind.states(self.body, tap, mlp_output_norm, run_layer)
        return hidden if self.norm is None else self.norm(hidden)

    def logits(self, hidden: torch.Tensor, lm_head: nn.Module | None) -> torch.Tensor:
        """[..., D] -> logits [..., V] by token id; minus infinity for those that a shortlist head does not score.

        `lm_head` is the backbone's frozen output matrix (not read where the head owns one).
        """
        return self.over_vocabulary(self.scored_logits(hidden, lm_head))

    def over_vocabulary(self, logits: torch.Tensor) -> torch.Tensor:
        """What `scored_logits` gives, of all tokens together, as [..., V] by token id."""
        return logits if self.shortlist is None else self.shortlist.over_vocabulary(logits)

    def scored_logits(self, hidden: torch.Tensor, lm_head: nn.Module | None) -> torch.Tensor:
        """[..., D] -> logits of the tokens that the head scores: [..., V], or [..., N] in the order of its shortlist.

        A head that is cut over tensor ranks gives this rank's part, padding included.
        """
        if self.head is None:
            logits = lm_head(hidden)
        elif isinstance(self.head, LowRankHead):
            logits = self.head(hidden, lm_head)
        else:
            logits = self.head(hidden)
        return self.spec.capped(logits)


def build_exit_heads(spec: ExitSpec, layers: Sequence[nn.Module], norm: nn.Module, vocab_size: int) -> nn.ModuleDict:
    """The exit heads of a model, keyed by layer, as copies of the backbone's modules (architecture and dtype)."""
    weight = getattr(norm, "weight", None)
    hidden_size = norm.normalized_shape[0] if weight is None else weight.shape[0]
    kind, heads = spec.exit_kind, {}
    for index, k in enumerate(spec.layers):
        body = copy.deepcopy(kind.body_source(layers, k))
        if kind.attends:
            body.self_attn.layer_idx = len(layers) + index  # its place in a cache, behind the model's own layers
        heads[str(k)] = ExitHead(spec, hidden_size, vocab_size, body, copy.deepcopy(norm) if kind.normed else None)
    return nn.ModuleDict(heads)


def run_single_layer(base: nn.Module, layer: nn.Module, hidden: torch.Tensor, **kwargs: object) -> torch.Tensor:
    """Run one decoder layer as a one-layer model, so that masks and rotary embeddings stay the model's business.

    base: the Hugging Face base model (`LlamaModel`, ...); hidden [B, S, D] -> [B, S, D].
    """
    view = copy.copy(base)
    view._modules = {**base._modules, "layers": nn.ModuleList([layer]), "norm": nn.Identity()}
    take_as_it_is(view)
    view.config = copy.copy(base.config)
    view.config.num_hidden_layers = 1
    if getattr(base.config, "layer_types", None) is not None:
        view.config.layer_types = [layer_type(layer)]
    return view(inputs_embeds=hidden, use_cache=False, **kwargs).last_hidden_state


def take_as_it_is(base: nn.Module) -> None:
    """Let a base model that embeds nothing take its hidden states as they are."""
    for name in INPUT_FACTORS:
        if hasattr(base, name):
            setattr(base, name, 1.0)


def embed(base: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """[B, q] -> [B, q, D], what the first layer reads."""
    hidden = base.embed_tokens(tokens)
    for name in INPUT_FACTORS:
        if hasattr(base, name):
            hidden = hidden * getattr(base, name)
    return hidden


def layer_type(layer: nn.Module) -> str:
    """'sliding_attention' or 'full_attention', as the layer itself was built."""
    attention = layer.self_attn
    # Some have a window in every layer, and say which ones look through it.
    sliding = getattr(attention, "is_sliding", getattr(attention, "sliding_window", None) is not None)
    return "sliding_attention" if sliding else "full_attention"


def rotary_by_type(rotary: nn.Module) -> bool:
    """Whether layers of different types turn positions by different tables."""
    return "layer_type" in inspect.signature(rotary.forward).parameters
