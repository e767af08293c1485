"""What is converted, whatever format it lies in: the config, the exits, the name and shape of every tensor."""

import re
from argparse import Namespace
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import PreTrainedConfig

from ee_scale.conversion.args import check_config
from ee_scale.conversion.names import ModelMap
from ee_scale.conversion.tensors import Stored, TensorInfo, Update
from ee_scale.conversion.values import Values
from ee_scale.errors import UserError
from ee_scale.families.megatron import FINAL_NORM, Row
from ee_scale.modeling.heads import ExitSpec
from ee_scale.modeling.kinds import Body
from ee_scale.modeling.modeling_early_exit import PREFIX

MERGE_ADAPTER = (
    "merge it (peft: PeftModel.from_pretrained(<base model>, <adapter folder>).merge_and_unload()"
    ".save_pretrained(<folder>)) and convert what comes out"
)
# What peft (LoRA, DoRA, and others of its kinds) and NeMo put beside the weights of a model, or around them.
ADAPTER = re.compile(
    r"(^|\.)((lora|hada|lokr|vera|oft|boft|ia3|randlora|hra|fourierft|trainable_tokens)_\w+|ln_tuning_layers|ranknum|"
    r"base_layer|modules_to_save|original_module|prompt_encoder|adapter\.linear_(in|out)|to_wrap)(\.|$)"
)


@dataclass(frozen=True)
class Model:
    """A model without its tensors.

    Attributes:
        config: of transformers; exits: None without exits; dtype: number type of its tensors.
        padded_vocab: rows of Megatron's vocabulary matrices.
    """

    config: Any
    exits: ExitSpec | None
    dtype: torch.dtype
    padded_vocab: int

    def __post_init__(self) -> None:
        _ = self.map  # first of all the architecture must be known
        check_config(self.config)

    @cached_property
    def map(self) -> ModelMap:
        """The spans of Megatron's tensors."""
        return ModelMap(self.config, self.padded_vocab)

    def info(self) -> dict[str, TensorInfo]:
        """Every tensor by its name in the Hugging Face folder, exits included."""
        found = self.map.info()
        for k in self.exits.layers if self.exits else ():
            found |= exit_info(self.map, self.exits, k)
        return found


class Staging(Protocol):
    """A file that exists for as long as a conversion runs, made of what no extent can tell where it lies.

    Attributes:
        file: where it will be; values: sees the numbers on their way into it.
    """

    file: Path
    values: Values

    def filled(self) -> AbstractContextManager[None]:
        """Inside the block the file is there. Raises `UserError`."""


@dataclass
class Opened:
    """A checkpoint that is ready to be read.

    Attributes:
        stored: every tensor and where it lies; args: of a Megatron checkpoint.
        small: Hugging Face folder whose tokenizer and other small files belong to the model, if any.
        exits_from: folder of the exits, whose calibration is of these very exits.
        notes: what a person should know about what was found; staging: a file that `stored` points to, to be made.
        updates: merged into the tensors of these names.
    """

    format: str
    folder: Path
    model: Model
    stored: list[Stored]
    args: Namespace | None = None
    small: Path | None = None
    exits_from: Path | None = None
    notes: list[str] = field(default_factory=list)
    staging: Staging | None = None
    updates: dict[str, Update] = field(default_factory=dict)


def body_rows(body: Body, layer_rows: tuple[Row, ...]) -> tuple[Row, ...]:
    """Those rows of a layer that make an exit's body."""
    return tuple(row for row in layer_rows if row.hf[0].startswith(body.prefix))


def exit_info(model_map: ModelMap, spec: ExitSpec, k: int) -> dict[str, TensorInfo]:
    """The tensors of the exit at layer k."""
    prefix, shape = f"{PREFIX}{k}.", model_map.shape
    found: dict[str, TensorInfo] = {}
    if body := spec.exit_kind.body:
        if model_map.num_experts:
            raise UserError(f"exits of kind '{spec.kind}' on a model with experts cannot be converted")
        found |= model_map.rows_info(body_rows(body, model_map.layer_rows), prefix + body.exit_prefix)
    if spec.exit_kind.normed:
        found[f"{prefix}norm.weight"] = model_map.rows_info((FINAL_NORM,), "")[FINAL_NORM.hf[0]]
    head = spec.head_shapes(shape.hidden_size, spec.scored(shape.vocab_size))
    return found | {prefix + name: TensorInfo(size) for name, size in head.items()}


def padded(words: int, divisor: int, tp: int) -> int:
    """Rows of a vocabulary matrix: the next multiple of divisor x tp (Megatron-LM's rule)."""
    multiple = divisor * tp
    return -(-words // multiple) * multiple


def check_words(
    place: Path, config: PreTrainedConfig, args: Namespace | None, rows: Sequence[tuple[str, Sequence[int]]]
) -> None:
    """Raise `UserError` if the vocabulary matrices of a Megatron checkpoint are not of this config.

    `rows`: of each such matrix (each stage has its own of a name), those of every tensor rank, padding included.
    """
    for name, parts in rows:
        if len(set(parts)) > 1:
            raise UserError(
                f"{place}: '{name}' has {', '.join(map(str, parts))} rows on its tensor ranks; all have the same number"
            )
    totals = [(name, sum(parts)) for name, parts in rows]
    first, total = totals[0]
    for name, count in totals:
        if count != total:
            raise UserError(f"{place}: '{name}' has {count} rows, but '{first}' has {total}")
    words, told = config.vocab_size, getattr(args, "vocab_size", None)
    if total < words:
        right = f"vocab_size={told}, as args say" if told and told <= total else f"the number of words, at most {total}"
        raise UserError(
            f"{place}: vocab_size={words} in the config, but '{first}' has {total} rows, padding included; give "
            f"model=<copy of the Hugging Face folder> with {right}, in its config.json"
        )
    if told and words < told <= total:
        raise UserError(
            f"{place}: vocab_size={words} in the config, but args say {told} of the {total} rows are words; give "
            f"model=<copy of the Hugging Face folder> with vocab_size={told} in its config.json"
        )


def check_whole(folder: Path, found: Iterable[str], expected: Iterable[str], what: str = "tensor") -> None:
    """Raise `UserError` naming what is missing, or what is there and belongs to nothing."""
    found, expected = set(found), set(expected)
    if adapters := sorted(name for name in found - expected if ADAPTER.search(name)):
        raise UserError(
            f"{folder}: {what}s of an adapter (LoRA or its like), {len(adapters)} of them, {adapters[0]} first; "
            f"{MERGE_ADAPTER}"
        )
    for problem, names in (("missing", expected - found), ("not known", found - expected)):
        if names:
            shown = ", ".join(sorted(names)[:3]) + (" ..." if len(names) > 3 else "")
            raise UserError(f"{folder}: {len(names)} {what}{'s' if len(names) > 1 else ''} {problem}: {shown}")
