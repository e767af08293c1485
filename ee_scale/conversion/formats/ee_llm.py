"""EE-LLM's exits (arXiv 2312.04916, 2402.00518): which arguments and keys say what our `ExitSpec` says.

Its exit n sits at layer n and reads that layer's output, or with `pre_exit` its input: pre n is our n - 1. Exits hang
on the layer they sit at, so they follow it to its stage; output matrices are counted within a stage.
"""

from argparse import Namespace
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from transformers import PreTrainedConfig

from ee_scale.conversion.args import rope_of, window_of
from ee_scale.conversion.model import Model, body_rows
from ee_scale.conversion.tensors import Span, Update
from ee_scale.errors import UserError
from ee_scale.exits.placement import exit_spec
from ee_scale.families.megatron import EMBEDDING, HEAD, Row, Rule
from ee_scale.families.registry import megatron_family
from ee_scale.modeling.heads import ExitSpec
from ee_scale.modeling.kinds import KINDS
from ee_scale.modeling.modeling_early_exit import PREFIX

NORM = Row(("norm.weight",), "", "exit_norm.weight", Rule.WHOLE)


def spec_of_args(args: Namespace, config: PreTrainedConfig) -> ExitSpec | None:
    """The exits that a checkpoint's `args` describe; a file of plain Megatron has none. Raises `UserError`."""
    numbers = list(getattr(args, "exit_layer_nums", None) or [])
    if not numbers:
        return None
    mlp, block, norm = (bool(getattr(args, f"use_exit_{name}", False)) for name in ("mlp", "block", "norm"))
    if (mlp or block) and (mlp == block or not norm):
        raise UserError(
            f"args: use_exit_mlp={mlp}, use_exit_block={block}, use_exit_norm={norm}: exits here are one of nothing, "
            "norm, mlp + norm, block + norm"
        )
    pre = bool(getattr(args, "pre_exit", False))
    if pre and mlp:
        raise UserError("args: pre_exit with use_exit_mlp: EE-LLM refuses this pair, its meaning is not defined")
    if pre and 1 in numbers:
        raise UserError("args: pre_exit with exit_layer_nums=1: an exit in front of the first layer has none to read")
    if duplicates := sorted({n for n in numbers if numbers.count(n) > 1}):
        raise UserError(f"args.exit_layer_nums={numbers}: {duplicates[0]} twice")
    flags = {"use_exit_mlp": mlp, "use_exit_block": block, "use_exit_norm": norm}
    true = {name for name, value in flags.items() if value}
    kind = next(kind.name for kind in KINDS.values() if kind.ee_llm is not None and set(kind.ee_llm) == true)
    head = "full" if getattr(args, "untie_exit_output_weights", False) else "tied"
    if head == "tied" and not config.tie_word_embeddings:
        raise UserError(
            "args: untie_exit_output_weights=False with untied embeddings: EE-LLM has no output matrix for such exits"
        )
    if wrong := [n for n in numbers if not 1 <= n <= config.num_hidden_layers]:
        raise UserError(f"args.exit_layer_nums={numbers}: {wrong[0]} is not in 1..{config.num_hidden_layers}")
    layers = sorted(number - pre for number in numbers)
    # `exit_spec` refuses tied exits without a norm, as they have nothing to tune; EE-LLM pre-trains models with them.
    return replace(exit_spec(config, layers, kind, "full", rank=64), head=head)


def numbers_in_file(args: Namespace) -> list[int]:
    """EE-LLM's exit layers (1-based) in the order of the file, which counts the output matrices of a stage."""
    return list(getattr(args, "exit_layer_nums", None) or [])


def own_heads(model: Model) -> bool:
    """Whether EE-LLM's files hold an output matrix per exit; where all share the embedding they hold none."""
    return not (model.exits.head == "tied" and model.config.tie_word_embeddings)


def exit_args(model: Model) -> dict[str, Any]:
    """The arguments that EE-LLM reads; exits are always written in post position."""
    spec = model.exits
    return {
        "exit_layer_nums": list(spec.layers),
        "pre_exit": False,
        **{name: name in spec.exit_kind.ee_llm for name in ("use_exit_mlp", "use_exit_block", "use_exit_norm")},
        "untie_exit_output_weights": own_heads(model),
        "exit_layer_weight": [1.0] * len(spec.layers),
        "exit_layer_temperature": [1.0] * len(spec.layers),
        "tune_exit": True,
        "tokenizer_type": "Llama2Tokenizer",
    }


def check_old_classes(model: Model) -> None:
    """Raise `UserError` for what the old classes, or EE-LLM on top of them, would compute otherwise.

    They build their rotary embedding from the share and the interpolation factor alone: no base, no other scaling.
    """
    rope, config = rope_of(model.config), model.config
    window = window_of(config)
    for holds, reason in (
        (
            model.exits is not None and not megatron_family(config).megatron.in_ee_llm,
            f"model_type={config.model_type}: EE-LLM has Llama's layers",
        ),
        (rope["rope_theta"] != 1e4, f"rope_theta={rope['rope_theta']:g}: their base is 10000 and cannot be set"),
        (
            rope["rope_type"] == "llama3" or rope.get("factor", 1) % 1 != 0,
            f"rope_type={rope['rope_type']}, factor={rope.get('factor')}: they know linear by a whole factor",
        ),
        (window is not None, f"sliding_window={window}: they have none"),
    ):
        if holds:
            raise UserError(f"classes=legacy (also EE-LLM's): {reason}; the model would answer otherwise there")


def exit_rows(spec: ExitSpec, layer_rows: tuple[Row, ...], k: int) -> Iterator[tuple[str, Row, str]]:
    """(key behind `layers.<l>.`, row, prefix of the model's names) of the exit at layer k but for its output matrix."""
    prefix = f"{PREFIX}{k}."
    if body := spec.exit_kind.body:
        for row in body_rows(body, layer_rows):
            yield spec.exit_kind.ee_llm_key(row.legacy), row, prefix + body.exit_prefix
    if spec.exit_kind.normed:
        yield "exit_norm.weight", NORM, prefix


def head_spans(model: Model, k: int) -> tuple[Span, ...]:
    """The output matrix of the exit at layer k as one matrix, padded; a low-rank head is merged, a tied one copied."""
    base = (EMBEDDING if model.config.tie_word_embeddings else HEAD).hf[0]
    words, prefix = model.map.shape.vocab_size, f"{PREFIX}{k}.head"
    if model.exits.head == "full":
        span = Span(f"{prefix}.weight", 0, words)
    else:
        update = Update(f"{prefix}.up.weight", f"{prefix}.down.weight") if model.exits.head == "low_rank" else None
        span = Span(base, 0, words, update)
    padding = model.padded_vocab - words
    return (span, Span(None, 0, padding)) if padding else (span,)
