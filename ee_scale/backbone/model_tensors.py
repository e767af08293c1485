"""The weights of a model folder, checked by their headers: names, shapes, number types, and which matrix is which."""

from collections.abc import Collection
from pathlib import Path

import torch
from transformers import PreTrainedModel

from ee_scale.backbone.experts import DenseStart, ExpertStack, dense_starts, find_stacks
from ee_scale.backbone.loading import PLAIN, WAY_OUT, TensorFolder
from ee_scale.backbone.stored_names import find_parameters, left_out, owner_of
from ee_scale.errors import UserError
from ee_scale.grid import launch_info
from ee_scale.log import log


class ModelTensors(TensorFolder):
    """A model's tensors by the names of transformers' parameters, whatever the files call them.

    Where a layer has experts, the names of a dense MLP ('...mlp.up_proj.weight') read what an exit starts with.

    Attributes:
        parameter_of: stored name -> name of the parameter that `from_pretrained` fills with it (one expert's tensor:
            of the parameter that it is a part of).
    """

    def __init__(self, folder: Path, model: PreTrainedModel, may_lack: Collection[str] = ()):
        """`model`: what opens the folder, on the meta device, built from its `read_config`; `may_lack`: modules of it
        that need not be stored.

        No weight is read. Raises `UserError` unless every parameter is there, once, plain, in the shape that the
        config asks for, and nothing lies inside the model's modules that no parameter takes.
        """
        super().__init__(folder)
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        try:
            names, parts = find_parameters(model, self.files)
            self._stacks: dict[str, ExpertStack] = find_stacks(parts, shapes)
        except UserError as error:
            raise UserError(f"{folder}: {error}") from error
        self.parameter_of = names | {stored: part.parameter for stored, part in parts.items()}
        self._stored = {name: stored for stored, name in names.items() if name in shapes}
        self._starts: dict[str, DenseStart] = dense_starts(model)
        self._check_plain()
        others = self._others(model)
        # Tied matrices are one, wherever it lies; two that differ are not tied (`read_config`).
        for target, source in model.get_expanded_tied_weights_keys(all_submodels=True).items():
            if (found := self._stored.get(source, self._stored.get(target))) is not None:
                self._stored |= {source: found, target: found}
        self._check_all_there(model, [name for name in shapes if name.rpartition(".")[0] not in may_lack])
        claims = [(stored, shapes[name]) for name, stored in self._stored.items()]
        claims += [(stored, self._stacks[part.parameter].part_shape) for stored, part in parts.items()]
        for stored, shape in claims:
            if (here := self.shape(stored)) != shape:
                raise UserError(f"{folder}: '{stored}' has shape {list(here)}, but the config asks for {list(shape)}")
        launched = launch_info()
        if others and (launched is None or launched.rank == 0):
            kind = type(model).__name__
            log.warning("%s: %s does not have these tensors, which are left out: %s", folder, kind, _some(others))

    def __contains__(self, name: str) -> bool:
        return self._has(name) or name in self._starts or super().__contains__(name)

    def _has(self, parameter: str) -> bool:
        return parameter in self._stored or parameter in self._stacks

    def stored_name(self, name: str) -> str:
        """As `TensorFolder.stored_name`."""
        return self._stored.get(name, name)

    def shape(self, name: str) -> tuple[int, ...]:
        """As `TensorFolder.shape`."""
        if name in self._starts:
            return tuple(self._starts[name].weight(self._blank).shape)
        return self._stacks[name].shape if name in self._stacks else super().shape(name)

    def _blank(self, name: str, count: int | None) -> torch.Tensor:
        return torch.empty(self.shape(name), device="meta")[:count]

    def read(self, name: str, dim: int | None = None, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """As `TensorFolder.read`."""
        if name in self._stacks:
            return self._stacks[name].read(super().read, dim, start, stop)
        if name not in self._starts:
            return super().read(name, dim, start, stop)
        whole = self._starts[name].weight(lambda source, count: self.read(source, 0, 0, count))
        return whole if dim is None else whole[(slice(None),) * dim + (slice(start, stop),)]

    def _check_plain(self) -> None:
        of_experts = [(name, stored) for name, stack in self._stacks.items() for row in stack.stored for stored in row]
        for name, stored in [*self._stored.items(), *of_experts]:
            if (kind := self.kind(stored)) not in PLAIN:
                raise UserError(
                    f"{self.folder}: '{stored}' is stored as {kind}, where '{name}' is a number of {', '.join(PLAIN)}: "
                    f"encoded (quantized) weights are not read; {WAY_OUT}"
                )

    def _others(self, model: PreTrainedModel) -> list[str]:
        """What no parameter takes and lies beside the model's parts (heads of another task, layers behind the last).

        Raises `UserError` for what lies inside of them: it would change what they compute.
        """
        strange = {name: stored for stored, name in self.parameter_of.items() if not self._has(name)}
        others = []
        for name in sorted(left_out(model, strange)):
            if (owner := owner_of(model, name)) is not None:
                raise UserError(
                    f"{self.folder}: '{strange[name]}' lies in '{owner}', and no parameter of {type(model).__name__} "
                    f"takes it: encoded (quantized) weights, an adapter's or another architecture's; {WAY_OUT}"
                )
            others.append(strange[name])
        return others

    def _check_all_there(self, model: PreTrainedModel, wanted: Collection[str]) -> None:
        missing = [name for name in wanted if not self._has(name)]
        if not missing:
            return
        strange = [stored for stored, name in self.parameter_of.items() if not self._has(name)]
        more = f" ({len(missing)} of {len(wanted)} are missing)" if len(missing) > 1 else ""
        more += f"; it has '{min(strange)}'" if strange else ""
        head = missing[0] in (type(model)._tied_weights_keys or {})
        why = ", and the config says tie_word_embeddings=false" if head else ""
        raise UserError(f"{self.folder}: no tensor '{missing[0]}' in its safetensors{why}{more}")


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" ... ({len(names)})" if len(names) > 3 else "")
