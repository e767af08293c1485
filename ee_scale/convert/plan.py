"""From settings to a conversion: open the source, choose the target's files."""

from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ee_scale.convert import deepspeed, huggingface, mp_rank, mp_rank_reader, torch_dist, torch_dist_reader
from ee_scale.convert.args import flags_to_pass, to_args
from ee_scale.convert.exits import check_old_classes
from ee_scale.convert.files import TargetFile
from ee_scale.convert.folders import HF_PART, TRACKER, detect, iteration_folder, saved_by_deepspeed
from ee_scale.convert.job import Conversion, check_source, source_of, with_dtypes
from ee_scale.convert.model import Model, Opened, padded
from ee_scale.convert.stages import deal_layers
from ee_scale.errors import UserError
from ee_scale.files import write_text

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
RELEASE, FIRST = "release", "iter_0000001"  # EE-LLM cannot load a release
Finish = Callable[[Path], None]


@dataclass(frozen=True)
class Settings:
    """What a person chose; see the help lines of `ConvertConfig`."""

    src: Path
    out: Path
    to: str
    source: str = "auto"
    tp: int = 1
    pp: int = 1
    first_stage_layers: int | None = None
    last_stage_layers: int | None = None
    dtype: str = "auto"
    classes: str = "auto"
    spec: str = "te"
    model: Path | None = None
    iteration: int | None = None
    shard_gb: float = 5.0
    vocab_divisor: int = 128
    trust: bool = False

    @property
    def uneven(self) -> tuple[int | None, int | None]:
        """Layers of the first and of the last stage where these were chosen."""
        return self.first_stage_layers, self.last_stage_layers


def open_checkpoint(settings: Settings) -> Opened:
    """The source, whatever its format. Raises `UserError`."""
    kind = detect(settings.src, settings.iteration)
    if settings.source == "deepspeed" and kind == "hf" and saved_by_deepspeed(settings.src):
        kind = "deepspeed"  # both lie in a folder of transformers' Trainer
    if settings.source not in ("auto", kind):
        raise UserError(f"from={settings.source}: {settings.src} is of format {kind}")
    if kind in ("sidecar", "hf"):
        return huggingface.find_folder(settings.src)
    if kind == "deepspeed":
        return _open_deepspeed(settings)
    iteration = iteration_folder(settings.src, settings.iteration)
    reader = torch_dist_reader if kind == "megatron_core" else mp_rank_reader
    root = settings.src if iteration != settings.src else settings.src.parent
    return reader.open_folder(root, iteration, settings.model, settings.trust)


def _open_deepspeed(settings: Settings) -> Opened:
    if settings.iteration is not None:
        raise UserError(
            f"iteration={settings.iteration}: DeepSpeed saves under tags; give the folder of one tag as src"
        )
    if settings.to == "sidecar":
        raise UserError("to=sidecar: not from DeepSpeed in one step; convert to=hf, and that folder to=sidecar")
    return deepspeed.open_folder(
        settings.src,
        settings.out.with_name(f".{settings.out.name}.staging"),
        model_folder=settings.model,
        dtype=DTYPES.get(settings.dtype),
        trust=settings.trust,
        bare=settings.to == "hf",
    )


def open_result(settings: Settings, folder: Path) -> Opened:
    """What was written, opened like any checkpoint."""
    kind = settings.to if settings.to != "sidecar" else "auto"
    return open_checkpoint(Settings(src=folder, out=folder, to=settings.to, source=kind))


