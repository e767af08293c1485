"""Open a model with exits from any of the forms it takes on disk."""

import copy
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel, logging
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from ee_scale.backbone.model_folder import GONE, SIDECAR_CONFIG, ModelFolder
from ee_scale.backbone.narrowing import narrowed
from ee_scale.backbone.shard import model_tensors
from ee_scale.errors import UserError, one_line
from ee_scale.modeling import modeling_early_exit as modeling
from ee_scale.modeling.calibration import CALIBRATION_KEY
from ee_scale.modeling.heads import ExitSpec, LowRankHead
from ee_scale.modeling.wrapped import opening


class EarlyExitForCausalLM(modeling.EarlyExitForCausalLM):
    """`from_pretrained(folder)` for an exported early-exit folder, or for a sidecar (the exits alone)."""

    @classmethod
    def from_pretrained(cls, path: str | Path, *args: Any, **kwargs: Any) -> Any:
        """The model with its exits, in eval mode. A sidecar opens its base model (`base_model=` overrides where).

        `pack_weights=False` leaves the weights plain on a CPU. Raises ValueError (`UserError` for folders) if exits and
        model do not belong together, or weights are encoded.
        """
        base, gone = kwargs.pop("base_model", None), f"{GONE}; pass base_model=<folder>"
        folder = ModelFolder.find(Path(path), gone=gone, base=Path(base) if base else None)
        if folder.sidecar is None:
            _check_exported(folder.path, kwargs.get("config"))
            return super().from_pretrained(folder.path, *args, **kwargs)
        _ = folder.decoder_config
        _, exits = folder.tensors()
        pack_weights = kwargs.pop("pack_weights", True)
        model = _with_new_heads(folder, folder.exits, **kwargs)
        _check_numbers(folder.base, model)
        dtype = next(model.exit_heads.parameters()).dtype
        state = {name.removeprefix(modeling.PREFIX): narrowed(exits.read(name), dtype, name) for name in exits.files}
        model.exit_heads.load_state_dict(state)
        setattr(model.generation_config, CALIBRATION_KEY, folder.calibration())  # not that of the base's exits
        model.pack_weights = pack_weights
        return model


def _check_exported(path: Path, config: PreTrainedConfig | None) -> None:
    """What transformers would only warn of, in a local folder. Raises `UserError`."""
    if (path / "config.json").is_file():
        folder = ModelFolder(path, config=config)
        if folder.exits is not None:
            folder.tensors()


def untrained_exits(path: Path, spec: ExitSpec, **kwargs: Any) -> Any:
    """A plain model with copy-initialised exits: what tuning starts from (for `mlp` and `norm`, the logit lens)."""
    folder = ModelFolder(path)
    model_tensors(path, folder.decoder_config)
    model = _with_new_heads(folder, spec, **kwargs)
    layers, lm_head = model.base_model.layers, model.get_output_embeddings()
    with torch.no_grad():
        for k, head in model.exit_heads.items():
            sources = [(head.body, spec.exit_kind.body_source(layers, int(k))), (head.norm, model.base_model.norm)]
            if isinstance(head.head, LowRankHead):
                head.head.up.weight.zero_()
            elif head.shortlist is not None:
                head.head.weight.copy_(lm_head.weight[head.shortlist.ids(lm_head.weight.device)])
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
    folder, opener = ModelFolder(path), EarlyExitForCausalLM
    _ = folder.decoder_config
    if folder.exits is None:
        folder.tensors()  # transformers fills what is missing with random numbers
        opener = MODEL_FOR_CAUSAL_LM_MAPPING[type(folder.config)]
        kwargs = opening(folder.config) | kwargs
    try:
        model = opener.from_pretrained(path, trust_remote_code=False, **kwargs)
    except UserError:
        raise
    except Exception as error:  # a folder that is damaged or was made up fails in many ways
        line = one_line(error)
        raise UserError(line if str(path) in line else f"{path}: {line}") from error
    _check_numbers(path, model)
    return model


def _check_numbers(folder: Path, model: PreTrainedModel) -> None:
    """Raise `UserError` naming a tensor with a number that the type it was opened in has not."""
    odd = {name: value for name, value in model.named_parameters() if not value.isfinite().all()}
    stored = model_tensors(folder, model.config) if odd else {}
    for name, value in odd.items():
        if name in stored:
            narrowed(stored.read(name), value.dtype, name)


def _with_new_heads(folder: ModelFolder, spec: ExitSpec, **kwargs: Any) -> Any:
    """The model of a folder whose weights were checked, with exit heads that still have to be filled."""
    config = copy.deepcopy(folder.config)
    config.early_exit = spec.to_dict()
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # the report of missing exit heads: they are filled next
    try:
        return modeling.early_exit_class(config).from_pretrained(folder.base, **opening(config), **kwargs).eval()
    finally:
        logging.set_verbosity(verbosity)
