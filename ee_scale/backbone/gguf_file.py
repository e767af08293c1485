"""A GGUF file (llama.cpp's format) as transformers has it: config, tokenizer, and weights as plain numbers.

The package gguf comes in here alone, for those who write such files too; importing this raises `UserError` without it.
transformers builds config and tokenizer. Weights are decoded by gguf one at a time, where transformers holds the whole
model, fills what is missing at random and leaves out what it does not know without a word.
"""

import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import DTypeLike
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ee_scale.errors import UserError, one_line
from ee_scale.families.build import meta_model
from ee_scale.families.registry import gguf_family
from ee_scale.families.sizes import check_sizes
from ee_scale.reading import shown

try:
    import gguf
except ImportError as error:
    raise UserError(f"GGUF files need one more package: pip install 'ee-scale[gguf]' ({error})") from error

READERS = [version(name) for name in ("gguf", "transformers", "tokenizers")]
MOST_VALUES = 1 << 22  # of one list in the header: a vocabulary or its merges, several times over
ROPE_FACTORS = "rope_freqs.weight"
LLAMA_3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
HALVES = {gguf.GGMLQuantizationType.F16: torch.float16, gguf.GGMLQuantizationType.BF16: torch.bfloat16}
# Settings that every model has, and others that transformers reads or that say nothing of the numbers.
NEEDED = (
    *("block_count", "context_length", "embedding_length", "feed_forward_length"),
    *("attention.head_count", "attention.layer_norm_rms_epsilon"),
)
READ = (*NEEDED, "attention.head_count_kv", "rope.freq_base", "vocab_size", "tensor_data_layout")


class _Reader(gguf.GGUFReader):
    """Reads nothing behind the end of the file, over which the base class would loop, and no list without an end."""

    def _get(self, offset: int, dtype: DTypeLike, count: int = 1, override_order: str | None = None) -> Any:
        end = int(offset) + np.dtype(dtype).itemsize * int(count)
        if end > len(self.data):
            raise ValueError(f"cut off or damaged: it ends at byte {len(self.data):,}, before what its header names")
        return super()._get(offset, dtype, count, override_order)

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
        if raw_type == gguf.GGUFValueType.ARRAY:
            count = int(self._get(orig_offs + 4, np.uint64)[0])
            if count > MOST_VALUES:
                raise ValueError(f"a list of {count:,} values in its header; at most {MOST_VALUES:,} are read")
        return super()._get_field_parts(orig_offs, raw_type)


