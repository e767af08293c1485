"""A stock model folder as one GGUF file (llama.cpp's format): tensor by tensor, read back before it gets its name."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedConfig

from ee_scale.artifact.gguf_settings import add_settings, architecture_of, rope_factors, tensor_names
from ee_scale.artifact.gguf_tokens import add_tokens
from ee_scale.backbone.gguf_file import ROPE_FACTORS, gguf
from ee_scale.backbone.loading import read_config
from ee_scale.backbone.model_tensors import ModelTensors
from ee_scale.errors import UserError
from ee_scale.families.build import meta_model
from ee_scale.families.llama_cpp import LlamaCpp
from ee_scale.families.registry import FAMILIES
from ee_scale.files import new_file

Kind = gguf.GGMLQuantizationType
FILE_TYPES = {
    Kind.F32: gguf.LlamaFileType.ALL_F32,
    **{kind: gguf.LlamaFileType[f"MOSTLY_{kind.name}"] for kind in (Kind.F16, Kind.BF16, Kind.Q8_0)},
    **{kind: gguf.LlamaFileType[f"MOSTLY_{kind.name}"] for kind in (Kind.Q5_1, Kind.Q5_0, Kind.Q4_1, Kind.Q4_0)},
}
OF_DTYPE = {torch.float16: Kind.F16, torch.bfloat16: Kind.BF16, torch.float32: Kind.F32, torch.float64: Kind.F32}
# The most that a number may be off, as a share of the largest one that has the same scale: half a step, and a little
# for the scale's own rounding.
LARGEST_ERROR = {Kind.F32: 0.0, Kind.F16: 2**-11, Kind.BF16: 2**-8, Kind.Q8_0: 0.0045}
LARGEST_ERROR |= {Kind.Q5_0: 0.064, Kind.Q5_1: 0.034, Kind.Q4_0: 0.13, Kind.Q4_1: 0.07}
SMALLEST = 2**-24  # of fp16: what is nearer to 0 is written as 0
BLOCK = 32  # numbers that share a scale
READ_AT_ONCE = 1 << 22  # numbers
MORE_BITS = ("token_embd.weight", "output.weight")  # kept in 8 bits where others have fewer


@dataclass(frozen=True)
class GGUFReport:
    """What was written: bytes of the file, and how many tensors are stored in each type, by its name."""

    nbytes: int
    kinds: dict[str, int]


@dataclass(frozen=True)
class _Stored:
    """A tensor of the file: its name, type and shape there, and what makes its numbers, fp32."""

    name: str
    kind: gguf.GGMLQuantizationType
    shape: tuple[int, ...]
    values: Callable[[], np.ndarray]

    @property
    def byte_shape(self) -> tuple[int, ...]:
        return tuple(gguf.quant_shape_to_byte_shape(self.shape, self.kind))


def export_gguf(folder: Path, out: Path, kind: str | None, advance: Callable[[float], object] = bool) -> GGUFReport:
    """Write the causal language model of `folder` as the file `out`.

    kind: of matrices, 'f32' to 'q4_0'; None: the number type of the model's own weights. Vectors are fp32, rows that
    are no whole number of blocks f16, and the embedding and the head have 8 bits where others have fewer. `advance` is
    told the share that is done. At most one tensor is in memory. Raises `UserError` if llama.cpp has no such
    architecture or would compute something else, or if the file is not what was to be written.
    """
    config = read_config(folder)
    found, model = architecture_of(config, folder), meta_model(config, torch.float32)
    tensors = ModelTensors(folder, model)
    chosen = (
        OF_DTYPE[tensors.read("model.embed_tokens.weight", 0, 0, 1).dtype]
        if kind is None
        else gguf.GGMLQuantizationType[kind.upper()]
    )
    names, tied = tensor_names(found, config), model.get_expanded_tied_weights_keys(all_submodels=True)
    own = [name for name in model.state_dict() if name not in tied]
    stored = [_stored(name, names, tensors, found, config, chosen) for name in own]
    if (factors := rope_factors(config)) is not None:
        stored.append(_Stored(ROPE_FACTORS, Kind.F32, factors.shape, lambda: factors))
    with new_file(out) as path:
        writer = gguf.GGUFWriter(path, found.name)
        writer.add_type("model")
        writer.add_name(folder.resolve().name)
        writer.add_file_type(FILE_TYPES[chosen])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        add_settings(writer, found, config)
        add_tokens(writer, folder, config.vocab_size)
        try:
            _write(writer, stored, advance)
        finally:
            writer.close()
        _check(path, writer, stored, out, advance)
        return GGUFReport(path.stat().st_size, Counter(tensor.kind.name for tensor in stored))


def _stored(
    name: str,
    names: gguf.TensorNameMap,
    tensors: ModelTensors,
    found: LlamaCpp,
    config: PreTrainedConfig,
    kind: gguf.GGMLQuantizationType,
) -> _Stored:
    """How a parameter is stored: Llama's rotary pairs side by side, and what a norm multiplies by."""
    stored = names.get_name(name, (".weight", ".bias"))
    if stored is None:
        raise UserError(f"src={tensors.folder}: llama.cpp has no tensor for '{name}'")
    shape = tensors.shape(tensors.stored_name(name))
    if len(shape) == 1:
        kind = Kind.F32
    elif kind.name.startswith("Q"):
        kind = Kind.F16 if shape[-1] % BLOCK else Kind.Q8_0 if stored in MORE_BITS else kind

    def values() -> np.ndarray:
        tensor = tensors.read(name).float()
        if found.pairs and (part := name.rpartition(".")[0].rpartition(".")[2]) in ("q_proj", "k_proj"):
            heads = config.num_attention_heads if part == "q_proj" else config.num_key_value_heads
            tensor = tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(shape)
        if name.endswith("norm.weight"):
            tensor = tensor + (1 - FAMILIES[config.model_type].neutral_norm)
        return tensor.numpy()

    return _Stored(stored, kind, shape, values)


