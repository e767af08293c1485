"""What exits read of a frozen backbone, on disk: written once, read in later epochs and by other runs.

    <folder>/<tap>/<first>-<count>.safetensors    state [count, S, D], tokens [count, S]: of consecutive sequences

A file gets its name when it is whole, so what lies there under its name is what is kept; several runs may write at
once. Nothing in it depends on the grid, on the batch or on what the exits train: a state is that of a whole hidden
width, after (or inside) one layer, in the run's dtype. The folder's name says which model and which sequences.
"""

import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from uuid import uuid4

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ee_scale.errors import RunError, UserError
from ee_scale.exits.stage import TuningStage
from ee_scale.files import sync
from ee_scale.log import log
from ee_scale.modeling.heads import ExitSpec
from ee_scale.modeling.kinds import Tap

FINAL = "final"  # the teacher's: the normed state that the lm_head reads
SHARD = re.compile(r"(\d{1,12})-(\d{1,6})\.safetensors")
ABANDONED = 3600  # seconds after which a file without its name belongs to a run that is gone
# Relative distance of what is computed to what is kept: rounding of another grid, batch or machine.
ROUNDING = {torch.float32: 1e-3, torch.bfloat16: 5e-2}


def tap_name(spec: ExitSpec, k: int) -> str:
    """Of what the exit at k reads: kinds that read the hidden state after their layer share it."""
    return f"{k:03d}_{spec.kind}" if spec.exit_kind.tapped else f"{k:03d}"


@dataclass(frozen=True)
class TapShape:
    """One sequence of one tap: [length, width] of a dtype, and its tokens."""

    length: int
    width: int
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return self.length * (self.width * self.dtype.itemsize + torch.int32.itemsize)


