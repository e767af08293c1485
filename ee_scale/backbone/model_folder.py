"""A model on disk: its base, exits, weights, settings and calibration, found and checked in one place."""

import copy
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from ee_scale.backbone.exit_layers import exits_of, read_spec
from ee_scale.backbone.fingerprint import is_model
from ee_scale.backbone.loading import TensorFolder, read_config, weight_files
from ee_scale.backbone.model_path import find_gguf, plain_folder
from ee_scale.backbone.model_tensors import ModelTensors
from ee_scale.backbone.proof import prove
from ee_scale.backbone.shard import model_tensors
from ee_scale.backbone.small_files import GENERATION_CONFIG
from ee_scale.backbone.stored_names import find_parameters
from ee_scale.errors import UserError, one_line
from ee_scale.modeling.calibration import CALIBRATION_KEY, check_calibration
from ee_scale.modeling.heads import ExitSpec
from ee_scale.modeling.modeling_early_exit import PREFIX, check_exit_keys, early_exit_class
from ee_scale.reading import check_fields, check_files, read_json, read_object

SIDECAR_CONFIG, SIDECAR_WEIGHTS = "exits.json", "exits.safetensors"
GONE, OTHER = "is not there", "is not the base model that these exits were trained on"
CHANGED = "changed since the exits were trained"


class ModelFolder:
    """A Hugging Face folder, with exits where its config names them; `find` opens a sidecar, too.

    A sidecar is the exits alone, with a JSON that names their base model. Files are read when they are asked for;
    every member raises `UserError` for what is missing, damaged or does not belong together.

    Attributes:
        path: what was asked for; exits and their calibration lie here.
        base: config, tokenizer, settings and weights of the backbone lie here.
        sidecar: what exits.json says; None where all lies in one folder.
    """

    def __init__(
        self,
        path: Path,
        *,
        base: Path | None = None,
        sidecar: Mapping[str, Any] | None = None,
        config: PreTrainedConfig | None = None,
        alone: bool = False,
    ):
        """`config`: stands in for config.json; `alone`: the weights lie elsewhere (see `read_config`)."""
        self.path, self.base, self.sidecar = path, base or path, sidecar
        self._config, self._alone = config, alone

    @classmethod
    def find(
        cls, path: Path, *, here: str = "", gone: str = GONE, other: str = OTHER, base: Path | None = None
    ) -> Self:
        """A model folder or GGUF file, or a sidecar with its base model (`base` overrides where that lies).

        In messages `here` names the folder; `gone` and `other` say what is wrong with its base.
        """
        if not (path / SIDECAR_CONFIG).is_file():
            return cls(plain_folder(path))
        facts = read_sidecar(path)
        found = find_base(path, facts, here or str(path), gone=gone, other=other, base=base)
        return cls(path, base=found, sidecar=facts)

    @classmethod
    def named(cls, name: str, setting: str = "model") -> Self:
        """`find` for what a setting of a command names."""
        path = Path(name).expanduser()
        if not path.is_dir() and find_gguf(path) is None:
            raise UserError(f"{setting}={name}: no such folder")
        return cls.find(path)

    @cached_property
    def config(self) -> PreTrainedConfig:
        """The transformers config of the base, of whatever architecture, as `read_config`."""
        return self._config or read_config(self.base, alone=self._alone)

    @property
    def decoder_config(self) -> PreTrainedConfig:
        """The same, of an architecture that was proved to take exits."""
        prove(self.config)
        return self.config

    @cached_property
    def exits(self) -> ExitSpec | None:
        """The exits that exits.json or the config names."""
        if self.sidecar is None:
            return exits_of(self.path, self.config)
        return read_spec(self.sidecar["early_exit"], self.path, self.config)

    @property
    def weight_files(self) -> list[Path]:
        """The safetensors of the backbone, and those of a sidecar behind them."""
        return [*weight_files(self.base), *([] if self.sidecar is None else [self.path / SIDECAR_WEIGHTS])]

    def checked(self) -> Self:
        """Itself, once the config is that of a decoder and the weights, by their headers, are what it says."""
        _ = self.decoder_config
        self.tensors()
        return self

    def tensors(self) -> tuple[ModelTensors, TensorFolder]:
        """(tensors of the backbone, of its exits: 'exit_heads.*'); no weight is read."""
        if self.exits is None:
            tensors = model_tensors(self.base, self.config)
            return tensors, tensors
        config = copy.deepcopy(self.config)
        config.early_exit = self.exits.to_dict()
        with torch.device("meta"):
            model = early_exit_class(config)(config)
        exits = TensorFolder(self.path, None if self.sidecar is None else [self.path / SIDECAR_WEIGHTS])
        shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items() if name.startswith(PREFIX)}
        stored, wanted = {name for name in self._exit_names(model, exits) if name.startswith(PREFIX)}, shapes.keys()
        try:
            check_exit_keys(self.path, {"missing_keys": wanted - stored, "unexpected_keys": stored - wanted})
        except ValueError as error:
            raise UserError(str(error)) from error
        if self.sidecar is None:
            tensors = ModelTensors(self.base, model)
            return tensors, tensors
        for name, shape in shapes.items():
            if (found := list(exits.shape(name))) != shape:
                raise UserError(f"{self.path}: '{name}' has shape {found}, but the config asks for {shape}")
        return model_tensors(self.base, config), exits

    def _exit_names(self, model: PreTrainedModel, exits: TensorFolder) -> Iterable[str]:
        """Of what lies in `exits`: transformers writes those of some models as it writes the names of their layers."""
        if self.sidecar is not None:
            return exits.files
        try:
            return find_parameters(model, exits.files)[0].values()
        except UserError as error:
            raise UserError(f"{self.path}: {error}") from error

    def generation_config(self) -> GenerationConfig:
        """That of the base model; a sidecar's own file holds a calibration alone."""
        if not (self.base / GENERATION_CONFIG).is_file():
            return GenerationConfig.from_model_config(self.config)
        try:
            return GenerationConfig.from_pretrained(self.base)
        except Exception as error:  # whatever transformers makes of a file that says odd things
            raise UserError(f"{self.base / GENERATION_CONFIG}: {one_line(error)}") from error

    def calibration(self) -> dict[str, Any] | None:
        """Limits that `ee-scale calibrate` stored beside the exits."""
        found = self.settings().get(CALIBRATION_KEY)
        if found is not None:
            try:
                check_calibration(found)
            except ValueError as error:
                raise UserError(f"{self.path / GENERATION_CONFIG}: {error}") from error
        return found

    def settings(self) -> dict[str, Any]:
        """The generation_config.json beside the exits, as it stands there."""
        path = self.path / GENERATION_CONFIG
        return read_object(path) if path.is_file() else {}


