"""The checks of a proof, each on the small copy of a model: what it takes apart must add up to the whole.

A check raises `CheckError` with the place where it does not; code that is written otherwise may raise anything.
Tensors: B texts, S positions, D hidden size, V words.
"""

import copy
from collections.abc import Sequence
from functools import cached_property, partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ee_scale.backbone.digest import named_generator
from ee_scale.backbone.masks import HandedMasks
from ee_scale.backbone.parallel import layer_plan, materialise, unknown_style
from ee_scale.backbone.shard import cut_base, layers_of, renew_rotary, run_base
from ee_scale.backbone.stacked import stack_ranks
from ee_scale.families.build import AUTO_CLASS, meta_model
from ee_scale.families.family import Family
from ee_scale.families.registry import decoder_family
from ee_scale.families.sizes import shape_of
from ee_scale.modeling.heads import ExitSpec, ModelWithExits, run_single_layer
from ee_scale.modeling.layer_runner import LayerRunner
from ee_scale.modeling.modeling_early_exit import early_exit_class

ROWS, LENGTH, TP = 2, 24, 2
TOLERANCE = 1e-5  # of fp32 numbers, by the largest one


class CheckError(Exception):
    """A check that does not hold, in words."""


class Whole:
    """The small copy with random weights, as transformers runs it.

    Attributes:
        ids: int64 [B, S].
        states: [B, S, D] in front of each layer and, last, behind the last one.
        hidden: [B, S, D], normed.
        logits: [B, S, V].
    """

    def __init__(self, config: PreTrainedConfig):
        self.family: Family = decoder_family(config)
        with torch.random.fork_rng(devices=[]):
            self.model: PreTrainedModel = AUTO_CLASS["causal_lm"].from_config(
                copy.deepcopy(config), dtype=torch.float32
            )
        self.model.eval()
        self.config, self.base = self.model.config, self.model.base_model
        _check_parts(self.model)
        self.layers = layers_of(self.base)
        _randomise(self.model)
        self.ids = torch.randint(0, config.vocab_size, (ROWS, LENGTH), generator=named_generator("ids", 0))
        self.states: list[torch.Tensor] = []
        handles = [self.layers[0].register_forward_pre_hook(self._enters, with_kwargs=True)]
        handles += [layer.register_forward_hook(self._leaves) for layer in self.layers]
        handles += [layer.get_submodule("mlp").register_forward_hook(self._adds) for layer in self.layers]
        handles += [
            self.base.get_submodule("norm").register_forward_hook(lambda module, args, output: self._normed(output))
        ]
        try:
            self.logits = self.model(self.ids, use_cache=False).logits
        finally:
            for handle in handles:
                handle.remove()
        if not self.logits.isfinite().all():
            raise CheckError("its logits are not finite")

    def _enters(self, layer: nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, Any]) -> None:
        self.states.append(args[0] if args else kwargs["hidden_states"])

    def _leaves(self, layer: nn.Module, args: tuple[Any, ...], output: object) -> None:
        self.states.append(self._states(output, "layer"))

    def _adds(self, mlp: nn.Module, args: tuple[Any, ...], output: object) -> None:
        self._states(output, "the MLP of layer")

    def _states(self, output: object, place: str) -> torch.Tensor:
        if not isinstance(output, torch.Tensor):
            raise CheckError(f"{place} {len(self.states)} returns a {type(output).__name__}, not hidden states")
        return output

    def _normed(self, output: torch.Tensor) -> None:
        self.hidden = output

    @property
    def spec(self) -> ExitSpec:
        """An exit at every layer, of the kind that the family takes and that reads the most."""
        kind, layers = "norm" if self.family.parallel else "mlp", tuple(range(1, len(self.layers) + 1))
        return ExitSpec(layers, kind=kind, head="tied", **self.family.exit_settings(self.config))

    @cached_property
    def with_exits(self) -> PreTrainedModel:
        """The same with its exits, copied from the backbone."""
        spec, layers = self.spec, self.spec.layers
        config = copy.deepcopy(self.config)
        config.early_exit = spec.to_dict()
        with torch.random.fork_rng(devices=[]):
            model = early_exit_class(config)(config).eval()
        weights = dict(self.model.named_parameters())
        for k, head in model.exit_heads.items():
            body = spec.exit_kind.body_source(self.layers, int(k))
            for name, _ in head.named_parameters():
                source = spec.exit_kind.source(name, int(k), len(layers))
                assert source is not None  # tied heads have no tensors
                if body is not None and source not in weights:  # a part of a mixture of experts
                    weights[source] = dict(body.named_parameters())[name.removeprefix("mlp.")]
                weights[f"exit_heads.{k}.{name}"] = weights[source]
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
        return model

    def lens(self, k: int) -> torch.Tensor:
        """Logits of the model that has its first k layers alone: [B, S, V]."""
        self.base.layers = self.layers[:k]
        try:
            return self.model(self.ids, use_cache=False).logits
        finally:
            self.base.layers = self.layers


