"""What an `export` config asks for."""

from pathlib import Path
from typing import TYPE_CHECKING

from ee_scale.artifact.export import export_bytes, export_early_exit, export_sidecar
from ee_scale.artifact.run_folder import IDENTITY, read_run
from ee_scale.artifact.submodel import export_submodel
from ee_scale.backbone.model_path import plain_folder
from ee_scale.config.schema import ExportConfig
from ee_scale.errors import UserError
from ee_scale.progress import transfer
from ee_scale.reading import read_object

if TYPE_CHECKING:
    from ee_scale.artifact.onnx import OnnxReport

TASKS = {"ForCausalLM": "causal_lm", "ForSequenceClassification": "classify"}


def run_export(config: ExportConfig) -> "OnnxReport | None":
    """Write the folder `out`; of an ONNX file, what it is worth. Raises `UserError`."""
    source, out = Path(config.src).expanduser(), Path(config.out).expanduser()
    if config.format == "onnx":
        return _export_onnx(config, plain_folder(source), out)
    if config.int8:
        raise UserError("int8=true: goes with format=onnx; transformers' own files keep the number type of the model")
    if config.layer is not None and config.kind != "submodel":
        raise UserError(f"exit={config.layer}: goes with kind=submodel; kind={config.kind} holds every exit of the run")
    layers = read_run(source)["early_exit"]["layers"]
    if config.kind == "sidecar":
        export_sidecar(source, out, config.step)
    elif config.kind == "submodel":
        if config.layer is None:
            raise UserError(f"exit: missing; choose one of {source}'s exits: {', '.join(map(str, layers))}")
        export_submodel(source, out, config.layer, config.step)
    else:
        with transfer("copying the base model", export_bytes(source)) as copied:
            export_early_exit(source, out, config.step, copied)
    return None


def _export_onnx(config: ExportConfig, source: Path, out: Path) -> "OnnxReport":
    kind = config.kind if config.kind != "early_exit" else None
    for name, given in (("kind", kind), ("exit", config.layer), ("step", config.step)):
        if given:
            raise UserError(f"{name}={given}: goes with format=hf; export the run first, then that folder")
    task = _task(source)
    from ee_scale.artifact.onnx import export_onnx  # optional packages

    return export_onnx(source, out, task, int8=config.int8)


def _task(source: Path) -> str:
    """What a stock model folder is for, by its architecture. Raises `UserError` for anything else."""
    if (source / IDENTITY).is_file():
        raise UserError(
            f"src={source}: a tune run; make a stock model of it first (kind=submodel exit=<layer> out=<folder>), "
            "then export that folder with format=onnx"
        )
    if not (source / "config.json").is_file():
        raise UserError(f"src={source}: no readable config.json in it; give a stock model folder")
    values = read_object(source / "config.json")
    if "early_exit" in values:
        raise UserError(
            f"src={source}: a model with exits, which ONNX would leave out; "
            "export one exit of its run with kind=submodel, then that folder with format=onnx"
        )
    names = values.get("architectures")
    names = names if isinstance(names, list) and names else [None]
    for ending, task in TASKS.items():
        if str(names[0]).endswith(ending):
            return task
    raise UserError(f"src={source}: config.architectures={names}; format=onnx knows ...{' and ...'.join(TASKS)}")
