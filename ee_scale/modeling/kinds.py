"""The kinds of exits: what each reads, trains in front of its head, and costs.

Everything else asks these objects; a kind is added here, in one place, or registered from a file of its own, which is
then copied into exported folders. Imported without torch, because the command line lists the names.
Tensors: B sequences, S positions, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.utils.hooks import RemovableHandle

    RunLayer = Callable[[nn.Module, torch.Tensor], torch.Tensor]

# All-reduces of a whole hidden state inside a decoder layer: behind attention and MLP going forward; of the input
# gradients of q, k, v, gate and up going backward (each projection does its own).
LAYER_FORWARD, LAYER_BACKWARD = 2, 5
MLP_FORWARD, MLP_BACKWARD = 1, 2


class Tap(NamedTuple):
    """What an exit reads.

    residual [B, S, D]: the hidden state after the layer; for `mlp`, the residual stream after its attention.
    mlp_input [B, S, D]: for `mlp`, what the layer's own MLP reads; else None.
    """

    residual: torch.Tensor
    mlp_input: torch.Tensor | None = None

    def at(self, positions: int | slice) -> Tap:
        """Of these positions alone."""
        mlp_input = None if self.mlp_input is None else self.mlp_input[:, positions]
        return Tap(self.residual[:, positions], mlp_input)


class Shape(Protocol):
    """The numbers of a model that costs follow from (`ee_scale.families.sizes.ModelShape`)."""

    @property
    def hidden_size(self) -> int: ...

    @property
    def mlp_units(self) -> int: ...

    @property
    def num_heads(self) -> int: ...

    @property
    def num_kv_heads(self) -> int: ...

    @property
    def head_dim(self) -> int: ...

    @property
    def mlp_parameters(self) -> int: ...

    @property
    def layer_parameters(self) -> int: ...


def attention_flops(shape: Shape, seq_length: int) -> float:
    """Scores and weighted values of one layer, forward, per token."""
    return 4 * seq_length * shape.num_heads * shape.head_dim


@dataclass(frozen=True)
class Body:
    """The part of a decoder layer that an exit trains a copy of.

    Attributes:
        inside: its name in the layer and in the exit ('mlp'); '': the whole layer, which is 'layer' in the exit.
        last: whether it is the model's last layer's, and not that of the layer the exit reads.
    """

    inside: str
    last: bool = False

    @property
    def name(self) -> str:
        """In the exit."""
        return self.inside or "layer"

    @property
    def prefix(self) -> str:
        """Of its tensors in a decoder layer."""
        return self.inside and f"{self.inside}."

    @property
    def exit_prefix(self) -> str:
        """In front of a tensor's name in a decoder layer, for its name in the exit."""
        return "" if self.inside else "layer."

    def index(self, k: int, num_layers: int) -> int:
        """Layer (from 0) that the exit at k has its copy of."""
        return num_layers - 1 if self.last else k - 1


class ExitKind:
    """What stands between the backbone and an exit's head. The methods as they are here: the exit has no body.

    Attributes:
        name: the setting `exits.kind`, and `early_exit.kind` in files.
        body: what is copied of a decoder layer, or None.
        normed: whether a copy of the model's final norm stands in front of the head.
        attends: whether the body looks back at earlier positions, with keys and values of its own.
        tapped: whether it reads something else than the hidden state after its layer (then it cannot attend).
        states_read: hidden states [B, S, D] that it reads.
        ee_llm: which of EE-LLM's arguments are true for it; None: EE-LLM has no such exits.
        no_stock: why a stock model cannot compute the same; '' if it can.
    """

    name = ""
    body: Body | None = None
    normed = True
    attends = False
    tapped = False
    states_read = 1
    ee_llm: tuple[str, ...] | None = None
    no_stock = ""

    @property
    def trains(self) -> bool:
        """Whether anything trains in front of the head."""
        return self.normed or self.body is not None

    def body_in(self, layer: nn.Module) -> nn.Module | None:
        """The module of a decoder layer that the body is a copy of (of a mixture of experts: see `experts`)."""
        from .experts import dense_part  # needs torch

        return None if self.body is None else dense_part(layer.get_submodule(self.body.inside))

    def body_source(self, layers: Sequence[nn.Module], k: int) -> nn.Module | None:
        """The module that the body of the exit at k starts as, of all layers of a backbone."""
        return None if self.body is None else self.body_in(layers[self.body.index(k, len(layers))])

    def watch(self, layer: nn.Module, mlp_input_norm: str | None, keep: Callable[[Tap], None]) -> RemovableHandle:
        """Hook a backbone's layer so that `keep` gets the tap of every pass.

        mlp_input_norm: see `ExitSpec`.
        """
        return layer.register_forward_hook(lambda module, args, output: keep(Tap(output)))

    def tap(self, layer: nn.Module, mlp_input_norm: str | None, residual: torch.Tensor) -> Tap:
        """The tap that `watch` gives, from its residual [B, S, D] alone: all that is kept of it on disk."""
        return Tap(residual)

    def states(
        self, body: nn.Module | None, tap: Tap, mlp_output_norm: nn.Module | None, run_layer: RunLayer | None
    ) -> torch.Tensor:
        """Tap -> [B, S, D], what the norm reads.

        mlp_output_norm: the backbone's frozen norm behind its MLP, where the family has one; run_layer: runs a decoder
        layer, with its cache where there is one.
        """
        return tap.residual

    def source(self, name: str, k: int, num_layers: int) -> str | None:
        """Backbone tensor that a tensor of the exit at k ('mlp.up_proj.weight') starts from; None for the head's.

        norm <- final norm, body <- where `Body` says (EE-LLM's rules).
        """
        part, _, rest = name.partition(".")
        if part == "norm":
            return f"model.norm.{rest}"
        if self.body is None or part != self.body.name:
            return None
        return f"model.layers.{self.body.index(k, num_layers)}.{name.removeprefix(self.body.exit_prefix)}"

    def parameters(self, shape: Shape) -> int:
        """Of the body (norms and biases left out)."""
        return 0

    def training_flops(self, shape: Shape, seq_length: int, *, through: bool, pre_norm: bool) -> float:
        """Of the body, per token. See `ee_scale.planning.exit_costs.exit_flops`."""
        return 0.0

    def all_reduces(self, through: bool) -> int:
        """Of a whole hidden state over the tensor group, for the body; `through`: as in `training_flops`."""
        return 0

    def stock_layers(self, k: int) -> int:
        """Layers of the stock model that computes what the exit at k does; its body is the last one's."""
        return k

    def ee_llm_key(self, legacy: str) -> str:
        """EE-LLM's name for a tensor of the body, by what it is called in a layer."""
        return legacy

    def ee_llm_layer_key(self, key: str) -> str:
        """EE-LLM's name for a tensor of the backbone's layer that the exit sits at."""
        return key