def _check_parts(model: PreTrainedModel) -> None:
    base, head = model.base_model, model.get_output_embeddings()
    wanted = {"layers": nn.ModuleList, "embed_tokens": nn.Embedding, "norm": nn.Module, "rotary_emb": nn.Module}
    for name, kind in wanted.items():
        if not isinstance(getattr(base, name, None), kind):
            raise CheckError(f"{type(base).__name__} has no {name}")
    layer = base.get_submodule("layers.0")
    for name in ("self_attn", "mlp"):
        if not isinstance(getattr(layer, name, None), nn.Module):
            raise CheckError(f"{type(layer).__name__} has no {name}")
    if model.base_model_prefix != "model" or not isinstance(head, nn.Linear) or head is not model.lm_head:
        raise CheckError(f"{type(model).__name__} is not 'model' and 'lm_head'")
    if head.bias is not None:
        raise CheckError("its output matrix has a bias")
    stored = model.state_dict()
    for name, _ in model.named_buffers():
        if name in stored:
            raise CheckError(f"'{name}' is stored in files but is no weight, and is not read here")


def _randomise(model: PreTrainedModel) -> None:
    """Numbers that would hide no mistake: matrices that keep the size of what they read, no neutral vector."""
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=named_generator(name, 0))
        if parameter.ndim > 1:
            parameter.copy_(noise * parameter.shape[-1] ** -0.5)
        else:
            parameter.add_(noise, alpha=0.2)


def _differs(part: torch.Tensor, whole: torch.Tensor) -> str:
    """By how much, where it is more than rounding; '' if it does not."""
    if part.shape != whole.shape:
        return f"shape {list(part.shape)} for {list(whole.shape)}"
    error, size = float((part - whole).abs().max()), max(1.0, float(whole.abs().max()))
    return "" if error <= TOLERANCE * size else f"off by {error:.2g}"


def _compare_states(parts: Sequence[torch.Tensor], whole: Whole) -> None:
    """States behind the layers, the first one that differs by its number."""
    for k, (part, state) in enumerate(zip(parts, whole.states[1:], strict=True), 1):
        if found := _differs(part, state):
            raise CheckError(f"behind layer {k} of {len(parts)}: {found}")


def check_count(whole: Whole) -> None:
    """The matrices of a layer are those that plans count."""
    shape = shape_of(whole.config)
    for k, layer in enumerate(whole.layers, 1):
        wanted = shape.held(k - 1)
        if (found := sum(p.numel() for p in layer.parameters() if p.ndim > 1)) != wanted:
            raise CheckError(f"layer {k} has {found:,} weights in matrices, {wanted:,} are counted")


class _Embedding(nn.Module):
    """What `vocab_embedding` computes on one rank."""

    def __init__(self, weight: torch.Tensor, scale: float | None):
        super().__init__()
        self.weight, self.scale = weight, scale or 1.0

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return F.embedding(ids, self.weight) * torch.tensor(self.scale)


