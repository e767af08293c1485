"""`ee-scale export`: files that transformers, an ONNX runtime or llama.cpp opens."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ee_scale import api
from ee_scale.cli.console import console
from ee_scale.config.schema import ExportConfig

if TYPE_CHECKING:
    from ee_scale.artifact.gguf_export import GGUFReport
    from ee_scale.artifact.onnx import OnnxReport


def run(config: ExportConfig, overrides: Sequence[str]) -> int:
    """Write `out`, and tell on stdout what a file of another program is worth."""
    err = console(stderr=True)
    if config.format == "onnx":
        with err.status("exporting, and checking against torch"):
            exported = api.export(config)
    else:
        exported = api.export(config)
    if exported.onnx is not None:
        console().print(_onnx_line(exported.onnx, config.int8), highlight=False)
    if exported.gguf is not None:
        console().print(_gguf_line(exported.gguf), highlight=False)
    if exported.drafter is not None:
        from ee_scale.palettes.draft_report import pair_words

        console().print(pair_words(exported.drafter), highlight=False)
    err.print(f"wrote {Path(config.out).expanduser()}", highlight=False)
    return 0


def _onnx_line(report: "OnnxReport", int8: bool) -> str:
    size = sum(report.files.values()) / 1e6
    return (
        f"{'int8' if int8 else 'fp32'} {size:.1f} MB   largest logit difference to torch "
        f"{report.largest_difference:.2g} of {report.logit_scale:.3g}   same top answer {report.agreement:.1%}   "
        f"{report.tokens} tokens: onnxruntime {report.onnx_ms:.1f} ms, torch {report.torch_ms:.1f} ms"
    )


def _gguf_line(report: "GGUFReport") -> str:
    kinds = ", ".join(f"{count} {name.lower()}" for name, count in report.kinds.items())
    return f"{report.nbytes / 1e6:.1f} MB   tensors: {kinds}   read back: as far from the model as these types round"
