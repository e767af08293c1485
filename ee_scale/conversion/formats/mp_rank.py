"""Megatron's `mp_rank_TT_PPP_EEE/model_optim_rng.pt`, one file of torch.save per tensor, pipeline and expert rank.

`PPP` and `EEE` are left out where there is one of them only. What is no expert lies in the files of all expert ranks.
Experts are written as SequentialMLP has them (`local_experts.0.linear_fc1.weight`), counted within their rank.

`classes`: whose state dict lies in it. `core`: GPTModel, a flat dict. `legacy`: the language_model classes of
Megatron-LM before 0.18, nested; EE-LLM's exits exist there only. The names are in `families/megatron.py` and
`exits.py`.
"""

from argparse import Namespace
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch

from ee_scale.conversion.formats.ee_llm import exit_args, exit_rows, head_spans, own_heads
from ee_scale.conversion.model import Model
from ee_scale.conversion.target_files import PickleFile
from ee_scale.conversion.tensors import Piece
from ee_scale.errors import UserError
from ee_scale.families.megatron import EMBEDDING, FINAL_NORM, HEAD, LINEAR, LOCAL_EXPERTS, STACKED, Row, Rule

FILE = "model_optim_rng.pt"
Place = tuple[int, int, int]  # tensor rank, stage, expert rank


@dataclass(frozen=True)
class MegatronLayout:
    """How a checkpoint is spread: `tp` x `pp` x `ep` files, `chunks` virtual stages in each; whose classes and norms.

    Attributes:
        counts: layers of each chunk in the order of the layers, chunk by chunk and in each stage by stage.
        exit_numbers: EE-LLM's exit layers in the order of the file; shift: 1 where they are in `pre` position.
    """

    tp: int
    pp: int
    counts: tuple[int, ...]
    ep: int = 1
    chunks: int = 1
    classes: str = "core"
    spec: str = "te"
    exit_numbers: tuple[int, ...] = ()
    shift: int = 0

    def layers(self, stage: int, chunk: int) -> tuple[int, int]:
        """Number (from 0) of the first layer of a chunk, and how many there are; some hold an embedding alone."""
        place = chunk * self.pp + stage
        return sum(self.counts[:place]), self.counts[place]


def target_files(model: Model, layout: MegatronLayout, args: Namespace, iteration: str) -> list[PickleFile]:
    """A file per tensor, pipeline and expert rank."""
    check_layout(model, layout)
    if model.exits:
        vars(args).update(exit_args(model))
    files = []
    for place in product(range(layout.tp), range(layout.pp), range(layout.ep)):
        pieces = list(rank_pieces(model, layout, place))
        builder = _Builder(args, layout.classes)
        files.append(PickleFile(f"{iteration}/{folder_name(layout, place)}/{FILE}", pieces, builder))
    return files


def folder_name(layout: MegatronLayout, place: Place) -> str:
    """That of a rank's file."""
    rank, stage, expert_rank = place
    stages, experts = f"_{stage:03d}" * (layout.pp > 1), f"_{expert_rank:03d}" * (layout.ep > 1)
    return f"mp_rank_{rank:02d}{stages}{experts}"


def check_layout(model: Model, layout: MegatronLayout) -> None:
    """Raise `UserError` if the model cannot be spread like this."""
    model.map.check_tensor_parallel(layout.tp)
    model.map.check_expert_parallel(layout.ep)
    if layout.classes == "legacy":
        nameless = [row.core for row in model.map.layer_rows if row.legacy is None]
        if nameless:
            raise UserError(
                f"classes=legacy: {model.config.model_type} has {nameless[0]}, which those classes lack; "
                "use classes=core"
            )
        if model.map.shape.num_kv_heads % layout.tp:
            raise UserError(
                f"tp={layout.tp}: classes=legacy needs tp to divide num_key_value_heads={model.map.shape.num_kv_heads}"
            )
        if model.exits and model.exits.exit_kind.ee_llm is None:
            raise UserError(f"classes=legacy: EE-LLM has no exits of kind '{model.exits.kind}'")
        if model.exits and model.exits.shortlist:
            raise UserError(
                f"classes=legacy: EE-LLM has no heads of kind 'shortlist' (shortlist={model.exits.shortlist} of "
                f"vocab_size={model.map.shape.vocab_size}); its exits score every token"
            )
    elif model.exits:
        raise UserError("classes=core: Megatron-Core has no exits; use classes=legacy (EE-LLM), or drop the exits")