def _write(writer: gguf.GGUFWriter, stored: list[_Stored], advance: Callable[[float], object]) -> None:
    for tensor in stored:
        size = int(np.prod(tensor.byte_shape))
        # The shape in bytes, of bytes: how the writer takes what is encoded.
        writer.add_tensor_info(tensor.name, tensor.byte_shape, np.dtype(np.uint8), size, raw_dtype=tensor.kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for done, tensor in enumerate(stored):
        with np.errstate(over="ignore"):  # what the type cannot hold is told when it is read back
            writer.write_tensor_data(gguf.quantize(tensor.values(), tensor.kind))
        advance(done / len(stored) / 2)


def _check(
    path: Path, writer: gguf.GGUFWriter, stored: list[_Stored], out: Path, advance: Callable[[float], object]
) -> None:
    """Raises `UserError` unless the file says what the writer was told, with numbers as near as their types are."""
    reader = gguf.GGUFReader(path)
    told = {name: _plain(value.value) for name, value in writer.kv_data[0].items()}
    said = {name: _plain(value.contents()) for name, value in reader.fields.items() if not name.startswith("GGUF.")}
    if wrong := [name for name in told if said.get(name) != told[name]]:
        raise UserError(f"out={out}: reads back another {wrong[0]} than was written; not kept")
    found = {tensor.name: tensor for tensor in reader.tensors}
    for done, tensor in enumerate(stored):
        wanted, there = tensor.values(), found[tensor.name]
        rows = max(1, READ_AT_ONCE // wanted[0].size)
        for start in range(0, len(wanted), rows):
            got = gguf.dequantize(there.data[start : start + rows], there.tensor_type)
            off = _too_far(got, wanted[start : start + rows], tensor.kind)
            if off is not None or there.tensor_type != tensor.kind:
                raise UserError(
                    f"out={out}: '{tensor.name}' reads back with numbers that are off by {off}, more than "
                    f"{tensor.kind.name} rounds; not kept (weights too large for the type? try type=f32)"
                )
        advance(0.5 + done / len(stored) / 2)


def _too_far(got: np.ndarray, wanted: np.ndarray, kind: gguf.GGMLQuantizationType) -> float | None:
    """The largest difference, if one is larger than the type explains."""
    off, size = np.abs(got - wanted), np.abs(wanted)
    if kind.name.startswith("Q"):
        off, size = (np.max(values.reshape(-1, BLOCK), axis=1) for values in (off, size))
    most = LARGEST_ERROR[kind] * size + (0.0 if kind == Kind.F32 else SMALLEST)
    return None if np.all(off <= most) else float(np.max(off))  # no number at all is too far


def _plain(value: object) -> object:
    """As a file says it: single precision, and text."""
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, bytes):
        return value.decode("utf-8")
    return float(np.float32(value)) if isinstance(value, float) else value
