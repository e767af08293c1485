"""How much each unit contributes, measured on a few hundred samples by forwards alone, at any grid.

Head groups and MLP units: mean square of what the unit adds to the residual stream, ||W_out[:, u] a_u||^2.
Hidden units: mean square of the norms' outputs (Minitron, arXiv 2407.14679, takes means of absolute values).
Layers: 1 - cos(input, output) of the residual stream (block influence, ShortGPT, arXiv 2403.03853).
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from ee_scale.backbone.parallel import ROW
from ee_scale.elastic.modules import ElasticLinear, ElasticNorm
from ee_scale.elastic.order import UnitOrder, undeal
from ee_scale.elastic.stage import ElasticStage
from ee_scale.elastic.subnet import drop_order


@torch.no_grad()
def measure_order(stage: ElasticStage, batches: Iterable[dict[str, torch.Tensor]], parts: int) -> UnitOrder:
    """The order of all units. Every rank calls it with the same batches, on a stage loaded in the base's order.

    parts: equal runs of layers that lose layers in turn (`drop_order`).
    """
    scores = _Scores(stage)
    try:
        for batch in batches:
            _forward(stage, {name: tensor.to(stage.grid.device) for name, tensor in batch.items()}, scores)
    finally:
        scores.remove()
    return _sorted(stage, _shared(stage, scores), parts)


class _Scores:
    """Sums by layer, kept by hooks in fp64."""

    def __init__(self, stage: ElasticStage):
        self.stage, self.mask = stage, None
        self.sums: dict[tuple[str, int | None], torch.Tensor] = {}
        self._hooks = []
        for name, module in stage.elastic.items():
            layer = next((int(part) for part in name.split(".") if part.isdigit()), None)
            if isinstance(module, ElasticLinear) and module.style == ROW:
                self._hooks.append(module.register_forward_pre_hook(self._contribution(module, layer)))
            elif isinstance(module, ElasticNorm) and module.axes == ("hidden",):
                self._hooks.append(module.register_forward_hook(self._width))
        for i, layer in stage.layers.items():
            self._hooks.append(layer.register_forward_hook(self._influence(i)))

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def add(self, key: tuple[str, int | None], value: torch.Tensor) -> None:
        self.sums[key] = self.sums.get(key, 0) + value.double().cpu()

    def tokens(self, states: torch.Tensor) -> torch.Tensor:
        """[N, D] without padding."""
        return states.flatten(0, 1) if self.mask is None else states[self.mask]

    def _contribution(self, module: ElasticLinear, layer: int | None):
        axis = module.axes[1]
        block = self.stage.map.shape.block(axis)

        def hook(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            inputs = self.tokens(args[0]).float()
            weight = module.weight.float()
            if block == 1:
                value = inputs.pow(2).sum(0) * weight.pow(2).sum(0)
            else:
                pieces = zip(inputs.split(block, 1), weight.split(block, 1), strict=True)
                value = torch.stack([F.linear(x, w).pow(2).sum() for x, w in pieces])
            self.add((axis, layer), value)

        return hook

    def _width(self, _: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        if output.dim() == 3:
            self.add(("hidden", None), self.tokens(output).float().pow(2).sum(0))

    def _influence(self, i: int):
        def hook(_: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            similarity = F.cosine_similarity(self.tokens(args[0]).float(), self.tokens(output).float(), dim=-1)
            self.add(("layer", i), (1 - similarity).sum())

        return hook


def _forward(stage: ElasticStage, batch: dict[str, torch.Tensor], scores: _Scores) -> None:
    """One batch through all pipeline stages."""
    grid, tokens = stage.grid, batch["tokens"]
    scores.mask = batch["attention_mask"].bool() if "attention_mask" in batch else None
    x = tokens
    if not stage.is_first:
        x = torch.empty(*tokens.shape, stage.map.shape.hidden, dtype=stage.dtype, device=grid.device)
        dist.recv(x, grid.layout.rank(grid.stage - 1, grid.dp_rank, grid.tp_rank))
    hidden, _ = stage(x, batch)
    if not stage.is_last:
        dist.send(hidden.contiguous(), grid.layout.rank(grid.stage + 1, grid.dp_rank, grid.tp_rank))


def _shared(stage: ElasticStage, scores: _Scores) -> dict[tuple[str, int | None], torch.Tensor]:
    """The whole model's sums on every rank."""
    group, whole = stage.grid.tp_group, {}
    for key, value in scores.sums.items():
        if key[0] in ("heads", "ffn") and group.size() > 1:
            parts = [torch.empty_like(value).to(stage.grid.device) for _ in range(group.size())]
            dist.all_gather(parts, value.to(stage.grid.device), group=group)
            value = undeal([part.cpu() for part in parts], 0, 1)
        whole[key] = value
    everywhere: list = [None] * stage.grid.layout.world_size
    dist.all_gather_object(everywhere, whole, group=stage.grid.metrics_group)
    total: dict[tuple[str, int | None], torch.Tensor] = {}
    layout = stage.grid.layout
    for pipeline_stage in range(layout.pp):
        for key, value in everywhere[layout.rank(pipeline_stage, 0, 0)].items():
            total[key] = total[key] + value if key in total else value
    return total


def _sorted(stage: ElasticStage, sums: dict[tuple[str, int | None], torch.Tensor], parts: int) -> UnitOrder:
    layers = range(stage.map.shape.num_layers)
    influence = [float(sums["layer", i]) for i in layers]
    return UnitOrder(
        hidden=_best_first(sums["hidden", None]),
        groups=torch.stack([_best_first(sums["heads", i]) for i in layers]),
        ffn=torch.stack([_best_first(sums["ffn", i]) for i in layers]),
        drop=torch.tensor(drop_order(influence, parts, first_stays=stage.map.shape.first_layer_stays)),
    )


def _best_first(value: torch.Tensor) -> torch.Tensor:
    return value.argsort(descending=True, stable=True)