def rank_pieces(model: Model, layout: MegatronLayout, place: Place, chunk: int = 0) -> Iterator[Piece]:
    """The tensors of one rank (of one virtual chunk) by their flat names."""
    rank, stage, expert_rank = place
    names, experts = _Names(layout), rank_experts(model, layout, expert_rank)
    first, count = layout.layers(stage, chunk)
    hosted = hosted_exits(model, layout, first, count)
    at_start, at_end = (stage, chunk) == (0, 0), (stage, chunk) == (layout.pp - 1, layout.chunks - 1)

    def piece(row: Row, key: str, prefix: str = "") -> Piece:
        return _piece(model, row, key, prefix, rank, layout.tp, copy=expert_rank > 0 and row.expert is None)

    if at_start:
        yield piece(EMBEDDING, names.top(EMBEDDING))
    for local in range(count):
        here = [k for k, place, _ in hosted if place == local]
        for row in model.map.layer_rows:
            if row.expert is not None and row.expert not in experts:
                continue
            key = names.layer(row, experts.start)
            if here:
                key = model.exits.exit_kind.ee_llm_layer_key(key)
            yield piece(row, f"{names.layers}{local}.{key}", f"model.layers.{first + local}.")
        for k in here:
            for key, row, prefix in exit_rows(model.exits, model.map.layer_rows, k):
                yield piece(row, f"{names.layers}{local}.{key}", prefix)
    if at_end:
        yield piece(FINAL_NORM, names.top(FINAL_NORM))
        if not model.config.tie_word_embeddings:
            yield piece(HEAD, names.top(HEAD))
    yield from _copied_heads(model, layout, names, rank, hosted, at_start, at_end)


def rank_experts(model: Model, layout: MegatronLayout, expert_rank: int) -> range:
    """Numbers of the experts that an expert rank has."""
    each = model.map.num_experts // layout.ep
    return range(expert_rank * each, (expert_rank + 1) * each)


def _copied_heads(
    model: Model, layout: MegatronLayout, names: "_Names", rank: int, hosted: list, at_start: bool, at_end: bool
) -> Iterator[Piece]:
    """Output matrices: copies of a tied embedding, the exits' own."""
    tied = model.config.tie_word_embeddings
    if tied and not at_start and (at_end or hosted):
        yield _piece(model, EMBEDDING, names.tied_head, "", rank, layout.tp, copy=True)
    if hosted and own_heads(model):
        for k, _, index in hosted:
            spans = model.map.cut_vocab(head_spans(model, k), rank, layout.tp)
            rows = model.padded_vocab // layout.tp
            key = f"language_model.exit_output_layer.{index}.weight"
            yield Piece(key, 0, spans, (rows, model.map.shape.hidden_size))


def hosted_exits(model: Model, layout: MegatronLayout, first: int, count: int) -> list[tuple[int, int, int]]:
    """(our layer k, local layer it sits at, number of its output matrix) of exits in layers [first, first + count)."""
    numbers = [n for n in layout.exit_numbers if first < n <= first + count]
    return [(n - layout.shift, n - 1 - first, index) for index, n in enumerate(numbers)]


class _Names:
    """Flat names of the tensors of a rank."""

    def __init__(self, layout: MegatronLayout):
        self.legacy, self.local = layout.classes == "legacy", layout.spec == "local"
        self.layers = "language_model.encoder.layers." if self.legacy else "decoder.layers."
        self.tied_head = "word_embeddings_for_head.weight" if self.legacy else HEAD.core

    def layer(self, row: Row, first_expert: int) -> str:
        """Name inside a layer, on a rank whose experts start with `first_expert`."""
        if self.legacy:
            return row.legacy
        if row.expert is not None:
            return row.core.replace(STACKED, f"{LOCAL_EXPERTS}{row.expert - first_expert}.")
        return row.local if self.local and row.local else row.core

    def top(self, row: Row) -> str:
        """Name outside the layers."""
        return f"language_model.{row.legacy}" if self.legacy else row.core


def _piece(model: Model, row: Row, key: str, prefix: str, rank: int, tp: int, copy: bool = False) -> Piece:
    spans = model.map.rank_spans(row, prefix, rank, tp)
    shape = list(model.map.stored_shape(row))
    shape[row.dim] = sum(map(len, spans))
    return Piece(key, row.dim, spans, tuple(shape), copy=copy or (row.rule is Rule.WHOLE and rank > 0))


class _Builder:
    """What torch.save gets: plain Python around the tensors."""

    def __init__(self, args: Namespace, classes: str):
        self.args, self.legacy = args, classes == "legacy"

    def __call__(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        model = _nested(tensors) if self.legacy else _with_extra_state(tensors)
        return {"args": self.args, "checkpoint_version": 3.0, "iteration": 1, "model": model}


def _with_extra_state(tensors: Mapping[str, torch.Tensor]) -> OrderedDict:
    """Flat, with the empty entries that Megatron-Core's modules write and strict loading asks for."""
    found: OrderedDict[str, Any] = OrderedDict()
    for key, tensor in tensors.items():
        found[key] = tensor
        if key.endswith(LINEAR):
            found[f"{key.removesuffix('weight')}_extra_state"] = None
    if FINAL_NORM.core in found:  # the last stage: a tied model may have no matrix there, the module it has
        found["output_layer._extra_state"] = None
    return found


def _nested(tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """The legacy classes keep modules apart, and layers flat below `encoder`."""
    found: dict[str, Any] = {"language_model": {}}
    for key, tensor in tensors.items():
        parts = key.split(".")
        if parts[0] == "word_embeddings_for_head":
            found.setdefault(parts[0], {})["weight"] = tensor
        elif parts[1] == "embedding":
            found["language_model"]["embedding"] = {parts[2]: OrderedDict({parts[3]: tensor})}
        else:
            found["language_model"].setdefault(parts[1], OrderedDict())[".".join(parts[2:])] = tensor
    return found
