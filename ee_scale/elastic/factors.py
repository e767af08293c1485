"""What one phase trains: low-rank pairs, norms and biases, a new head."""

from collections.abc import Collection
from math import prod, sqrt

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from torch import nn

from ee_scale.backbone.digest import named_generator
from ee_scale.config.supernet import FactorsConfig
from ee_scale.elastic.architecture import ElasticMap, TensorAxes
from ee_scale.elastic.order import undeal
from ee_scale.elastic.stage import ElasticStage
from ee_scale.elastic.subnet import SubnetSpec
from ee_scale.families.family import HEAD_DIM, SHARDED, VOCAB


class FactorPlan:
    """The tensors that a phase trains, over the whole model, by (module, leaf): arithmetic only."""

    def __init__(self, elastic_map: ElasticMap, factors: FactorsConfig, rank: int, new: Collection[str] = ()):
        """rank: r of every low-rank pair; 0: whole updates of the same matrices. new: modules the base folder lacks."""
        self.map, self.config, self.rank = elastic_map, factors, rank
        self.tensors: dict[tuple[str, str], TensorAxes] = {}
        for name, tensor in elastic_map.matrices.items():
            module, leaf = name.rsplit(".", 1)
            if module == elastic_map.family.classifier or module in new:
                self.tensors[module, leaf] = tensor
            elif len(tensor.shape) == 1:
                if factors.vectors:
                    self.tensors[module, leaf] = tensor
            elif self._is_target(module, tensor):
                self._add_matrix(module, tensor)

    def _is_target(self, module: str, tensor: TensorAxes) -> bool:
        if "embed" in module and tensor.axes[0] != VOCAB:
            return False
        return self.map.family.target_of(module) in self.config.targets

    def _add_matrix(self, module: str, tensor: TensorAxes) -> None:
        rank, (out, inner) = self.rank, tensor.shape
        if rank == 0:
            self.tensors[module, "weight"] = tensor
            return
        self.tensors[module, "A"] = TensorAxes((tensor.axes[0], "rank"), (out, rank), tensor.layer)
        self.tensors[module, "B"] = TensorAxes(("rank", tensor.axes[1]), (rank, inner), tensor.layer)

    def parameters(self, spec: SubnetSpec) -> int:
        """Trainable parameters that take part in a subnet (the n_j of the gradient scaling)."""
        sizes = self.map.shape.sizes(spec)
        return sum(
            prod(tensor.cut(sizes))
            for tensor in self.tensors.values()
            if tensor.layer is None or tensor.layer in spec.layers
        )


class FactorSet(nn.Module):
    """This rank's trainable tensors of one phase. What the engine sees is what trains.

    Names in files: '<phase>.<module>.<leaf>', tensors whole and sorted by importance.
    """

    def __init__(self, stage: ElasticStage, plan: FactorPlan, index: int, seed: int):
        """Starts where the phase before ended: B is random, A is zero, whole updates are zero (a new head's random)."""
        super().__init__()
        self._stage, self.index = [stage], index
        self.axes: dict[str, TensorAxes] = {}
        self.named: dict[str, nn.Parameter] = {}
        stage.active.phases = index + 1
        for (module, leaf), tensor in plan.tensors.items():
            if module not in stage.elastic:
                continue
            name = f"{index}.{module}.{leaf}"
            start = initial(name, leaf, tensor, seed, fresh=module in stage.new and index == 0, std=_std(stage))
            local = stage.local(start, tensor, None).to(stage.grid.device, stage.dtype).contiguous()
            parameter = nn.Parameter(local)
            _mark_cut(parameter, tensor)
            if tensor.axes == (HEAD_DIM,) and stage.grid.layout.tp > 1:
                _sum_gradient(parameter, stage)
            stage.elastic[module].trained.setdefault(index, {})[leaf] = parameter
            self.axes[name], self.named[name] = tensor, parameter
            self.register_parameter(name.replace(".", "/"), parameter)

    def freeze(self) -> None:
        """The phase is over."""
        self.requires_grad_(False)

    def local(self, name: str, whole: torch.Tensor) -> torch.Tensor:
        """This rank's part of a whole tensor of that name."""
        return self._stage[0].local(whole, self.axes[name], None)

    def gather(self, name: str, part: torch.Tensor) -> torch.Tensor:
        """The whole tensor from this rank's part (or a tensor of its shape). A collective over the tensor group."""
        stage, tensor = self._stage[0], self.axes[name]
        cut = next((dim for dim, axis in enumerate(tensor.axes) if axis in (*SHARDED, VOCAB)), None)
        if cut is None or stage.grid.layout.tp == 1:
            return part
        parts = [torch.empty_like(part) for _ in range(stage.grid.layout.tp)]
        dist.all_gather(parts, part.contiguous(), group=stage.grid.tp_group)
        if tensor.axes[cut] == VOCAB:
            return torch.cat(parts, cut).narrow(cut, 0, tensor.shape[cut])
        return undeal(parts, cut, stage.map.shape.block(tensor.axes[cut]))


def initial(name: str, leaf: str, tensor: TensorAxes, seed: int, *, fresh: bool, std: float) -> torch.Tensor:
    """Whole start value. B is uniform in +-1/sqrt(in) (as `nn.Linear`); matrices of a fresh head are N(0, std)."""
    if leaf == "B":
        bound = 1 / sqrt(tensor.shape[1])
        return torch.empty(tensor.shape).uniform_(-bound, bound, generator=named_generator(name, seed))
    if fresh and len(tensor.shape) == 2:
        return torch.empty(tensor.shape).normal_(0.0, std, generator=named_generator(name, seed))
    return torch.zeros(tensor.shape)


def _std(stage: ElasticStage) -> float:
    return getattr(stage.map.config, "initializer_range", 0.02)


def _mark_cut(parameter: nn.Parameter, tensor: TensorAxes) -> None:
    for dim, axis in enumerate(tensor.axes):
        if axis in (*SHARDED, VOCAB):
            set_tensor_model_parallel_attributes(parameter, True, dim, 1)


def _sum_gradient(parameter: nn.Parameter, stage: ElasticStage) -> None:
    """Norms inside heads: each rank's copy sees its own heads only."""

    def all_reduce(gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient, group=stage.grid.tp_group)
        return gradient

    parameter.register_hook(all_reduce)