def shards(folder: Path, shape: TapShape) -> Iterator[tuple[int, int]]:
    """(first sequence, number of sequences) of the whole files of one tap. One that was cut off is removed."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        found = SHARD.fullmatch(path.name)
        if found is None:
            _remove_abandoned(path)
            continue
        first, count = int(found[1]), int(found[2])
        try:
            with path.open("rb") as file:
                header, size = int.from_bytes(file.read(8), "little"), path.stat().st_size
        except FileNotFoundError:  # another run has removed it, for the reason below
            continue
        if size == 8 + header + count * shape.nbytes:
            yield first, count
        else:
            log.warning("%s: not whole; it is written again", path)
            path.unlink(missing_ok=True)


def _remove_abandoned(path: Path) -> None:
    try:
        if path.name.endswith(".tmp") and time.time() - path.stat().st_mtime > ABANDONED:
            path.unlink()
    except FileNotFoundError:  # another run has given it its name, or removed it
        pass


def kept_sequences(folder: Path, name: str, shape: TapShape, count: int) -> Tensor:
    """Where the first `count` sequences of a tap lie: int64 [count, 2], as `shards` says; -1 for those that do not."""
    places = torch.full((count, 2), -1)
    for first, number in shards(folder / name, shape):
        places[first : first + number] = torch.tensor([first, number])
    return places


@dataclass
class TapCache:
    """One rank's hand on the folder.

    Attributes:
        names: of the taps of all stages.
        there: bool [sequences], the same on all ranks: those of which every tap is kept, or will be when a step that
            needs it runs.
        writes: whether this rank writes what its stage computes (one of a tensor group does).
        proved: whether something that is kept has been compared with what the model computes.
        wrote: whether this rank has kept anything in this run.
    """

    folder: Path
    names: Sequence[str]
    shape: TapShape
    there: Tensor
    writes: bool = True
    proved: bool = False
    wrote: bool = False
    _places: dict[str, Tensor] = field(default_factory=dict)

    def step(self, sequences: Tensor, mine: Tensor) -> "TapStep":
        """What happens in a step on `sequences`, of which `mine` [micro-batches, B] are this replica's.

        A step is read when all of it is kept, so all ranks decide alike without a word. The first one of a run is
        computed and compared.
        """
        held = bool(self.there[sequences].all())
        step = TapStep(self, mine.tolist(), held=held, reads=held and self.proved)
        self.proved |= held
        self.there[sequences] = True
        return step

    def read(self, name: str, sequences: Sequence[int], tokens: Tensor) -> Tensor:
        """[B, S, D] on the CPU. Raises `RunError` where it is not there, or not of these tokens [B, S]."""
        rows = []
        for (first, count), group in groupby(range(len(sequences)), lambda i: self._place(name, sequences[i])):
            path = self._path(name, first, count)
            try:
                with safe_open(path, "pt") as file:
                    states, ids = file.get_slice("state"), file.get_slice("tokens")
                    for i in group:
                        row = sequences[i] - first
                        if not torch.equal(ids[row], tokens[i].int()):
                            raise RunError(f"{path}: taps of other tokens than those of sequence {sequences[i]}")
                        rows.append(states[row])
            except (OSError, SafetensorError) as error:
                raise RunError(f"{path}: cannot read taps ({error}); the same command computes them again") from error
        return torch.stack(rows)

    def write(self, name: str, sequences: Sequence[int], tokens: Tensor, state: Tensor) -> None:
        """Keep what is not there yet of [B, S] and [B, S, D]. Raises `RunError` where the disk is full."""
        missing = [i for i, sequence in enumerate(sequences) if self._known(name)[sequence, 0] < 0]
        for _, group in groupby(enumerate(missing), lambda pair: sequences[pair[1]] - pair[0]):
            rows = [i for _, i in group]
            first, count = sequences[rows[0]], len(rows)
            path = self._path(name, first, count)
            temporary = path.with_name(f".{path.name}.{uuid4().hex}.tmp")
            try:
                path.parent.mkdir(exist_ok=True)
                save_file({"state": state[rows].cpu(), "tokens": tokens[rows].int()}, temporary)
                sync(temporary)
                temporary.replace(path)
            except (OSError, SafetensorError) as error:
                temporary.unlink(missing_ok=True)
                raise RunError(f"{path}: cannot write ({error}); free some space, or data.cache_taps=false") from error
            self._known(name)[first : first + count] = torch.tensor([first, count])

    def compare(self, name: str, sequences: Sequence[int], tokens: Tensor, state: Tensor) -> None:
        """Raises `UserError` where what is kept is further from what was computed than rounding goes."""
        kept, computed = self.read(name, sequences, tokens).float(), state.cpu().float()
        distance = float((kept - computed).norm() / computed.norm())
        if not distance <= ROUNDING[self.shape.dtype]:
            raise UserError(
                f"{self.folder / name}: not what this model computes (relative distance {distance:.2g}); remove "
                f"{self.folder}"
            )

    def _known(self, name: str) -> Tensor:
        if name not in self._places:
            self._places[name] = kept_sequences(self.folder, name, self.shape, len(self.there))
        return self._places[name]

    def _place(self, name: str, sequence: int) -> tuple[int, int]:
        if self._known(name)[sequence, 0] < 0:  # another replica has written it since
            del self._places[name]
        first, count = self._known(name)[sequence].tolist()
        if first < 0:
            raise RunError(f"{self.folder / name}: the tap of sequence {sequence} is gone; the same command goes on")
        return first, count

    def _path(self, name: str, first: int, count: int) -> Path:
        return self.folder / name / f"{first:08d}-{count}.safetensors"


class TapStep:
    """The taps of one replica in one step: computed and kept, or read. `held`: all of them are kept already."""

    def __init__(self, cache: TapCache, sequences: list[list[int]], *, held: bool, reads: bool):
        self.cache, self.held, self.reads = cache, held, reads
        self._sequences = iter(sequences)
        self._loaded: dict[int, tuple[list[int], Tensor]] = {}

    def load(self, buffer: int, tokens: Tensor) -> None:
        """The next micro-batch, [B, S], is in this buffer."""
        self._loaded[buffer] = next(self._sequences), tokens.cpu()

    def keep(self, buffer: int, stage: TuningStage, taps: dict[int, Tap], final: Tensor | None) -> None:
        """Write what a stage has computed, or compare it with what is kept."""
        if not self.cache.writes:
            return
        where = self._loaded.pop(buffer)
        if not self.cache.wrote:
            check_taps(stage, taps)
            self.cache.wrote = True
        states = {tap_name(stage.spec, k): tap.residual for k, tap in taps.items()}
        if final is not None:
            states[FINAL] = final
        for name, state in states.items():
            if self.held:
                self.cache.compare(name, *where, state)
            else:
                self.cache.write(name, *where, state)

    def read(self, buffer: int, stage: TuningStage, device: torch.device) -> tuple[dict[int, Tap], Tensor | None]:
        """What the exits of a stage read, and the teacher's state if there is one."""
        where = self._loaded.pop(buffer)
        if not stage.exit_layers:
            return {}, None
        taps = {k: stage.tap(k, self.cache.read(tap_name(stage.spec, k), *where).to(device)) for k in stage.exit_layers}
        return taps, self.cache.read(FINAL, *where).to(device) if FINAL in self.cache.names else None


def check_taps(stage: TuningStage, taps: dict[int, Tap]) -> None:
    """Raises `UserError` if what an exit reads does not follow from its residual (a kind from elsewhere)."""
    for k, tap in taps.items():
        again = stage.tap(k, tap.residual).mlp_input
        if (again is None) != (tap.mlp_input is None) or (again is not None and not torch.equal(again, tap.mlp_input)):
            raise UserError(
                f"data.cache_taps=true with exits.kind={stage.spec.kind}: what the kind reads does not follow from the "
                "residual as its method `tap` says; use data.cache_taps=false"
            )
