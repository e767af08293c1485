"""Deprecated calls that our own code makes are errors; what other libraries do among themselves passes.

The module that a warning is attributed to does not tell: transformers warns from a wrapper, whose caller is
`torch.nn.Module.__call__`. So the stack is looked at.
"""

import sys
import warnings
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).resolve().parents[2]
OURS = (*(f"{ROOT / folder}/" for folder in ("ee_scale", "tests", "scripts")), "/transformers_modules/")
# They stand between a call and what is called.
BETWEEN = (
    "/torch/nn/modules/module.py",
    "/torch/utils/_contextlib.py",
    "/transformers/utils/deprecation.py",
    "/transformers/utils/generic.py",
    "/contextlib.py",
    "/functools.py",
)


class OurCalls:
    """In the place of a filter's module pattern: matches what is attributed to our code, and what it calls that warns.

    What Python functions do not say themselves comes from compiled code: there the frame is the caller's already.
    """

    def match(self, module: str) -> bool:
        frame = sys._getframe(1)
        while frame is not None and frame.f_code.co_filename.endswith("/warnings.py"):
            frame = frame.f_back
        if module.startswith("ee_scale") or _is_ours(frame):
            return True
        return frame is not None and "warn" in frame.f_code.co_names and _is_ours(_caller(frame))


def forbid_deprecated_calls() -> None:
    """From now on, in this process or until `warnings.catch_warnings` ends."""
    for category in (FutureWarning, DeprecationWarning):
        warnings.filters.insert(0, ("error", None, category, OurCalls(), 0))
    warnings.simplefilter("default", BytesWarning, append=True)  # tells Python that its filters have changed


def _caller(frame: FrameType) -> FrameType | None:
    caller = frame.f_back
    # Calls of others pass through a `__torch_function__`, whoever wrote it.
    while caller is not None and (
        caller.f_code.co_filename.endswith(BETWEEN) or caller.f_code.co_name == "__torch_function__"
    ):
        caller = caller.f_back
    return caller


def _is_ours(frame: FrameType | None) -> bool:
    return frame is not None and any(place in frame.f_code.co_filename for place in OURS)
