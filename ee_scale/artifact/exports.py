"""What an `export` config asks for."""

from pathlib import Path
from typing import TYPE_CHECKING

from ee_scale.artifact.export import export_bytes, export_early_exit, export_sidecar
from ee_scale.artifact.run_folder import IDENTITY, read_run
from ee_scale.artifact.submodel import export_submodel
from ee_scale.backbone.model_path import plain_folder
from ee_scale.config.schema import ExportConfig
from ee_scale.errors import UserError
from ee_scale.progress import shares, transfer
from ee_scale.reading import read_object

if TYPE_CHECKING:
    from ee_scale.artifact.gguf_export import GGUFReport
    from ee_scale.artifact.onnx import OnnxReport

TASKS = {"ForCausalLM": "causal_lm", "ForSequenceClassification": "classify"}


def run_export(config: ExportConfig) -> None:
    """Write the folder `out`, of a run. Raises `UserError`."""
    check_given(config)
    source, out = Path(config.src).expanduser(), Path(config.out).expanduser()
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


def run_onnx(config: ExportConfig) -> "OnnxReport":
    """Write the folder `out`, of a stock model, and tell what it is worth. Raises `UserError`."""
    source, task = _stock(config)
    from ee_scale.artifact.onnx import export_onnx  # optional packages

    return export_onnx(source, Path(config.out).expanduser(), task, int8=config.int8)


def run_gguf(config: ExportConfig) -> "GGUFReport":
    """The same of the file `out` for llama.cpp."""
    source, task = _stock(config)
    if task != "causal_lm":
        raise UserError(f"src={source}: a model for '{task}'; format=gguf writes causal language models")
    from ee_scale.artifact.gguf_export import export_gguf  # optional package

    with shares("writing, and reading back") as advance:
        return export_gguf(source, Path(config.out).expanduser(), config.type, advance)


def _stock(config: ExportConfig) -> tuple[Path, str]:
    """The stock model folder that `src` names, and what it is for."""
    check_given(config)
    kind = config.kind if config.kind != "early_exit" else None
    for name, given in (("kind", kind), ("exit", config.layer), ("step", config.step)):
        if given:
            raise UserError(f"{name}={given}: goes with format=hf; export the run first, then that folder")
    source = plain_folder(Path(config.src).expanduser())
    return source, _task(source, config.format)


def check_given(config: ExportConfig) -> None:
    """Raises `UserError` for a setting of another format or kind than the one that is written."""
    for name, given, goes in (("int8", config.int8, "onnx"), ("type", config.type, "gguf")):
        if given and config.format != goes:
            given = str(given).lower()
            raise UserError(
                f"{name}={given}: goes with format={goes}; transformers' own files keep the number type of the model"
            )
    for name, value in (("base", config.base), ("data", config.data)):
        if value is not None and config.kind != "drafter":
            raise UserError(f"{name}={value}: goes with kind=drafter")


def _task(source: Path, wanted: str) -> str:
    """What a stock model folder is for, by its architecture. Raises `UserError` for anything else."""
    if (source / IDENTITY).is_file():
        raise UserError(
            f"src={source}: a tune run; make a stock model of it first (kind=submodel exit=<layer> out=<folder>), "
            f"then export that folder with format={wanted}"
        )
    if not (source / "config.json").is_file():
        raise UserError(f"src={source}: no readable config.json in it; give a stock model folder")
    values = read_object(source / "config.json")
    if "early_exit" in values:
        raise UserError(
            f"src={source}: a model with exits, which {wanted.upper()} would leave out; "
            f"export one exit of its run with kind=submodel, then that folder with format={wanted}"
        )
    names = values.get("architectures")
    names = names if isinstance(names, list) and names else [None]
    for ending, task in TASKS.items():
        if str(names[0]).endswith(ending):
            return task
    raise UserError(f"src={source}: config.architectures={names}; format={wanted} knows ...{' and ...'.join(TASKS)}")