class Embedding(ExitKind):
    """The head reads the hidden state as it is."""

    name, normed, ee_llm = "embedding", False, ()
    # Raising rms_norm_eps until the norm only scales would do the same to the norms of all layers.
    no_stock = (
        "whose head reads the hidden state without a norm; a stock model always normalises in front of its head, so it "
        "cannot say the same"
    )


class Norm(ExitKind):
    """A norm of its own."""

    name, ee_llm = "norm", ("use_exit_norm",)


class Mlp(ExitKind):
    """A sibling of the layer's own MLP, e = a + MLP(u) (EE-LLM; facts of arXiv 2402.00518), and a norm.

    In the backbone's order of operations, so that a copied MLP gives the backbone's own hidden state bit for bit. Where
    the layer has a mixture of experts, it is dense: see `experts`.
    """

    name, body, tapped, states_read = "mlp", Body("mlp"), True, 2
    ee_llm = ("use_exit_mlp", "use_exit_norm")

    def watch(self, layer: nn.Module, mlp_input_norm: str | None, keep: Callable[[Tap], None]) -> RemovableHandle:
        if mlp_input_norm is None:
            return layer.mlp.register_forward_pre_hook(lambda module, args: keep(Tap(args[0], args[0])))
        norm = getattr(layer, mlp_input_norm)
        return norm.register_forward_hook(lambda module, args, output: keep(Tap(args[0], output)))

    def tap(self, layer: nn.Module, mlp_input_norm: str | None, residual: torch.Tensor) -> Tap:
        if mlp_input_norm is None:
            return Tap(residual, residual)
        return Tap(residual, getattr(layer, mlp_input_norm).forward(residual))  # past the hooks of `watch`

    def states(
        self, body: nn.Module | None, tap: Tap, mlp_output_norm: nn.Module | None, run_layer: RunLayer | None
    ) -> torch.Tensor:
        update = body(tap.mlp_input)
        return tap.residual + (update if mlp_output_norm is None else mlp_output_norm(update))

    def parameters(self, shape: Shape) -> int:
        return shape.mlp_parameters

    def training_flops(self, shape: Shape, seq_length: int, *, through: bool, pre_norm: bool) -> float:
        matrix = 2 * shape.hidden_size * shape.mlp_units
        return 2 * matrix * (3 if through else 2) + 3 * matrix  # gate and up read what is frozen, down does not

    def all_reduces(self, through: bool) -> int:
        return MLP_FORWARD + MLP_BACKWARD if through else MLP_FORWARD

    def ee_llm_key(self, legacy: str) -> str:
        return legacy.replace("mlp.", "mlp.branch.")

    def ee_llm_layer_key(self, key: str) -> str:
        return key.replace("mlp.dense", "mlp.trunk.dense")


class Layer(ExitKind):
    """A decoder layer and a norm."""

    name, body, attends = "layer", Body("", last=True), True
    ee_llm = ("use_exit_block", "use_exit_norm")

    def states(
        self, body: nn.Module | None, tap: Tap, mlp_output_norm: nn.Module | None, run_layer: RunLayer | None
    ) -> torch.Tensor:
        return run_layer(body, tap.residual)

    def parameters(self, shape: Shape) -> int:
        return shape.layer_parameters

    def training_flops(self, shape: Shape, seq_length: int, *, through: bool, pre_norm: bool) -> float:
        qkv = 2 * shape.hidden_size * shape.head_dim * (shape.num_heads + 2 * shape.num_kv_heads)
        flops = 3 * (2 * shape.layer_parameters + attention_flops(shape, seq_length))
        return flops if pre_norm or through else flops - qkv  # whose input is frozen

    def all_reduces(self, through: bool) -> int:
        return LAYER_FORWARD + LAYER_BACKWARD

    def stock_layers(self, k: int) -> int:
        return k + 1

    def ee_llm_key(self, legacy: str) -> str:
        return f"exit_block.{legacy}"


KINDS: dict[str, ExitKind] = {}


def register(kind: ExitKind) -> None:
    """Make a kind known by its name. Raises ValueError for a name that is taken."""
    if kind.name in KINDS and type(kind).__module__ != type(KINDS[kind.name]).__module__:
        raise ValueError(f"an exit kind named '{kind.name}' is there already")
    KINDS[kind.name] = kind


for _kind in (Embedding(), Norm(), Mlp(), Layer()):
    register(_kind)