def find_base(
    folder: Path, facts: Mapping[str, Any], here: str, *, gone: str, other: str, base: Path | None = None
) -> Path:
    """The base model that a sidecar or a run in `folder` names, or `base`, if it has the fingerprint that they know.

    Raises `UserError` in which `here` names the folder and `gone` and `other` say what is wrong with the base.
    """
    base = base or base_path(folder, facts)
    base = plain_folder(base) if base.exists() else base
    if not base.is_dir():
        raise UserError(f"{here}: its base model {base} {gone}")
    if not is_model(base, facts["base_fingerprint"]):
        raise UserError(f"{here}: {base} {other}")
    return base


def base_path(folder: Path, facts: Mapping[str, Any]) -> Path:
    """What a sidecar or a run in `folder` names as its base model, wherever it lies; a relative path begins there.

    For reading, once its fingerprint is that of the facts. Raises `UserError` for what is no path.
    """
    name = facts.get("base_model")
    if not isinstance(name, str) or "\0" in name:
        raise UserError(f"{folder}: its base model is {name!r}, which is no path")
    return folder / name


def read_sidecar(folder: Path) -> dict[str, Any]:
    """exits.json, after its weights were compared with their digest. Raises `UserError`."""
    facts = read_json(folder / SIDECAR_CONFIG)
    kinds = {"files": dict[str, str], "base_model": str, "base_fingerprint": str, "early_exit": dict[str, Any]}
    check_fields(facts, folder / SIDECAR_CONFIG, **kinds)
    if SIDECAR_WEIGHTS not in facts["files"]:
        raise UserError(f"{folder / SIDECAR_CONFIG}: no digest of {SIDECAR_WEIGHTS} in it")
    check_files(folder, facts["files"])
    return facts
