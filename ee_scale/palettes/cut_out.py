"""A subnet of a supernet run as a plain Hugging Face folder, and the parts of a run that it is cut from."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ee_scale.artifact.checkpoint import checkpoints, read_checkpoint
from ee_scale.artifact.hf_folder import write_beside
from ee_scale.artifact.run_folder import CHECKPOINTS, read_run
from ee_scale.backbone.digest import bit_digest
from ee_scale.backbone.loading import TensorFolder
from ee_scale.backbone.model_folder import GONE, find_base
from ee_scale.backbone.narrowing import narrowed
from ee_scale.data.provenance import SOURCES, TextSource
from ee_scale.elastic.architecture import ElasticMap
from ee_scale.elastic.extract import is_tied, subnet_config, subnet_tensors
from ee_scale.elastic.order import UnitOrder
from ee_scale.elastic.subnet import SubnetSpec
from ee_scale.errors import UserError
from ee_scale.families.build import AUTO_CLASS
from ee_scale.files import write_text
from ee_scale.reading import checked, read_object


@dataclass(frozen=True)
class TrainedSupernet:
    """What a finished (or running) supernet run holds.

    Attributes:
        trained: '<phase>.<module>.<leaf>' -> whole, sorted tensor.
        phases: how many phases of the recipe the checkpoint has.
    """

    identity: dict[str, Any]
    base: Path
    step: int
    phases: int
    trained: dict[str, torch.Tensor]

    @property
    def sources(self) -> list[TextSource]:
        """Text that it was trained on; empty: a run of an earlier version."""
        return checked(list[TextSource], self.identity.get("data", {}).get(SOURCES, []), "run.json: data.sources")

    def teacher(self, phases: int) -> "TrainedSupernet":
        """What taught, where the first `phases` phases made it."""
        trained = {name: tensor for name, tensor in self.trained.items() if int(name.split(".", 1)[0]) < phases}
        return replace(self, phases=phases, trained=trained)

    @property
    def fingerprint(self) -> str:
        """Of the base model and everything that is trained."""
        own = [f"+{bit_digest(sorted(self.trained.items()))}"] if self.trained else []
        return "".join([self.identity["base_fingerprint"], *own])


def read_supernet(run: Path, step: int | None = None) -> TrainedSupernet:
    """The run's last checkpoint, or that of `step`. Raises `UserError`."""
    identity = read_run(run, "supernet")
    changed = "changed since the supernet was trained"
    base = find_base(run, identity, f"src={run}", gone=f"{GONE} any more", other=changed)
    found = checkpoints(run / CHECKPOINTS)
    if not found:
        raise UserError(f"src={run}: no finished checkpoint in it yet")
    if step is not None and step not in found:
        raise UserError(f"step={step}: {run} has checkpoints {', '.join(map(str, found))}")
    folder = found[max(found) if step is None else step]
    state = read_checkpoint(folder)
    tensors = TensorFolder(folder, [folder / name for name in state["files"] if name.startswith("factors_")])
    trained = {name: tensors.read(name) for name in tensors.files}
    return TrainedSupernet(identity, base, state["step"], state["recipe_stage"] + 1, trained)


def subnet_model(
    elastic_map: ElasticMap, base: TensorFolder, order: UnitOrder, supernet: TrainedSupernet, spec: SubnetSpec
) -> PreTrainedModel:
    """The stock transformers model of a subnet, on the CPU."""
    tied = is_tied(elastic_map, supernet.trained)
    config = subnet_config(elastic_map, spec, tied=tied)
    tensors = dict(subnet_tensors(elastic_map, base, order, supernet.trained, spec))
    dtype = next(iter(tensors.values())).dtype
    state = {name: narrowed(tensor, dtype, name) for name, tensor in tensors.items()}
    model = AUTO_CLASS[elastic_map.family.task].from_config(config, dtype=dtype)
    result = model.load_state_dict(state, strict=False)
    wanted = ["lm_head.weight"] if tied else []
    if result.unexpected_keys or result.missing_keys not in ([], wanted):
        raise RuntimeError(f"tensors do not fit the stock model: {result}")
    model.tie_weights()
    return model.eval()


def write_subnet(
    folder: Path, model: PreTrainedModel, supernet: TrainedSupernet, spec: SubnetSpec, facts: str, teacher: str
) -> None:
    """Weights, config, tokenizer files and a model card into a new folder. teacher: its fingerprint."""
    folder.mkdir()
    model.save_pretrained(folder)
    # After transformers, which makes generation settings of its own.
    write_beside(folder, supernet.base, read_object(folder / "config.json"))
    write_text(folder / "README.md", "\n".join(_model_card(folder.name, model, supernet, spec, facts, teacher)) + "\n")


def _model_card(
    name: str, model: PreTrainedModel, supernet: TrainedSupernet, spec: SubnetSpec, facts: str, teacher: str
) -> Iterator[str]:
    config = model.config
    auto = AUTO_CLASS[supernet.identity["task"]].__name__
    yield from ("---", "library_name: transformers", "tags: [ee_scale, supernet]", "---", f"# {name}", "")
    yield (
        f"Cut from `{supernet.base.name}` (width {config.hidden_size}, {config.num_attention_heads} heads, "
        f"{config.intermediate_size} MLP units, layers {', '.join(str(i + 1) for i in spec.layers)} of the base) after "
        f"{supernet.step} steps of low-rank supernet training with ee_scale {version('ee-scale')}. {facts}"
    )
    yield from ("", "```python", f"from transformers import {auto}", "", f'{auto}.from_pretrained("{name}")', "```")
    yield from ("", "## What it was trained on", "")
    for source in supernet.sources:
        yield f"- {source.words}"
    if not supernet.sources:
        yield "- The run does not say: it is of an earlier version."
    yield from ("", f"Base model `{supernet.identity['base_fingerprint']}`, teacher `{teacher}`.")