def make_conversion(settings: Settings) -> Conversion:
    """The whole plan; no tensor is read and nothing is written. Raises `UserError`."""
    for name in ("tp", "pp", "vocab_divisor"):
        if getattr(settings, name) < 1:
            raise UserError(f"{name}={getattr(settings, name)}: must be at least 1")
    for name in ("first_stage_layers", "last_stage_layers"):
        if (count := getattr(settings, name)) is not None and not settings.to.startswith("megatron"):
            raise UserError(f"{name}={count}: to={settings.to} has no pipeline stages")
    if settings.shard_gb <= 0:
        raise UserError(f"shard_gb={settings.shard_gb}: must be above 0")
    opened = open_checkpoint(settings)
    source = source_of(opened)
    dtype = DTYPES.get(settings.dtype)
    if opened.model.config is None:
        return deepspeed.bare_conversion(opened, settings.out, int(settings.shard_gb * 1e9), dtype)
    if opened.format == "deepspeed":  # masters in fp32 beside frozen weights in bf16: one type for all
        dtype = dtype or opened.model.dtype
    model = replace(opened.model, dtype=dtype or opened.model.dtype)
    if settings.to.startswith("megatron"):
        words = model.map.shape.vocab_size
        model = replace(model, padded_vocab=padded(words, settings.vocab_divisor, settings.tp))
    opened = replace(opened, model=replace(model, padded_vocab=opened.model.padded_vocab))
    files, finish = {
        "hf": _to_hf,
        "sidecar": _to_sidecar,
        "megatron_core": _to_torch_dist,
        "megatron_legacy": _to_mp_rank,
    }[settings.to](settings, opened, model)
    with_dtypes(files, source, dtype or (torch.float32 if settings.to == "sidecar" else None), model.dtype)
    if settings.to == "megatron_core":
        torch_dist.unify_dtypes(files)
    conversion = Conversion(opened, source, files, finish, settings.out, list(opened.notes))
    check_source(conversion)
    if settings.to == "hf" and not huggingface.has_tokenizer(opened):
        conversion.notes.append(
            f"no tokenizer came with {settings.src}: give model=<Hugging Face folder of the same model> to copy it"
        )
    if settings.to.startswith("megatron"):
        flags = " ".join(flags_to_pass(model.config, settings.uneven))
        conversion.notes.append(f"--use-checkpoint-args does not restore these, pass them to Megatron-LM: {flags}")
    return conversion


def _to_hf(settings: Settings, opened: Opened, model: Model) -> tuple[list[TargetFile], Finish]:
    files = huggingface.target_files(model, model.dtype.itemsize, int(settings.shard_gb * 1e9))
    return files, lambda folder: huggingface.finish_folder(folder, opened, model.dtype, files)


def _to_sidecar(settings: Settings, opened: Opened, model: Model) -> tuple[list[TargetFile], Finish]:
    if model.exits is None:
        raise UserError(f"to=sidecar: {settings.src} has no exits")
    if settings.model is None:
        raise UserError("to=sidecar: give model=<Hugging Face folder of the base model>, which the sidecar will name")
    huggingface.check_base(settings.model, opened)
    files = [huggingface.sidecar_file(model)]
    return files, lambda folder: huggingface.finish_sidecar(folder, model, settings.model)


def _to_torch_dist(settings: Settings, opened: Opened, model: Model) -> tuple[list[TargetFile], Finish]:
    counts, args = _stages(settings, model)
    files = torch_dist.target_files(model, settings.tp, counts, RELEASE)

    def finish(folder: Path) -> None:
        torch_dist.finish_folder(folder / RELEASE, model, args, counts, files)
        _finish_megatron(folder, opened, model, RELEASE)

    return files, finish


def _to_mp_rank(settings: Settings, opened: Opened, model: Model) -> tuple[list[TargetFile], Finish]:
    classes = settings.classes
    if classes == "auto":
        classes = "legacy" if model.exits else "core"
    if classes == "legacy":
        check_old_classes(model)
    counts, args = _stages(settings, model)
    if classes == "legacy" and len(set(counts)) > 1:
        raise UserError(f"classes=legacy: its stages have the same number of layers, not {', '.join(map(str, counts))}")
    layout = mp_rank.Layout(
        settings.tp,
        settings.pp,
        counts,
        classes=classes,
        spec=settings.spec,
        exit_numbers=model.exits.layers if model.exits else (),
    )
    name = FIRST if model.exits else RELEASE
    files = mp_rank.target_files(model, layout, args, name)
    return files, lambda folder: _finish_megatron(folder, opened, model, name)


def _stages(settings: Settings, model: Model) -> tuple[tuple[int, ...], Namespace]:
    """Layers of each stage, and what the checkpoint's `args` say."""
    counts = deal_layers(model.map.shape.num_layers, settings.pp, *settings.uneven)
    grid = (settings.tp, settings.pp, model.padded_vocab, settings.vocab_divisor)
    return counts, to_args(model.config, model.dtype, *grid, settings.uneven)


def _finish_megatron(folder: Path, opened: Opened, model: Model, name: str) -> None:
    """The tracker, and the Hugging Face config and tokenizer for the way back."""
    write_text(folder / TRACKER, "release" if name == RELEASE else str(int(name.removeprefix("iter_"))))
    part = folder / HF_PART
    part.mkdir(exist_ok=True)
    huggingface.copy_part(part, opened, model.dtype)
