"""From a config to a conversion: open the source, choose the target's files."""

from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from ee_scale.backbone.model_path import plain_folder
from ee_scale.config.checks import check_rules
from ee_scale.config.convert import ConvertConfig
from ee_scale.conversion.adapter import with_adapter
from ee_scale.conversion.args import flags_to_pass, to_args
from ee_scale.conversion.execute import Conversion, check_source, source_of, with_dtypes
from ee_scale.conversion.folders import HF_PART, TRACKER, detect, iteration_folder, saved_by_deepspeed
from ee_scale.conversion.formats import deepspeed, huggingface, mp_rank, mp_rank_reader, torch_dist, torch_dist_reader
from ee_scale.conversion.formats.ee_llm import check_old_classes
from ee_scale.conversion.model import Model, Opened, padded
from ee_scale.conversion.stages import deal_layers
from ee_scale.conversion.target_files import TargetFile
from ee_scale.errors import UserError
from ee_scale.families.registry import megatron_family
from ee_scale.files import write_text

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
RELEASE, FIRST = "release", "iter_0000001"  # EE-LLM cannot load a release
Finish = Callable[[Path], None]


def open_checkpoint(config: ConvertConfig) -> Opened:
    """The source, whatever its format. Raises `UserError`."""
    src = plain_folder(config.src_folder)
    kind = detect(src, config.iteration)
    if config.source == "deepspeed" and kind == "hf" and saved_by_deepspeed(config.src_folder):
        kind = "deepspeed"  # both lie in a folder of transformers' Trainer
    if config.source not in ("auto", kind):
        raise UserError(f"from={config.source}: {config.src_folder} is of format {kind}")
    if kind in ("sidecar", "hf"):
        return huggingface.find_folder(src)
    if kind == "deepspeed":
        return _open_deepspeed(config)
    iteration = iteration_folder(config.src_folder, config.iteration)
    reader = torch_dist_reader if kind == "megatron_core" else mp_rank_reader
    root = config.src_folder if iteration != config.src_folder else config.src_folder.parent
    return reader.open_folder(root, iteration, config.model_folder, config.trust)


def _open_deepspeed(config: ConvertConfig) -> Opened:
    if config.iteration is not None:
        raise UserError(f"iteration={config.iteration}: DeepSpeed saves under tags; give the folder of one tag as src")
    if config.to == "sidecar":
        raise UserError("to=sidecar: not from DeepSpeed in one step; convert to=hf, and that folder to=sidecar")
    return deepspeed.open_folder(
        config.src_folder,
        config.out_folder.with_name(f".{config.out_folder.name}.staging"),
        model_folder=config.model_folder,
        dtype=DTYPES.get(config.dtype),
        trust=config.trust,
        bare=config.to == "hf",
    )


def open_result(config: ConvertConfig, folder: Path) -> Opened:
    """What was written, opened like any checkpoint."""
    kind = config.to if config.to != "sidecar" else "auto"
    return open_checkpoint(ConvertConfig(str(folder), str(folder), config.to, kind))


def make_conversion(config: ConvertConfig) -> Conversion:
    """The whole plan; no tensor is read and nothing is written. Raises `UserError`."""
    check_rules(config)
    for name in ("first_stage_layers", "last_stage_layers"):
        if (count := getattr(config, name)) is not None and not config.to.startswith("megatron"):
            raise UserError(f"{name}={count}: to={config.to} has no pipeline stages")
    if config.ep > 1 and config.to != "megatron_legacy":
        raise UserError(f"ep={config.ep}: to={config.to} is not written by expert rank; leave it out")
    opened = open_checkpoint(config)
    if config.adapter_folder is not None:
        if opened.model.config is None or config.to == "sidecar":
            raise UserError(f"adapter={config.adapter}: is merged into a whole model of which the config is known")
        opened = with_adapter(opened, config.adapter_folder)
    source = source_of(opened)
    dtype = DTYPES.get(config.dtype)
    if opened.model.config is None:
        return deepspeed.bare_conversion(opened, config.out_folder, int(config.shard_gb * 1e9), dtype)
    if opened.format == "deepspeed":  # masters in fp32 beside frozen weights in bf16: one type for all
        dtype = dtype or opened.model.dtype
    model = replace(opened.model, dtype=dtype or opened.model.dtype)
    if config.to.startswith("megatron"):
        words = model.map.shape.vocab_size
        model = replace(model, padded_vocab=padded(words, config.vocab_divisor, config.tp))
    opened = replace(opened, model=replace(model, padded_vocab=opened.model.padded_vocab))
    files, finish = {
        "hf": _to_hf,
        "sidecar": _to_sidecar,
        "megatron_core": _to_torch_dist,
        "megatron_legacy": _to_mp_rank,
    }[config.to](config, opened, model)
    with_dtypes(files, source, dtype or (torch.float32 if config.to == "sidecar" else None), model.dtype)
    if config.to == "megatron_core":
        torch_dist.unify_dtypes(files)
    conversion = Conversion(opened, source, files, finish, config.out_folder, list(opened.notes))
    check_source(conversion)
    if config.to == "hf" and not huggingface.has_tokenizer(opened):
        conversion.notes.append(
            f"no tokenizer came with {config.src_folder}: give model=<Hugging Face folder of the same model> to copy it"
        )
    if config.to.startswith("megatron"):
        flags = " ".join(flags_to_pass(model.config, config.uneven))
        conversion.notes.append(f"--use-checkpoint-args does not restore these, pass them to Megatron-LM: {flags}")
        if megatron_family(model.config).megatron.wide_norms:
            conversion.notes.append(
                f"{model.config.model_type}: its norms of q and k go over all heads; Megatron-Bridge has such layers, "
                "Megatron-Core's own do not"
            )
    return conversion


