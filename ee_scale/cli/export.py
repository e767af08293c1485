"""`ee-scale export`: files that transformers, or an ONNX runtime, opens."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from ee_scale.artifact.export import export_bytes, export_early_exit, export_sidecar
from ee_scale.artifact.run_folder import IDENTITY, read_run
from ee_scale.artifact.submodel import export_submodel
from ee_scale.cli.console import console
from ee_scale.config.schema import ExportConfig
from ee_scale.errors import UserError
from ee_scale.reading import read_object

if TYPE_CHECKING:
    from ee_scale.artifact.onnx import OnnxReport

TASKS = {"ForCausalLM": "causal_lm", "ForSequenceClassification": "classify"}


def run(config: ExportConfig, overrides: Sequence[str]) -> int:
    """Write the folder `out`."""
    source, out = Path(config.src).expanduser(), Path(config.out).expanduser()
    err = console(stderr=True)
    if config.format == "onnx":
        _export_onnx(config, source, out, err)
    else:
        _export_run(config, source, out, err)
    err.print(f"wrote {out}", highlight=False)
    return 0


def _export_run(config: ExportConfig, source: Path, out: Path, err: Console) -> None:
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
        columns = (TextColumn("copying the base model"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
            task = bar.add_task("", total=export_bytes(source))
            export_early_exit(source, out, config.step, lambda size: bar.advance(task, size))


def _export_onnx(config: ExportConfig, source: Path, out: Path, err: Console) -> None:
    kind = config.kind if config.kind != "early_exit" else None
    for name, given in (("kind", kind), ("exit", config.layer), ("step", config.step)):
        if given:
            raise UserError(f"{name}={given}: goes with format=hf; export the run first, then that folder")
    task = _task(source)
    from ee_scale.artifact.onnx import export_onnx  # optional packages

    with err.status("exporting, and checking against torch"):
        report = export_onnx(source, out, task, int8=config.int8)
    _show(report, config.int8)


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


def _show(report: "OnnxReport", int8: bool) -> None:
    """What the file is worth, on stdout."""
    size = sum(report.files.values()) / 1e6
    console().print(
        f"{'int8' if int8 else 'fp32'} {size:.1f} MB   largest logit difference to torch "
        f"{report.largest_difference:.2g} of {report.logit_scale:.3g}   same top answer {report.agreement:.1%}   "
        f"{report.tokens} tokens: onnxruntime {report.onnx_ms:.1f} ms, torch {report.torch_ms:.1f} ms",
        highlight=False,
    )
