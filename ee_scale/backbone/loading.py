"""Read a Hugging Face folder: config, and slices of its safetensors. No rank reads more than its own part."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from ee_scale.backbone.narrowing import fill
from ee_scale.backbone.stored_names import stored_pair
from ee_scale.errors import UserError, one_line
from ee_scale.families.family import Family
from ee_scale.families.registry import find_family, without_wrapper
from ee_scale.families.sizes import check_sizes
from ee_scale.files import is_file, named_file, own_file
from ee_scale.modeling.wrapped import is_wrapped, language_name
from ee_scale.reading import check_fields, read_object, shown

INDEX_NAME, SINGLE_NAME = "model.safetensors.index.json", "model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
BLOCK = 1 << 22  # numbers that are compared at a time
WAY_OUT = "save a plain copy (dequantized, adapters merged) first"
PLAIN = ("F32", "BF16", "F16", "F64")  # number types of weights that are what they say
SAVE_AS_SAFETENSORS = (
    "weights of another kind (pytorch_model.bin, say) are not read; "
    "AutoModelForCausalLM.from_pretrained(<model>).save_pretrained(<folder>) writes safetensors"
)
USUAL_LAYERS = 200


def read_config(folder: Path, *, alone: bool = False) -> PreTrainedConfig:
    """The transformers config of a folder, of whatever architecture (of a wrapper that of its language model); its
    `tie_word_embeddings` says what is true of the weights beside it (`is_tied`), unless it counts `alone`: for weights
    that lie elsewhere.

    Raises `UserError`, also for weights that are encoded.
    """
    if not (folder / "config.json").is_file():
        raise UserError(f"model.path={folder}: no config.json in it")
    values, here = read_object(folder / "config.json"), f"model.path={folder}: config.json"
    check_sizes(values, here)
    if isinstance(inside := values.get("text_config"), dict):
        check_sizes(inside, f"{here}: text_config")
    try:
        whole = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers checks types and values in many ways
        raise UserError(f"model.path={folder}: config.json: {one_line(error)}") from error
    config = without_wrapper(whole)
    weights = not alone and any((folder / name).is_file() for name in (SINGLE_NAME, INDEX_NAME))
    if weights:
        check_claims(folder, config)
    _check_encoding(folder, whole)
    if not alone:
        _check_adapter(folder)
    family = find_family(config)
    if is_wrapped(config) and family:
        _check_wrapped(here, whole.model_type, family, config)
    if weights and family and family.is_decoder and config.tie_word_embeddings:
        config.tie_word_embeddings = is_tied(folder, config)
    return config


def _check_wrapped(here: str, wrapper: str, family: Family, config: PreTrainedConfig) -> None:
    """Its own code ends with the output matrix; that of the language model alone goes on."""
    for name in filter(None, (family.logit_softcap, family.logit_scale, family.logit_divisor)):
        if (value := getattr(config, name)) not in (None, 1):
            raise UserError(f"{here}: text_config: {name}={value}: '{wrapper}' does not apply it to its logits")


def _check_encoding(folder: Path, config: PreTrainedConfig) -> None:
    for key in ("quantization_config", "compression_config"):
        if (values := getattr(config, key, None)) is not None:
            values = values if isinstance(values, dict) else {"quant_method": values}
            method = values.get("quant_method") or next((name for name in values if values[name] is True), "?")
            raise UserError(
                f"model.path={folder}: config.json has a {key} ({method}): encoded (quantized) weights are not read; "
                f"{WAY_OUT}"
            )
    if name := getattr(config, "transformers_weights", None):
        raise UserError(f"model.path={folder}: config.transformers_weights={name}: only {SINGLE_NAME} is read")


def _check_adapter(folder: Path) -> None:
    """What transformers makes of the folder depends on whether peft is installed: it adds such an adapter then."""
    if (folder / ADAPTER_CONFIG).is_file():
        raise UserError(
            f"model.path={folder}: {ADAPTER_CONFIG}: an adapter of peft lies beside the weights and is not read; "
            "merge it (peft: PeftModel.from_pretrained(...).merge_and_unload().save_pretrained(<folder>)), or move "
            "its files away to go without it"
        )


def is_tied(folder: Path, config: PreTrainedConfig) -> bool:
    """Whether the output matrix of a causal language model whose config ties it is the embedding.

    As in transformers 5: it is, unless the folder has both matrices and they differ; then both count.
    """
    tensors = TensorFolder(folder)
    stored = {language_name(config, name): name for name in tensors.files}
    pair = stored_pair(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], stored)
    return pair is None or tensors.equal(*(stored[name] for name in pair))


def check_claims(folder: Path, config: PreTrainedConfig) -> None:
    """Refuse a config that asks for far more than the weights beside it, before anything of its size is made.

    `check_sizes` says of each setting alone what no model has; this, of matrices and layers, what these files have not.
    Raises `UserError` naming the settings and both numbers.
    """
    exits, nbytes = getattr(config, "early_exit", None), weight_bytes(folder)
    size = vars(config) | (exits if isinstance(exits, dict) else {})
    size = {name: value for name, value in size.items() if isinstance(value, int) and not isinstance(value, bool)}
    width = "embedding_size" if "embedding_size" in size else "hidden_size"  # ALBERT, ELECTRA
    claims = [("vocab_size", width), ("intermediate_size", "hidden_size"), ("rank", "hidden_size")]
    claims += [(f"num_{heads}_heads", "head_dim", "hidden_size") for heads in ("attention", "key_value")]
    inner = "moe_intermediate_size" if "moe_intermediate_size" in size else "intermediate_size"
    claims += [(experts, inner, "hidden_size") for experts in ("num_experts", "num_local_experts")]
    for names in claims:
        count = prod(size[name] for name in names) if set(names) <= set(size) else 0
        if count > 8 * nbytes:  # a weight has at least one bit
            told = " x ".join(f"{name}={size[name]}" for name in names)
            raise UserError(
                f"{folder}: config.json: {told} = {count} weights in one matrix, but all files have {nbytes} bytes"
            )
    layers = size.get("num_hidden_layers", 0)
    if layers > USUAL_LAYERS and layers > (count := len(TensorFolder(folder).files)):
        raise UserError(f"{folder}: config.json: num_hidden_layers={layers}, but its files have {count} tensors")


class TensorFolder:
    """The tensors of a folder of safetensors, single or indexed, by name."""

    def __init__(self, folder: Path, files: Sequence[Path] | None = None):
        """`files`: those to read; None: the weights of a model. Raises `UserError` if files are missing or broken."""
        self.folder = folder
        self.files: dict[str, Path] = {}
        self._open: dict[Path, Any] = {}
        for path in weight_files(folder) if files is None else files:
            self.files |= dict.fromkeys(self._handle(path).keys(), path)

    def __contains__(self, name: str) -> bool:
        return name in self.files

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a whole tensor."""
        return tuple(self._slice(name).get_shape())

    def kind(self, name: str) -> str:
        """Number type of a tensor, as safetensors calls it."""
        return self._slice(name).get_dtype()

    def equal(self, name: str, other: str) -> bool:
        """Whether two tensors hold the same values, read a block of rows at a time."""
        if not (shape := self.shape(name)) or shape != self.shape(other):
            return False
        same = self.kind(name) == self.kind(other) and self.kind(name) in PLAIN
        step = max(1, BLOCK // max(1, prod(shape[1:])))
        for start in range(0, shape[0], step):
            mine, theirs = (self.read(each, 0, start, min(start + step, shape[0])) for each in (name, other))
            if not torch.equal(*((mine, theirs) if same else (mine.double(), theirs.double()))):
                return False
        return True

    def stored_name(self, name: str) -> str:
        """What a tensor is called in the files."""
        return name

    def read(self, name: str, dim: int | None = None, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """A tensor, or its part [start, stop) along `dim`; only that part is read from disk."""
        part = self._slice(name)
        try:
            return part[:] if dim is None else part[(slice(None),) * dim + (slice(start, stop),)]
        except (SafetensorError, RuntimeError) as error:  # a number type that torch has no whole bytes for
            raise UserError(f"{self.files[name]}: cannot read '{name}' ({one_line(error)})") from error

    def read_rows(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """Some rows of a matrix, int64 [n] -> [n, D], read a block at a time."""
        count, width = self.shape(name)
        step = max(1, BLOCK // width)
        found = self.read(name, 0, 0, 0).new_empty(len(rows), width)
        for start in range(0, count, step):
            here = (rows >= start) & (rows < start + step)
            if here.any():
                found[here] = self.read(name, 0, start, min(start + step, count))[rows[here] - start]
        return found

    def _slice(self, name: str) -> Any:
        stored = self.stored_name(name)
        if stored not in self.files:
            raise UserError(f"{self.folder}: no tensor '{name}' in its safetensors")
        return self._handle(self.files[stored]).get_slice(stored)

    def _handle(self, path: Path) -> Any:
        if path not in self._open:
            try:
                self._open[path] = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise UserError(f"{path}: not a whole safetensors file ({error})") from error
        return self._open[path]


def weight_files(folder: Path) -> list[Path]:
    """The safetensors of a model folder. Raises `UserError` naming what is missing."""
    if (folder / SINGLE_NAME).is_file():
        return [own_file(folder / SINGLE_NAME)]
    if not (folder / INDEX_NAME).is_file():
        other = any(folder.glob("*.bin*")) or any(folder.glob("*.pt*"))
        way_out = f"; {SAVE_AS_SAFETENSORS}" if other else ""
        if named := next(folder.glob("*.gguf"), None):
            way_out = f"; {named.name} is read when it is given itself"
        raise UserError(f"model.path={folder}: neither {SINGLE_NAME} nor {INDEX_NAME} in it{way_out}")
    index = read_object(folder / INDEX_NAME)
    check_fields(index, folder / INDEX_NAME, weight_map=dict[str, str])
    names = sorted(set(index["weight_map"].values()))
    paths = [named_file(folder, name, folder / INDEX_NAME) for name in names]
    if wrong := [name for name in names if not name.endswith(".safetensors")]:
        raise UserError(f"{folder / INDEX_NAME}: names {shown(wrong[0])}, which is no safetensors file")
    if missing := [path.name for path in paths if not is_file(path)]:
        raise UserError(f"model.path={folder}: {INDEX_NAME} names {shown(missing[0])[1:-1]}, which is not there")
    return paths


def weight_bytes(folder: Path) -> int:
    """Bytes of the same files."""
    return sum(path.stat().st_size for path in weight_files(folder))


@dataclass(frozen=True)
class LoadTask:
    """One tensor of this rank: where it goes, what it is called in the folder, and how it is cut.

    Attributes:
        dim: dimension cut over the tensor group; None: whole on every rank.
        size: size of the whole tensor along `dim` in the file (smaller than tp x the slice for a padded vocabulary).
        packs: matrices that lie side by side along `dim`, each of which is cut.
        rows: those of the file's matrix that are wanted, in the order of the target's, int64 [n]; None: all.
    """

    target: torch.Tensor
    source: str
    dim: int | None = None
    size: int = 0
    packs: int = 1
    rows: torch.Tensor | None = None


def load_tensors(tasks: list[LoadTask], tensors: TensorFolder, tp_rank: int, tp: int) -> None:
    """Fill each target with its slice; rows past the vocabulary become zero.

    Raises `UserError` naming the tensor and both shapes, or a number that the target's type has not.
    """
    for task in tasks:
        expected = list(task.target.shape)
        if task.dim is not None:
            expected[task.dim] = task.size
        if tensors.shape(task.source) != tuple(expected):
            raise UserError(
                f"{tensors.folder}: '{task.source}' has shape {list(tensors.shape(task.source))}, "
                f"but the config asks for {expected}"
            )
        if task.dim is None:
            fill(task.target, tensors.read(task.source), task.source)
        elif task.packs > 1:
            _copy_packed(task, tensors, tp_rank)
        else:
            _copy_slice(task, tensors, tp_rank)


def _copy_packed(task: LoadTask, tensors: TensorFolder, tp_rank: int) -> None:
    step, whole = task.target.shape[task.dim] // task.packs, task.size // task.packs
    for pack in range(task.packs):
        start = pack * whole + tp_rank * step
        part = tensors.read(task.source, task.dim, start, start + step)
        fill(task.target.narrow(task.dim, pack * step, step), part, task.source)


def _copy_slice(task: LoadTask, tensors: TensorFolder, tp_rank: int) -> None:
    step = task.target.shape[task.dim]
    count = task.size if task.rows is None else len(task.rows)
    start, stop = min(tp_rank * step, count), min((tp_rank + 1) * step, count)
    if stop - start < step:
        with torch.no_grad():
            task.target.zero_()
    if task.rows is None:
        part = tensors.read(task.source, task.dim, start, stop)
    else:
        part = tensors.read_rows(task.source, task.rows[start:stop])
    fill(task.target.narrow(task.dim, 0, stop - start), part, task.source)