def _to_hf(config: ConvertConfig, opened: Opened, model: Model) -> tuple[list[TargetFile], Finish]:
    files = huggingface.target_files(model, model.dtype.itemsize, int(config.shard_gb * 1e9))
    return files, lambda folder: huggingface.finish_folder(folder, opened, model.dtype, files)


def _to_sidecar(config: ConvertConfig, opened: Opened, model: Model) -> tuple[list[TargetFile], Finish]:
    if model.exits is None:
        raise UserError(f"to=sidecar: {config.src_folder} has no exits")
    if config.model_folder is None:
        raise UserError("to=sidecar: give model=<Hugging Face folder of the base model>, which the sidecar will name")
    huggingface.check_base(plain_folder(config.model_folder), opened)
    files = [huggingface.sidecar_file(model)]
    return files, lambda folder: huggingface.finish_sidecar(folder, model, config.model_folder)


def _to_torch_dist(config: ConvertConfig, opened: Opened, model: Model) -> tuple[list[TargetFile], Finish]:
    counts, args = _stages(config, model)
    files = torch_dist.target_files(model, config.tp, counts, RELEASE)

    def finish(folder: Path) -> None:
        torch_dist.finish_folder(folder / RELEASE, model, args, counts, files)
        _finish_megatron(folder, opened, model, RELEASE)

    return files, finish


def _to_mp_rank(config: ConvertConfig, opened: Opened, model: Model) -> tuple[list[TargetFile], Finish]:
    classes = config.classes
    if classes == "auto":
        classes = "legacy" if model.exits else "core"
    if classes == "legacy":
        check_old_classes(model)
    counts, args = _stages(config, model)
    if classes == "legacy" and len(set(counts)) > 1:
        raise UserError(f"classes=legacy: its stages have the same number of layers, not {', '.join(map(str, counts))}")
    layout = mp_rank.MegatronLayout(
        config.tp,
        config.pp,
        counts,
        ep=config.ep,
        classes=classes,
        spec=config.spec,
        exit_numbers=model.exits.layers if model.exits else (),
    )
    name = FIRST if model.exits else RELEASE
    files = mp_rank.target_files(model, layout, args, name)
    return files, lambda folder: _finish_megatron(folder, opened, model, name)


def _stages(config: ConvertConfig, model: Model) -> tuple[tuple[int, ...], Namespace]:
    """Layers of each stage, and what the checkpoint's `args` say."""
    counts = deal_layers(model.map.shape.num_layers, config.pp, *config.uneven)
    grid = (config.tp, config.pp, model.padded_vocab, config.vocab_divisor)
    return counts, to_args(model.config, model.dtype, *grid, config.uneven, config.ep)


def _finish_megatron(folder: Path, opened: Opened, model: Model, name: str) -> None:
    """The tracker, and the Hugging Face config and tokenizer for the way back."""
    write_text(folder / TRACKER, "release" if name == RELEASE else str(int(name.removeprefix("iter_"))))
    part = folder / HF_PART
    part.mkdir(exist_ok=True)
    huggingface.copy_part(part, opened, model.dtype)
