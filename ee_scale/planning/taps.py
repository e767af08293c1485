"""How much a run keeps on disk of what its exits read, and whether there is room."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from ee_scale.config.tune import TuneConfig
from ee_scale.data.text import cache_root
from ee_scale.errors import UserError
from ee_scale.exits.taps import FINAL, TapShape, kept_sequences, tap_name
from ee_scale.modeling.heads import ExitSpec
from ee_scale.planning.fits import bytes_text, is_bf16


@dataclass(frozen=True)
class KeptTaps:
    """What is kept.

    Attributes:
        names: of the taps, of all stages.
        shape: of one sequence of one tap.
        distinct: sequences that the run's data has; `read`: the first of them, which the run reads.
    """

    names: tuple[str, ...]
    shape: TapShape
    distinct: int
    read: int

    @classmethod
    def of(cls, config: TuneConfig, spec: ExitSpec, width: int) -> "KeptTaps":
        """Of a run with these exits on a model of this hidden size."""
        names = [tap_name(spec, k) for k in spec.layers] + ([FINAL] if config.exits.kl_weight > 0 else [])
        dtype = torch.bfloat16 if is_bf16(config) else torch.float32
        samples = config.train.steps * config.train.global_batch_size
        distinct = config.data.sequences or samples
        return cls(tuple(names), TapShape(config.data.seq_length, width, dtype), distinct, min(distinct, samples))

    @property
    def nbytes(self) -> int:
        """Of a whole cache."""
        return self.read * len(self.names) * self.shape.nbytes

    def there(self, folder: Path) -> torch.Tensor:
        """bool [taps, distinct]: what a folder has."""
        found = [kept_sequences(folder, name, self.shape, self.distinct)[:, 0] >= 0 for name in self.names]
        return torch.stack(found)

    def missing(self, folder: Path) -> int:
        """Bytes that the run would add to a folder."""
        return int((~self.there(folder)[:, : self.read]).sum()) * self.shape.nbytes

    def words(self, cache_dir: str | None) -> str:
        """For a person, before anything is written."""
        root = cache_root(cache_dir)
        each = bytes_text(len(self.names) * self.shape.nbytes)
        free = bytes_text(shutil.disk_usage(root).free)
        return f"up to {bytes_text(self.nbytes)} ({self.read:,} sequences of {each}) in {root}, which has {free} free"


def check_room(kept: KeptTaps, folder: Path) -> None:
    """Raises `UserError` if the disk of a folder has less room than what a run will add to it."""
    needed, free = kept.missing(folder), shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"data.cache_taps=true: {bytes_text(needed)} are needed, {bytes_text(free)} are free in {folder}; choose "
            "another data.cache_dir, or fewer data.sequences"
        )
