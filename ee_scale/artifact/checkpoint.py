"""Checkpoints of a run (here of tune): only what was trained, in whole fp32 tensors, so that any grid reads any grid's.

<out>/checkpoints/step_00000500/
    exits_003.safetensors       parameters of the exit at layer 3
    optimizer_003.safetensors   AdamW moments of the same
    state.json                  step, position in the data, and a digest of every file (and of itself)
"""

import re
from pathlib import Path
from typing import Any

from ee_scale.reading import Count, check_fields, check_files, read_json
from ee_scale.training.recipe import BEST

STATE = "state.json"
COUNTS = ("consumed_samples", "steps", "recipe_stage")  # what the state of some runs has besides


def checkpoints(root: Path) -> dict[int, Path]:
    """Finished checkpoints below `root`, by step. What a killed save left behind does not count."""
    found = {}
    for path in sorted(root.glob("step_*")) if root.is_dir() else []:
        if re.fullmatch(r"step_\d{8}", path.name):
            found[int(path.name.removeprefix("step_"))] = path
    return found


def read_checkpoint(folder: Path) -> dict[str, Any]:
    """The state of a checkpoint after all its files were compared with their digests. Raises `UserError`."""
    state = read_json(folder / STATE)
    check_fields(state, folder / STATE, files=dict[str, str], step=Count)
    check_fields(state, folder / STATE, **{name: Count for name in COUNTS if name in state})
    if BEST in state:
        check_fields(state, folder / STATE, best=dict[str, Any])
        check_fields(state[BEST], folder / STATE, step=Count, loss=float, worse=Count)
    check_files(folder, state["files"])
    return state
