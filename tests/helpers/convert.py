"""Run a conversion in this process."""

from pathlib import Path
from typing import Any

from ee_scale.config.convert import ConvertConfig
from ee_scale.conversion.execute import run
from ee_scale.conversion.plan import make_conversion


def convert(src: Path, out: Path, to: str, **changes: Any) -> Path:
    """Write `out` and return it; `changes`: fields of `ConvertConfig`."""
    run(make_conversion(ConvertConfig(src=src, out=out, to=to, **changes)), 2, lambda size: None)
    return out
