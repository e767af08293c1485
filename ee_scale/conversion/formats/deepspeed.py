"""DeepSpeed checkpoints as a source: ZeRO 0 to 3, without tensor or pipeline parallelism.

ZeRO 0 has every weight whole in one file, which is read in place. ZeRO 1 to 3 have the fp32 master weights in flat
parts, in the optimizer files of the ranks. DeepSpeed's own tool puts those together; for as long as a conversion runs,
they lie in one file beside its output (`.<out>.staging`), and are read from there like those of any other source.

The tool does not stream. ZeRO 1 and 2: it holds all trained weights in fp32 (4 bytes each), and before that the model
file (mostly 2 bytes each). ZeRO 3: the parts stay on disk, one tensor at a time is put together; frozen weights are
held. Its own writing of safetensors is not used: it fails on tied weights. It also leaves out what ZeRO 1 does not
train; up to ZeRO 2 such weights are taken as they lie, whole, in the model file.
"""

import contextlib
import io
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import IO

import torch
from transformers import PreTrainedConfig

from ee_scale.artifact.hf_folder import write_index
from ee_scale.artifact.trained_base import EMBEDDING, HEAD
from ee_scale.backbone.exit_layers import exits_of
from ee_scale.conversion.execute import SLACK, Conversion, check_source, source_of, with_dtypes
from ee_scale.conversion.folders import hugging_face_part
from ee_scale.conversion.formats.deepspeed_files import harmless, scan, tag_folder
from ee_scale.conversion.formats.huggingface import (
    DROPPED,
    check_tensors,
    expert_by_expert,
    target_files,
    whole_piece,
)
from ee_scale.conversion.model import ADAPTER, Model, Opened
from ee_scale.conversion.target_files import reserve
from ee_scale.conversion.tensors import Extent, Piece, Stored, TensorInfo
from ee_scale.conversion.unpickle import known_globals, reads_strangers
from ee_scale.conversion.values import Values
from ee_scale.errors import UserError, one_line

