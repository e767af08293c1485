"""One exit of a run as a stock model: the first layers of the base model with the exit's modules at their end."""

from dataclasses import dataclass
from importlib.metadata import version
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig

from ee_scale.artifact.export import Trained, open_trained
from ee_scale.artifact.hf_folder import shard_names, shards, write_beside, write_index
from ee_scale.backbone.loading import TensorFolder
from ee_scale.backbone.model_folder import ModelFolder
from ee_scale.backbone.narrowing import narrowed
from ee_scale.backbone.shard import output_matrix_name
from ee_scale.errors import UserError
from ee_scale.families.build import meta_model
from ee_scale.families.sizes import layer_settings, shape_of
from ee_scale.files import new_folder, write_text
from ee_scale.modeling.heads import ExitSpec
from ee_scale.modeling.wrapped import is_wrapped
from ee_scale.reading import read_object

SHARD_BYTES = 4 << 30  # tensors that are in memory at the same time, and the size of a weight file


@dataclass(frozen=True)
class Submodel:
    """An exit, its run's facts, and the base model it reads.

    Attributes:
        k: layer of the exit.
        tensors: fp32 parameters of the exit, without the prefix 'exit_heads.<k>.'.
    """

    k: int
    spec: ExitSpec
    tensors: dict[str, torch.Tensor]
    base: TensorFolder

    @property
    def num_layers(self) -> int:
        """Layers of the stock model."""
        return self.spec.exit_kind.stock_layers(self.k)

    def source(self, name: str) -> str:
        """Where a parameter of the stock model lies: 'exit.<name>', or its name in the base model."""
        last = f"model.layers.{self.num_layers - 1}."
        if name == "model.norm.weight":
            return "exit.norm.weight"
        body = self.spec.exit_kind.body
        if body and name.startswith(last + body.prefix):
            return f"exit.{body.exit_prefix}{name.removeprefix(last)}"
        if name == "lm_head.weight":
            return output_matrix_name(self.base) if self.spec.reads_lm_head else "exit.head.weight"
        return name

    def read(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """A parameter of the stock model. A low-rank head is merged in fp32: W + up @ down, rounded once."""
        source = self.source(name)
        if source.startswith("exit."):
            value = narrowed(self.tensors[source.removeprefix("exit.")], dtype, name)
            return self._over_vocabulary(value) if source == "exit.head.weight" and self.spec.shortlist else value
        tensor = self.base.read(source)
        if name == "lm_head.weight" and self.spec.head == "low_rank":
            update = self.tensors["head.up.weight"] @ self.tensors["head.down.weight"]
            tensor = update.add_(tensor)
        return narrowed(tensor, dtype, name)

    def _over_vocabulary(self, rows: torch.Tensor) -> torch.Tensor:
        """[N, D] -> [V, D]: a shortlist head that gives 0 for the tokens that it does not score."""
        whole = rows.new_zeros(self.base.shape("model.embed_tokens.weight")[0], rows.shape[1])
        whole[list(self.spec.shortlist_ids)] = rows
        return whole


def export_submodel(run: Path, out: Path, exit_layer: int, step: int | None = None) -> None:
    """Write the exit at `exit_layer` as a stock checkpoint that transformers opens with no code of ours.

    Its logits are the exit's own. Raises `UserError` if the run has no such exit, if a stock model cannot express it,
    or if the base model is gone or changed.
    """
    with new_folder(out) as folder:
        write_submodel(folder, run, out.name, exit_layer, step)


def write_submodel(
    folder: Path, run: Path, name: str, exit_layer: int, step: int | None, *, drafts: bool = False
) -> Trained:
    """The same into a folder that is there, which is to be called `name`; returns the checkpoint it is of.

    drafts: it only drafts, so a shortlist head will do: tokens that it does not score have the logit 0.
    """
    trained = open_trained(run, step)
    spec = ExitSpec.from_dict(trained.facts["early_exit"])
    _check(run, spec, exit_layer, drafts=drafts)
    base = trained.base()
    _check_experts(base.folder, spec, exit_layer)
    prefix = f"exit_heads.{exit_layer}."
    own = {name.removeprefix(prefix): value for name, value in trained.exits.items() if name.startswith(prefix)}
    submodel = Submodel(exit_layer, spec, own, base)
    write_beside(folder, base.folder, _cut_config(base.folder, submodel))
    _write_weights(folder, submodel)
    write_text(folder / "README.md", _model_card(base.folder, name, submodel, trained.facts["step"]))
    return trained


def _check(run: Path, spec: ExitSpec, exit_layer: int, *, drafts: bool) -> None:
    if exit_layer not in spec.layers:
        raise UserError(f"exit={exit_layer}: {run} has exits at layers {', '.join(map(str, spec.layers))}")
    if spec.exit_kind.no_stock:
        raise UserError(
            f"exit={exit_layer}: {run} has exits of kind '{spec.kind}', {spec.exit_kind.no_stock}; "
            "use kind=early_exit or kind=sidecar"
        )
    if spec.shortlist and not drafts:
        raise UserError(
            f"exit={exit_layer}: {run} has heads of kind 'shortlist', which score {spec.shortlist} tokens; a stock "
            "model scores all of them, so it cannot say the same; use kind=early_exit, kind=sidecar or kind=drafter"
        )


def _check_experts(base: Path, spec: ExitSpec, exit_layer: int) -> None:
    config = ModelFolder(base).decoder_config
    experts = shape_of(config).experts
    if spec.exit_kind.body and experts and experts.layers[exit_layer - 1]:
        raise UserError(
            f"exit={exit_layer}: its {spec.kind} is dense, and a stock '{config.model_type}' has experts in its place; "
            "use kind=early_exit or kind=sidecar"
        )


def _cut_config(base: Path, submodel: Submodel) -> dict[str, Any]:
    """The base model's config.json with the layers of the submodel."""
    config = ModelFolder(base).decoder_config
    values = config.to_dict() if is_wrapped(config) else read_object(base / "config.json")
    own = [config.num_hidden_layers - 1] * submodel.spec.exit_kind.attends  # the exit's own layer: a copy of the last
    # Types are written out even where the file has none: some families derive them from the number of layers.
    values |= layer_settings(config, [*range(submodel.num_layers - len(own)), *own])
    values["tie_word_embeddings"] = config.tie_word_embeddings and submodel.spec.head == "tied"
    return values


def _write_weights(folder: Path, submodel: Submodel) -> None:
    """The parameters that transformers expects, in files of SHARD_BYTES, in the base model's number types."""
    model = meta_model(AutoConfig.from_pretrained(folder, trust_remote_code=False), torch.float32)
    embedding = submodel.base.read("model.embed_tokens.weight", 0, 0, 1).dtype
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    groups = shards(shapes, lambda name: prod(shapes[name]) * embedding.itemsize, SHARD_BYTES)
    weight_map: dict[str, str] = {}
    for file, names in zip(shard_names(len(groups)), groups, strict=True):
        tensors = {name: submodel.read(name, embedding).contiguous() for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    write_index(folder, weight_map)


def _model_card(base: Path, name: str, submodel: Submodel, step: int) -> str:
    spec = submodel.spec
    return f"""---
library_name: transformers
tags: [early-exit, ee_scale]
---
# {name}

The early exit of `{base.name}` after layer {submodel.k} (kind `{spec.kind}`, head `{spec.head}`), trained for {step}
steps, as a model of {submodel.num_layers} layers of the same architecture. Written by ee_scale {version("ee-scale")}.

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{name}")
```
"""
