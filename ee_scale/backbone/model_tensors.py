"""The weights of a model folder, checked by their headers: names, shapes, number types, and which matrix is which."""

from collections.abc import Collection
from pathlib import Path

from transformers import PreTrainedModel

from ee_scale.backbone.loading import PLAIN, WAY_OUT, TensorFolder
from ee_scale.backbone.stored_names import left_out, owner_of, parameter_names
from ee_scale.errors import UserError
from ee_scale.grid import launch_info
from ee_scale.log import log


class ModelTensors(TensorFolder):
    """A model's tensors by the names of transformers' parameters, whatever the files call them.

    Attributes:
        parameter_of: stored name -> name of the parameter, as `from_pretrained` renames it.
    """

    def __init__(self, folder: Path, model: PreTrainedModel, may_lack: Collection[str] = ()):
        """`model`: what opens the folder, on the meta device, built from its `read_config`; `may_lack`: modules of it
        that need not be stored.

        No weight is read. Raises `UserError` unless every parameter is there, once, plain, in the shape that the
        config asks for, and nothing lies inside the model's modules that no parameter takes.
        """
        super().__init__(folder)
        try:
            self.parameter_of = parameter_names(model, self.files)
        except UserError as error:
            raise UserError(f"{folder}: {error}") from error
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        self._stored = {name: stored for stored, name in self.parameter_of.items() if name in shapes}
        self._check_plain()
        others = self._others(model)
        # Tied matrices are one, wherever it lies; two that differ are not tied (`read_config`).
        for target, source in model.get_expanded_tied_weights_keys(all_submodels=True).items():
            if (found := self._stored.get(source, self._stored.get(target))) is not None:
                self._stored |= {source: found, target: found}
        self._check_all_there(model, [name for name in shapes if name.rpartition(".")[0] not in may_lack])
        for name, stored in self._stored.items():
            if self.shape(stored) != shapes[name]:
                raise UserError(
                    f"{folder}: '{stored}' has shape {list(self.shape(stored))}, "
                    f"but the config asks for {list(shapes[name])}"
                )
        launched = launch_info()
        if others and (launched is None or launched.rank == 0):
            kind = type(model).__name__
            log.warning("%s: %s does not have these tensors, which are left out: %s", folder, kind, _some(others))

    def __contains__(self, name: str) -> bool:
        return name in self._stored or super().__contains__(name)

    def stored_name(self, name: str) -> str:
        """As `TensorFolder.stored_name`."""
        return self._stored.get(name, name)

    def _check_plain(self) -> None:
        for name, stored in self._stored.items():
            if (kind := self.kind(stored)) not in PLAIN:
                raise UserError(
                    f"{self.folder}: '{stored}' is stored as {kind}, where '{name}' is a number of {', '.join(PLAIN)}: "
                    f"encoded (quantized) weights are not read; {WAY_OUT}"
                )

    def _others(self, model: PreTrainedModel) -> list[str]:
        """What no parameter takes and lies beside the model's parts (heads of another task, layers behind the last).

        Raises `UserError` for what lies inside of them: it would change what they compute.
        """
        strange = {name: stored for stored, name in self.parameter_of.items() if name not in self._stored}
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
        missing = [name for name in wanted if name not in self._stored]
        if not missing:
            return
        strange = [stored for stored, name in self.parameter_of.items() if name not in self._stored]
        more = f" ({len(missing)} of {len(wanted)} are missing)" if len(missing) > 1 else ""
        more += f"; it has '{min(strange)}'" if strange else ""
        head = missing[0] in (type(model)._tied_weights_keys or {})
        why = ", and the config says tie_word_embeddings=false" if head else ""
        raise UserError(f"{self.folder}: no tensor '{missing[0]}' in its safetensors{why}{more}")


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" ... ({len(names)})" if len(names) > 3 else "")
