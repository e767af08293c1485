"""`ee-scale export`: files that transformers, or an ONNX runtime, opens."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ee_scale import api
from ee_scale.cli.console import console
from ee_scale.config.schema import ExportConfig

if TYPE_CHECKING:
    from ee_scale.artifact.onnx import OnnxReport


def run(config: ExportConfig, overrides: Sequence[str]) -> int:
    """Write the folder `out`."""
    err = console(stderr=True)
    if config.format == "onnx":
        with err.status("exporting, and checking against torch"):
            report = api.export(config).onnx
        assert report is not None  # every ONNX file comes with one
        _show(report, config.int8)
    else:
        api.export(config)
    err.print(f"wrote {Path(config.out).expanduser()}", highlight=False)
    return 0


def _show(report: "OnnxReport", int8: bool) -> None:
    """What the file is worth, on stdout."""
    size = sum(report.files.values()) / 1e6
    console().print(
        f"{'int8' if int8 else 'fp32'} {size:.1f} MB   largest logit difference to torch "
        f"{report.largest_difference:.2g} of {report.logit_scale:.3g}   same top answer {report.agreement:.1%}   "
        f"{report.tokens} tokens: onnxruntime {report.onnx_ms:.1f} ms, torch {report.torch_ms:.1f} ms",
        highlight=False,
    )
