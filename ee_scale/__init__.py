"""Early exits and edge-size subnets for frozen Hugging Face models.

model = ee_scale.EarlyExitForCausalLM.from_pretrained("folder")

`ee_scale.tune(config)` and the other commands as functions: see `ee_scale.api`.
"""

import importlib
from typing import Any

__version__ = "0.1.0"
_FUNCTIONS = ("calibrate", "convert", "defer", "evaluate", "export", "generate", "palette", "supernet", "tune")
_HOMES = {"EarlyExitForCausalLM": "ee_scale.inference.model", "UserError": "ee_scale.errors"}
_HOMES |= dict.fromkeys(_FUNCTIONS, "ee_scale.api")
__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    # On first use: `import ee_scale` and `ee-scale --help` stay quick.
    if name not in _HOMES:
        raise AttributeError(f"module 'ee_scale' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)