# Modules around modules: of torch.compile, FSDP, activation checkpointing; of DistributedDataParallel, Lightning, peft.
INSIDE = re.compile(r"\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
OUTSIDE = re.compile(r"^(module\.|_forward_module\.|base_model\.model\.(?=model\.|lm_head\.))+")


@dataclass(frozen=True)
class Bare:
    """Weights without a config: names and shapes, and nothing else is known."""

    tensors: dict[str, TensorInfo]
    dtype: torch.dtype
    config: None = None
    exits: None = None
    padded_vocab: int = 0

    def info(self) -> dict[str, TensorInfo]:
        """As `Model.info`."""
        return self.tensors


@dataclass(frozen=True)
class Staging:
    """The file of tensors that were in parts.

    Attributes:
        extents: by DeepSpeed's names; left: bytes that the conversion writes besides; values: sees every
            weight on its way.
    """

    tag: Path
    file: Path
    stage: int
    extents: dict[str, Extent]
    left: int
    trust: bool
    values: Values

    @contextlib.contextmanager
    def filled(self) -> Iterator[None]:
        """Inside the block the file is there. Raises `UserError`."""
        folder, size = self.file.parent, sum(extent.nbytes for extent in self.extents.values())
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
        try:
            self._make(folder, size)
            yield
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _make(self, folder: Path, size: int) -> None:
        needed = size + self.left + SLACK
        try:
            folder.mkdir(parents=True)
            free = shutil.disk_usage(folder).free
            if needed > free:
                raise UserError(
                    f"out={_out(folder)}: needs {needed / 1e9:.2f} GB of disk, {size / 1e9:.2f} of them for a while to "
                    f"put the parts of ZeRO together; {free / 1e9:.2f} GB are free there"
                )
            with self.file.open("wb") as file:
                reserve(file.fileno(), size)
                self._gather(file)
        except OSError as error:
            raise UserError(f"out={_out(folder)}: cannot put the parts of ZeRO together beside it ({error})") from error
        # What was interrupted goes on only with the same source: the file is as old as what it is made of.
        newest = max(path.stat().st_mtime_ns for path in self.tag.glob("*_states.pt"))
        os.utime(self.file, ns=(newest, newest))

    def _gather(self, file: IO[bytes]) -> None:
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        try:
            with _quiet(), contextlib.nullcontext() if self.trust else only_listed():
                tensors = get_fp32_state_dict_from_zero_checkpoint(
                    str(self.tag.parent), self.tag.name, exclude_frozen_parameters=self.stage < 3, lazy_mode=True
                )
            for name, extent in self.extents.items():
                master = tensors.pop(name).contiguous()
                tensor = master.to(extent.dtype)
                self.values.look(name, master, tensor)
                if tensor.shape != extent.shape:
                    raise ValueError(f"'{name}' came out as {list(tensor.shape)} instead of {list(extent.shape)}")
                file.seek(extent.offset)
                file.write(memoryview(tensor.view(torch.uint8).numpy()).cast("B"))
        except (OSError, UserError):
            raise
        except Exception as error:  # the tool has no error type of its own
            reason = f"{type(error).__name__}: {one_line(error)}"
            raise UserError(f"{self.tag}: DeepSpeed cannot put it together ({reason})") from error


@reads_strangers
def open_folder(
    src: Path,
    staging: Path,
    *,
    model_folder: Path | None,
    dtype: torch.dtype | None,
    trust: bool = False,
    bare: bool = False,
) -> Opened:
    """A save of DeepSpeed. Nothing is written before `Opened.staging` is filled.

    `src`: the folder with the file `latest`, or that of one tag; `staging`: where to put parts together; `dtype`: what
    they become (None: fp32); `model_folder`: Hugging Face folder of the same model; `bare`: go on without its config.
    Raises `UserError`.
    """
    tag = tag_folder(src)
    root = src if tag != src else src.parent
    if model_folder is None and (root / "config.json").is_file():  # as the Trainer of transformers leaves it
        model_folder = root
    small, config = hugging_face_part(root, model_folder)
    if config is None and not bare:
        raise UserError("model: DeepSpeed saves no config; give model=<Hugging Face folder of the same model>")
    save = scan(tag, trust)
    extents, at = dict(save.whole), 0
    file, dtype = staging / "weights.bin", dtype or torch.float32
    for name, shape in save.parts.items():
        extents[name] = Extent(file, at, shape, dtype)
        at += extents[name].nbytes
    parts = {name: extents[name] for name in save.parts}
    extents |= {name: extents[first] for name, first in save.same.items() if first in extents}
    extents = _renamed(tag, extents)
    if config is not None:
        extents = expert_by_expert(tag, config, extents)
    model = _model(tag, config, extents)
    info = model.info()
    stored = [Stored(whole_piece(name, info[name]), extents[name]) for name in info]
    left = sum(torch.Size(one.shape).numel() for one in info.values()) * dtype.itemsize
    staged = Staging(tag, file, save.stage, parts, left, trust, Values()) if parts else None
    return Opened("deepspeed", tag, model, stored, small=small, notes=save.notes, staging=staged)


def bare_conversion(opened: Opened, out: Path, shard_bytes: int, dtype: torch.dtype | None) -> Conversion:
    """Plain safetensors of weights without a config; numbers that are not floats stay what they are."""
    source = source_of(opened)
    files = target_files(opened.model, (dtype or torch.float32).itemsize, shard_bytes)
    with_dtypes(files, source, None, opened.model.dtype)
    for file in files:
        file.pieces = [_as_float(piece, dtype or opened.model.dtype) for piece in file.pieces]

    def finish(folder: Path) -> None:
        write_index(folder, {piece.key: file.name for file in files for piece in file.pieces})

    conversion = Conversion(opened, source, files, finish, out)
    check_source(conversion)
    conversion.notes += [*opened.notes, "no model=: weights and their index are written, without config and tokenizer"]
    if adapters := [name for name in opened.model.info() if ADAPTER.search(name)]:
        conversion.notes.append(f"{len(adapters)} tensors of an adapter ({adapters[0]}, ...) keep their names")
    return conversion


@contextlib.contextmanager
def only_listed() -> Iterator[None]:
    """Inside, torch.load runs nothing of a file, whatever its caller asks for (DeepSpeed asks for everything)."""
    names = ("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD")  # torch refuses both at once
    before = {name: os.environ.pop(name) for name in names if name in os.environ}
    os.environ[names[0]] = "1"
    try:
        with known_globals(harmless()):
            yield
    finally:
        del os.environ[names[0]]
        os.environ.update(before)


def _renamed(tag: Path, extents: dict[str, Extent]) -> dict[str, Extent]:
    """Without what wrappers put before or into names; without old buffers."""
    found: dict[str, Extent] = {}
    for name, extent in extents.items():
        short = OUTSIDE.sub("", INSIDE.sub("", name))
        if short in found:
            raise UserError(f"{tag}: two weights are called '{short}' without their wrappers")
        if not short.endswith(DROPPED):
            found[short] = extent
    return found


def _model(tag: Path, config: PreTrainedConfig | None, extents: dict[str, Extent]) -> Model | Bare:
    """What the weights are, checked against the config; takes a tied head out of `extents`. Raises `UserError`."""
    floats = [extent.dtype for extent in extents.values() if extent.dtype.is_floating_point]
    dtype = reduce(torch.promote_types, floats) if floats else torch.float32
    if config is None:
        return Bare({name: TensorInfo(extent.shape) for name, extent in extents.items()}, dtype)
    if config.tie_word_embeddings and extents.pop(HEAD, extents.get(EMBEDDING)) != extents.get(EMBEDDING):
        raise UserError(f"{tag}: '{HEAD}' is not tied to the embedding, but the config says tie_word_embeddings=true")
    exits = exits_of(tag, config)
    model = Model(config, exits, dtype, config.vocab_size)
    check_tensors(tag, extents, model.info())
    return model


def _as_float(piece: Piece, dtype: torch.dtype) -> Piece:
    return replace(piece, dtype=dtype) if piece.dtype.is_floating_point else piece


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """DeepSpeed's tool prints, and draws bars."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def _out(staging: Path) -> Path:
    return staging.with_name(staging.name.removeprefix(".").removesuffix(".staging"))
