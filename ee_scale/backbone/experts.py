"""Experts: cut over tensor ranks, and found in files that hold a tensor for each of them.

In memory all experts of a layer are one tensor of shape [E, out, in].
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region as reduce_from
from torch import nn
from transformers import PreTrainedModel

from ee_scale.backbone.stored_names import ExpertPart
from ee_scale.errors import UserError
from ee_scale.modeling.experts import dense_inputs, dense_output

# The dimension that ranks cut, and how many matrices lie side by side in it, each of them cut.
CUTS = {"gate_up_proj": (1, 2), "down_proj": (2, 1)}

Read = Callable[[str, int | None, int, int | None], torch.Tensor]


def cut_experts(experts: nn.Module, group: dist.ProcessGroup, dtype: torch.dtype) -> None:
    """Leave this rank its units of every expert, empty and frozen; the ranks' outputs are summed, once for all."""
    for name, (dim, packs) in CUTS.items():
        shape = list(experts.get_parameter(name).shape)
        shape[dim] //= group.size()
        parameter = nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)
        set_tensor_model_parallel_attributes(parameter, True, dim, packs)
        experts.register_parameter(name, parameter)
    if group.size() > 1:
        experts.register_forward_hook(lambda module, args, output: reduce_from(output, group))


def own_units(name: str, whole: torch.Tensor, rank: int, tp: int) -> torch.Tensor:
    """The units of a rank, of a parameter of the experts."""
    dim, packs = CUTS[name]
    return torch.cat([matrix.chunk(tp, dim)[rank] for matrix in whole.chunk(packs, dim)], dim)


@dataclass(frozen=True)
class ExpertStack:
    """A parameter [E, P x out, in] whose parts lie in files: P matrices [out, in] for each expert.

    Attributes:
        stored: [E][P], their names.
        shape: of the parameter.
    """

    stored: list[list[str]]
    shape: tuple[int, ...]

    @property
    def part_shape(self) -> tuple[int, int]:
        """Of every matrix."""
        return self.shape[1] // len(self.stored[0]), self.shape[2]

    def read(self, read: Read, dim: int | None, start: int, stop: int | None) -> torch.Tensor:
        """As `TensorFolder.read`; `read` reads one of the matrices."""
        chosen = self.stored[start:stop] if dim == 0 else self.stored
        return torch.stack([self._expert(names, read, dim, start, stop) for names in chosen])

    def _expert(self, names: list[str], read: Read, dim: int | None, start: int, stop: int | None) -> torch.Tensor:
        rows = self.part_shape[0]
        if dim == 2:
            return torch.cat([read(name, 1, start, stop) for name in names])
        first, last, _ = slice(start, stop).indices(self.shape[1]) if dim == 1 else (0, self.shape[1], 1)
        parts = [(name, max(0, first - i * rows), min(rows, last - i * rows)) for i, name in enumerate(names)]
        return torch.cat([read(name, 0, begin, end) for name, begin, end in parts if begin < end])


def find_stacks(parts: Mapping[str, ExpertPart], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, ExpertStack]:
    """By the parameter's name; `parts`: by stored name. Raises `UserError` naming an expert that is missing, or one
    that the config (`shapes`) does not have."""
    found: dict[str, dict[tuple[int, int], str]] = {}
    for stored, part in parts.items():
        if part.expert >= (count := shapes[part.parameter][0]):
            raise UserError(f"'{stored}' is of expert {part.expert} (from 0), and the config has {count} experts")
        places = found.setdefault(part.parameter, {})
        if (other := places.setdefault((part.expert, part.place), stored)) != stored:
            raise UserError(f"'{other}' and '{stored}' are both the same part of '{part.parameter}'")
    return {name: _stack(name, places, parts, shapes[name]) for name, places in found.items()}


def _stack(
    name: str, places: Mapping[tuple[int, int], str], parts: Mapping[str, ExpertPart], shape: tuple[int, ...]
) -> ExpertStack:
    some = parts[next(iter(places.values()))]
    for expert in range(shape[0]):
        for place, pattern in enumerate(some.patterns):
            if (expert, place) in places:
                continue
            like = next((stored for (_, other), stored in places.items() if other == place), pattern)
            missing = re.sub(r"experts\.(\d+|\*)\.", f"experts.{expert}.", like)
            raise UserError(f"no tensor '{missing}' in its safetensors: expert {expert} of '{name}' is missing")
    return ExpertStack([[places[e, p] for p in range(len(some.patterns))] for e in range(shape[0])], shape)


@dataclass(frozen=True)
class DenseStart:
    """A matrix of the MLP that an exit starts with (`ee_scale.modeling.experts`), in the place of a layer's experts.

    Attributes:
        mlp: the module that has the experts.
        part: 'gate_proj', 'up_proj' or 'down_proj'.
        k: experts that a token goes through; 0: it is the shared expert's.
    """

    mlp: str
    part: str
    k: int

    def weight(self, read: Callable[[str, int | None], torch.Tensor]) -> torch.Tensor:
        """[out, in]; `read` gives the first so many experts of a parameter, None: all of it."""
        if not self.k:
            return read(f"{self.mlp}.shared_expert.{self.part}.weight", None)
        if self.part == "down_proj":
            return dense_output(read(f"{self.mlp}.experts.down_proj", self.k))
        return dense_inputs(read(f"{self.mlp}.experts.gate_up_proj", self.k))[self.part]


def dense_starts(model: PreTrainedModel) -> dict[str, DenseStart]:
    """By the names that the matrices had if the layers' MLPs were dense."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(getattr(module, "experts", None), nn.Module):
            k = 0 if hasattr(module, "shared_expert") else model.config.num_experts_per_tok
            for part in ("gate_proj", "up_proj", "down_proj"):
                found[f"{name}.{part}.weight"] = DenseStart(name, part, k)
    return found
