"""The folder that keeps what a run's exits read: which one it is, and each rank's hand on it."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ee_scale.backbone.fingerprint import fingerprint
from ee_scale.data.text import cache_root
from ee_scale.errors import UserError
from ee_scale.exits.taps import TapCache
from ee_scale.files import write_text
from ee_scale.grid import Grid
from ee_scale.log import log
from ee_scale.planning.fits import bytes_text
from ee_scale.planning.taps import KeptTaps, check_room
from ee_scale.planning.tune import TunePlan

FORMAT = 1
ABOUT = "about.json"


def prepare_taps(plan: TunePlan, kept: KeptTaps, data: Mapping[str, Any]) -> Path:
    """The folder for this model on these sequences, made if missing; `data`: which data it is.

    Raises `UserError` if its disk is too small for what the run adds.
    """
    config = plan.config
    identity = {
        "format": FORMAT,
        "model": fingerprint(plan.model_dir),
        "attn_implementation": config.model.attn_implementation,
        "dtype": str(kept.shape.dtype).removeprefix("torch."),
        "seq_length": config.data.seq_length,
        "sequences": kept.distinct,
        "seed": config.data.seed,
        "weights": config.data.weights,
        "own_text_share": config.data.own_text,
        **data,
    }
    text = json.dumps(identity, indent=1, sort_keys=True) + "\n"
    root = cache_root(config.data.cache_dir)
    folder = root / f"taps-{hashlib.sha256(text.encode()).hexdigest()[:32]}"
    try:
        folder.mkdir(exist_ok=True)
        if not (folder / ABOUT).is_file():
            write_text(folder / ABOUT, text)
    except OSError as error:
        raise UserError(f"data.cache_dir='{root}': cannot write ({error.strerror})") from error
    check_room(kept, folder)
    return folder


def open_taps(kept: KeptTaps, folder: Path | None, grid: Grid) -> TapCache:
    """This rank's hand on the folder, which is known on rank 0. All ranks call it."""
    found = None
    if grid.rank == 0:
        assert folder is not None  # rank 0 has prepared the run
        there = kept.there(folder).all(0)
        added = bytes_text(kept.missing(folder)) or "nothing"
        log.info("taps: %s to be written, %s kept already; %s", added, _share(there.float().mean().item()), folder)
        found = folder, there
    folder, there = grid.from_rank_0(found)
    return TapCache(folder, kept.names, kept.shape, there, writes=grid.tp_rank == 0)


def _share(part: float) -> str:
    return f"{part:.0%} of the sequences"
