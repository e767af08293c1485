"""Open a model with exits from any of the forms it takes on disk."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, logging

from ee_scale.artifact.calibration import read_calibration
from ee_scale.artifact.sidecar import SIDECAR_CONFIG, SIDECAR_WEIGHTS, base_folder, read_sidecar
from ee_scale.backbone.fingerprint import is_model
from ee_scale.backbone.loading import TensorFolder, load_config, read_config
from ee_scale.backbone.narrowing import narrowed
from ee_scale.backbone.shard import model_tensors
from ee_scale.errors import UserError, one_line
from ee_scale.exits.placement import exits_of, read_spec
from ee_scale.inference.weights import tensors_with_exits
from ee_scale.modeling import modeling_early_exit as modeling
from ee_scale.modeling.heads import ExitSpec, LowRankHead
from ee_scale.modeling.policies import CALIBRATION_KEY


class EarlyExitForCausalLM(modeling.EarlyExitForCausalLM):
    """`from_pretrained(folder)` for an exported early-exit folder, or for a sidecar (the exits alone)."""

    @classmethod
    def from_pretrained(cls, path: str | Path, *args: Any, **kwargs: Any) -> Any:
        """The model with its exits, in eval mode. A sidecar opens its base model (`base_model=` overrides where).

        Raises ValueError (`UserError` for folders) if exits and model do not belong together, or weights are encoded.
        """
        base = kwargs.pop("base_model", None)
        if not (Path(path) / SIDECAR_CONFIG).is_file():
            _check_exported(Path(path), kwargs.get("config"))
            return super().from_pretrained(path, *args, **kwargs)
        facts = read_sidecar(Path(path))
        folder = Path(base) if base else base_folder(Path(path), facts)
        if not folder.is_dir():
            raise UserError(f"{path}: its base model {folder} is not there; pass base_model=<folder>")
        if not is_model(folder, facts["base_fingerprint"]):
            raise UserError(f"{path}: {folder} is not the base model that these exits were trained on")
        config = load_config(folder)
        spec = read_spec(facts["early_exit"], path, config.num_hidden_layers)
        tensors_with_exits(folder, config, spec, Path(path))
        model = _with_new_heads(folder, spec, **kwargs)
        _check_numbers(folder, model)
        exits = load_file(Path(path) / SIDECAR_WEIGHTS)
        dtype = next(model.exit_heads.parameters()).dtype
        state = {name.removeprefix(modeling.PREFIX): narrowed(value, dtype, name) for name, value in exits.items()}
        model.exit_heads.load_state_dict(state)
        setattr(model.generation_config, CALIBRATION_KEY, read_calibration(Path(path)))  # not that of the base's exits
        return model


def _check_exported(folder: Path, config: Any) -> None:
    """What transformers would only warn of, in a local folder. Raises `UserError`."""
    if (folder / "config.json").is_file():
        config = config or read_config(folder)
        if (spec := exits_of(folder, config)) is not None:
            tensors_with_exits(folder, config, spec)


def untrained_exits(folder: Path, spec: ExitSpec, **kwargs: Any) -> Any:
    """A plain model with copy-initialised exits: what tuning starts from (for `mlp` and `norm`, the logit lens)."""
    model = _with_new_heads(folder, spec, **kwargs)
    layers, lm_head = model.base_model.layers, model.get_output_embeddings()
    with torch.no_grad():
        for k, head in model.exit_heads.items():
            sources = [(head.mlp, layers[int(k) - 1].mlp), (head.layer, layers[-1]), (head.norm, model.base_model.norm)]
            if isinstance(head.head, LowRankHead):
                head.head.up.weight.zero_()
            else:
                sources.append((head.head, lm_head))
            for target, source in sources:
                if target is not None:
                    target.load_state_dict(source.state_dict())
    return model


def open_model(path: Path, **kwargs: Any) -> Any:
    """A model with exits, or a plain one that has none. Raises `UserError`."""
    if (path / SIDECAR_CONFIG).is_file():
        return EarlyExitForCausalLM.from_pretrained(path, **kwargs)
    config = load_config(path)
    opener = EarlyExitForCausalLM
    if exits_of(path, config) is None:
        model_tensors(path, config)  # transformers fills what is missing with random numbers
        opener = AutoModelForCausalLM
    try:
        model = opener.from_pretrained(path, trust_remote_code=False, **kwargs)
    except UserError:
        raise
    except Exception as error:  # a folder that is damaged or was made up fails in many ways
        line = one_line(error)
        raise UserError(line if str(path) in line else f"{path}: {line}") from error
    _check_numbers(path, model)
    return model


def _check_numbers(folder: Path, model: Any) -> None:
    """Raise `UserError` naming a tensor with a number that the type it was opened in has not."""
    odd = {name: value for name, value in model.named_parameters() if not value.isfinite().all()}
    stored = TensorFolder(folder) if odd else {}
    for name, value in odd.items():
        if name in stored:
            narrowed(stored.read(name), value.dtype, name)


def _with_new_heads(folder: Path, spec: ExitSpec, **kwargs: Any) -> Any:
    """The model of a plain folder with exit heads that still have to be filled."""
    config = load_config(folder)
    model_tensors(folder, config)
    config.early_exit = spec.to_dict()
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # the report of missing exit heads: they are filled next
    try:
        return modeling.early_exit_class(config).from_pretrained(folder, config=config, **kwargs).eval()
    finally:
        logging.set_verbosity(verbosity)