def check_stages(whole: Whole) -> None:
    """Two pipeline stages, one behind the other, are the model."""
    count, states, x = len(whole.layers), list[torch.Tensor](), whole.ids

    def keep(module: nn.Module, args: object, output: torch.Tensor) -> None:
        states.append(output)

    for layers in (range(count // 2), range(count // 2, count)):
        base = _stage(whole, layers)
        masks = HandedMasks(layers_of(base))
        for layer in layers_of(base):
            layer.register_forward_hook(keep)
        run_base(base, masks, x)
        del states[layers.start :]  # the second pass, with masks of the first, is what counts
        x = run_base(base, masks, x)
    _compare_states(states, whole)
    if found := _differs(x, whole.hidden):
        raise CheckError(f"behind the norm: {found}")


def _stage(whole: Whole, layers: range) -> nn.Module:
    """Built without memory, cut and filled as `BackboneStage` does it."""
    model = meta_model(whole.config, torch.float32, whole.config._attn_implementation)
    first, last = layers.start == 0, layers.stop == len(whole.layers)
    base = cut_base(model, layers, final_norm=last)
    renew_rotary(base, whole.config)
    embedding = whole.base.get_submodule("embed_tokens")
    scaled = _Embedding(embedding.get_parameter("weight"), whole.family.scale_of(embedding))
    base.register_module("embed_tokens", scaled if first else None)
    materialise(base, torch.device("cpu"))
    weights = dict(whole.base.named_parameters())
    for name, parameter in base.named_parameters():
        head, number, *rest = name.split(".", 2)
        parameter.copy_(weights[f"layers.{layers[int(number)]}.{rest[0]}" if head == "layers" else name])
    for name, buffer in base.named_buffers():
        if buffer.is_meta:
            raise CheckError(f"'{name}' is computed when the model is built, not loaded")
    return base.eval()


def check_exits(whole: Whole) -> None:
    """An exit at layer k that was copied is the model of k layers, bit for bit (the logit lens).

    Where the layer has experts and the exit a part of them, all of them answer in its place.
    """
    model, kind = whole.with_exits, whole.spec.kind
    own = {k: head._modules.get("mlp") for k, head in model.exit_heads.items()}
    for k, head in model.exit_heads.items():
        mlp = whole.layers[int(k) - 1].get_submodule("mlp")
        if own[k] is not None and hasattr(mlp, "experts"):
            head.mlp = mlp
    try:
        exits = model(whole.ids, use_cache=False).exit_logits
    finally:
        for k, head in model.exit_heads.items():
            if own[k] is not None:
                head.mlp = own[k]
    for k, logits in exits.items():
        lens = whole.lens(k)
        if not torch.equal(logits, lens):
            raise CheckError(
                f"kind={kind} at layer {k} of {len(exits)}: off by {float((logits - lens).abs().max()):.2g}"
            )


def check_single_layers(whole: Whole) -> None:
    """A layer alone, as exits of kind 'layer' run theirs, does what it does in its place."""
    parts = [
        run_single_layer(whole.base, layer, state) for layer, state in zip(whole.layers, whole.states, strict=False)
    ]
    _compare_states(parts, whole)


def check_tensor(whole: Whole) -> None:
    """Projections that are cut by transformers' plan, and meet where it says, are the model."""
    plan = layer_plan(whole.config.base_model_tp_plan)
    if not plan:
        raise CheckError("transformers has no tensor-parallel plan for it")
    if unknown := unknown_style(plan):
        name, style = unknown
        raise CheckError(f"its plan asks for '{style}' on {name}, which is not known here")
    model = copy.deepcopy(whole.model)
    layers, states = layers_of(model.base_model), list[torch.Tensor]()
    inside = {name.removeprefix("layers.*."): plan[name] for name in plan}
    for layer in layers:
        layer.register_forward_hook(lambda module, args, output: states.append(output))
        for name, module in layer.named_modules():
            planned = any(f"{name}.".startswith(f"{place}.") for place in inside)
            if not planned and next(module.parameters(recurse=False), None) is not None:
                module.register_forward_pre_hook(partial(_reads_the_same, name))
    stack_ranks(layers, inside, TP)
    model(whole.ids.repeat(TP, 1), use_cache=False)
    for rank in range(TP):
        _compare_states([state.chunk(TP)[rank] for state in states], whole)


def _reads_the_same(name: str, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
    """Weights that each rank has whole are trained by each alone."""
    first, *others = args[0].chunk(TP) if args else (torch.empty(0),)
    if any(_differs(other, first) for other in others):
        raise CheckError(f"the weights of {name} are whole on every rank, and see a part there")


def check_decoding(whole: Whole) -> None:
    """Blocks behind a cache, of rows with unequal lengths and taken-back positions, are passes over whole texts."""
    model, depth = whole.with_exits, len(whole.layers)
    exits = model(whole.ids, use_cache=False).exit_logits[1]
    runner = LayerRunner(cast(ModelWithExits, model), (1,), ROWS, LENGTH)
    try:
        for starts, length in (([0, 0], 12), ([12, 9], 3), ([15, 12], 1), ([16, 13], LENGTH - 16)):
            block = runner.block(starts, length)
            columns = torch.tensor(starts)[:, None] + torch.arange(length)
            rows = torch.arange(ROWS)[:, None]
            hidden = runner.run(runner.embed(whole.ids[rows, columns]), block, 0, 1)
            early = runner.exit_logits(1, hidden, block, slice(None))
            late = runner.final_logits(runner.run(runner.recall(1, block), block, 1, depth))
            for place, found, wanted in (("the exit", early, exits), ("the last layer", late, whole.logits)):
                if error := _differs(found, wanted[rows, columns]):
                    raise CheckError(f"{place} at {length} positions behind {starts} others: {error}")
    finally:
        runner.close()