class GGUFFile:
    """A file of one model of a known family; what it cannot be read as is refused (`UserError`) before a weight is.

    Attributes:
        architecture: as llama.cpp calls it, for which Mistral is a Llama.
        tensors: what is stored, by gguf's names.
    """

    def __init__(self, path: Path):
        """Reads the header alone."""
        self.path = path
        try:
            self._reader = _Reader(path)
            self.tensors = {tensor.name: tensor for tensor in self._reader.tensors}
            values = {name: field.contents() for name, field in self._reader.fields.items()}
        except Exception as error:  # a file that is damaged or was made up fails in many ways
            raise UserError(f"{path}: not a GGUF file that gguf {version('gguf')} reads ({one_line(error)})") from error
        if self._reader.byte_order != "I":
            raise UserError(f"{path}: a GGUF file of the other byte order; convert it with gguf-convert-endian")
        self.architecture = str(values.get("general.architecture"))
        gguf_family(self.architecture)
        start = f"{self.architecture}."
        self._settings = {name[len(start) :]: value for name, value in values.items() if name.startswith(start)}
        if (parts := values.get("split.count", 1)) != 1:
            raise UserError(f"{path}: one of {parts} parts of a model; join them with llama-gguf-split --merge")
        if lacks := [name for name in NEEDED if name not in self._settings]:
            raise UserError(f"{path}: no {start}{lacks[0]} in it")
        check_sizes({"num_hidden_layers": self._settings["block_count"]}, path)
        if (layers := self._settings["block_count"]) > len(self.tensors):
            raise UserError(f"{path}: {start}block_count={layers}, but it has {len(self.tensors)} tensors")
        self._check_types()

    def _check_types(self) -> None:
        for kind, name in {tensor.tensor_type: tensor.name for tensor in reversed(self.tensors.values())}.items():
            try:
                gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), dtype=np.uint8), kind)
            except NotImplementedError as error:
                raise UserError(
                    f"{self.path}: '{name}' is stored as {kind.name}, which gguf {version('gguf')} does not decode"
                ) from error

    @cached_property
    def config(self) -> PreTrainedConfig:
        """That of transformers. Raises `UserError` for another family, and for settings that change what the model
        computes and that transformers does not read.
        """
        with self._alone() as place:
            try:
                config = AutoConfig.from_pretrained(**place, trust_remote_code=False)
            except Exception as error:  # transformers checks types and values in many ways
                raise UserError(f"{self.path}: no config that transformers reads ({one_line(error)})") from error
        gguf_family(config.model_type)
        check_sizes(config.to_dict(), self.path)
        for name in ("_model_name_or_path", "_name_or_path"):  # what the file calls itself, and a folder that is gone
            vars(config).pop(name, None)
        self._check_settings(config)
        if ROPE_FACTORS in self.tensors:
            self._scale_rotary(config)
        return config

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """That of transformers, with chat template and special tokens."""
        with self._alone() as place:
            try:
                return AutoTokenizer.from_pretrained(**place, trust_remote_code=False)
            except Exception as error:
                raise UserError(f"{self.path}: no tokenizer that transformers reads ({one_line(error)})") from error

    @contextmanager
    def _alone(self) -> Iterator[dict[str, str]]:
        """What `from_pretrained` wants, with nothing beside the file: what it means is told by its own bytes."""
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "model.gguf").symlink_to(self.path.resolve())
            yield {"pretrained_model_name_or_path": folder, "gguf_file": "model.gguf"}

    def _check_settings(self, config: PreTrainedConfig) -> None:
        for name, value in _taken_for_granted(config).items():
            if (found := self._settings.get(name, value)) != value:
                raise UserError(
                    f"{self.path}: {self.architecture}.{name}={shown(found)}: transformers reads a GGUF file of this "
                    f"architecture as {name}={value}"
                )
        # Gemma scales attention by its head size, but for the largest model, of 46 layers; no file says so.
        scale = getattr(config, "query_pre_attn_scalar", None)
        if scale is not None and (scale != _head_dim(config) or config.num_hidden_layers == 46):
            raise UserError(f"{self.path}: its attention is scaled as no file says; transformers takes {scale} ** -0.5")

    @property
    def left_out(self) -> list[str]:
        """Settings that nobody here knows."""
        known = {*READ, *_taken_for_granted(self.config)}
        return [f"{self.architecture}.{name}" for name in sorted(self._settings.keys() - known)]

    def _scale_rotary(self, config: PreTrainedConfig) -> None:
        """Llama 3.1's rotary scaling, of which a file holds the factors alone, and which transformers leaves out."""
        factors = self._values(ROPE_FACTORS)
        theta, head_dim = config.rope_parameters["rope_theta"], _head_dim(config)
        plain = theta ** -(torch.arange(0, head_dim, 2) / head_dim)
        config.rope_parameters = {"rope_type": "llama3", "rope_theta": theta, "factor": factors.max().item(), **LLAMA_3}
        found, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
        if factors.shape != plain.shape or not torch.allclose(found * factors, plain, rtol=1e-3, atol=0):
            raise UserError(f"{self.path}: '{ROPE_FACTORS}' is not the rotary scaling of Llama 3.1")

    @cached_property
    def model(self) -> PreTrainedModel:
        """What transformers computes with, on the meta device."""
        return meta_model(self.config, torch.float32)

    @cached_property
    def names(self) -> dict[str, str]:
        """Parameter -> tensor, for every parameter; a tied output matrix has none of its own.

        Raises `UserError` unless all are there, in the shapes that the settings ask for, and nothing is left.
        """
        arch = next((key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == self.architecture), None)
        if arch is None:
            raise UserError(f"{self.path}: general.architecture={self.architecture}: llama.cpp has none of that name")
        names = gguf.get_tensor_name_map(arch, self.config.num_hidden_layers)
        shapes = {name: list(value.shape) for name, value in self.model.state_dict().items()}
        for name in self.model.get_expanded_tied_weights_keys(all_submodels=True):
            del shapes[name]
        found = {name: str(names.get_name(name, (".weight", ".bias"))) for name in shapes}
        if left := sorted(self.tensors.keys() - set(found.values()) - {ROPE_FACTORS}):
            raise UserError(f"{self.path}: '{left[0]}': no parameter of {type(self.model).__name__} takes it")
        for name, stored in found.items():
            if stored not in self.tensors:
                raise UserError(f"{self.path}: no tensor '{stored}' in it")
            if (shape := self.tensors[stored].shape.tolist()[::-1]) != shapes[name]:
                raise UserError(f"{self.path}: '{stored}' has shape {shape}, but its settings ask for {shapes[name]}")
        return found

    @cached_property
    def dtype(self) -> torch.dtype:
        """The narrowest type that holds every weight exactly: fp32, but for files of fp16 or bf16 matrices whose
        vectors, which are always fp32 there, lose nothing by it.
        """
        kinds = {tensor.tensor_type for tensor in self.tensors.values() if len(tensor.shape) > 1}
        half = HALVES.get(next(iter(kinds))) if len(kinds) == 1 else None
        vectors = (self.read(name) for name, stored in self.names.items() if len(self.tensors[stored].shape) == 1)
        if half is not None and all(torch.equal(vector, vector.to(half).float()) for vector in vectors):
            return half
        return torch.float32

    def read(self, name: str) -> torch.Tensor:
        """A parameter, fp32, as transformers computes with it. Raises `UserError` for numbers that are none."""
        stored, config, family = self.names[name], self.config, gguf_family(self.config.model_type)
        values = self._values(stored)
        if not values.isfinite().all():
            raise UserError(f"{self.path}: '{stored}' has numbers that are not finite; it is damaged")
        if family.llama_cpp and family.llama_cpp.pairs and name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = config.num_attention_heads if name.endswith("q_proj.weight") else config.num_key_value_heads
            return values.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(values.shape)
        if name.endswith("norm.weight"):  # what a norm multiplies by is stored
            return values - (1 - family.neutral_norm)
        return values

    def _values(self, stored: str) -> torch.Tensor:
        tensor = self.tensors[stored]
        return torch.from_numpy(np.require(gguf.dequantize(tensor.data, tensor.tensor_type), requirements="W"))

    @property
    def num_weights(self) -> int:
        """All numbers that are stored."""
        return sum(int(tensor.n_elements) for tensor in self.tensors.values())

    @property
    def bits_per_weight(self) -> float:
        """Of the file's tensors, with their scales."""
        return 8 * sum(int(tensor.n_bytes) for tensor in self.tensors.values()) / self.num_weights

    @property
    def quantization(self) -> str:
        """The types that tensors are stored in, the one of most weights first."""
        counts = Counter[str]()
        for tensor in self.tensors.values():
            counts[tensor.tensor_type.name] += int(tensor.n_elements)
        return ", ".join(name for name, _ in counts.most_common())


def _taken_for_granted(config: PreTrainedConfig) -> dict[str, object]:
    """What transformers computes with, whatever a file says."""
    names = ("attn_logit_softcapping", "final_logit_softcapping")
    values: dict[str, object] = {name: getattr(config, name, None) for name in names}
    values["attention.sliding_window"] = getattr(config, "sliding_window", None)
    values |= dict.fromkeys(
        ("attention.key_length", "attention.value_length", "rope.dimension_count"), _head_dim(config)
    )
    values |= {"rope.scaling.type": "none", "rope.scale_linear": 1.0, "attention.causal": True}
    return values | {"expert_count": 0, "expert_used_count": 0}


def _head_dim(config: PreTrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
