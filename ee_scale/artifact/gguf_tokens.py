"""The vocabulary of a tokenizer as llama.cpp takes it: byte-level BPE ('gpt2'), or pieces of sentencepiece ('llama').

llama.cpp knows splitting rules by name. A name is written where the tokenizer's own rule is that one, by what
tokenizer.json says of it, and nowhere else: another rule would give other tokens without a word.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ee_scale.backbone.gguf_file import gguf
from ee_scale.data.inputs import load_tokenizer
from ee_scale.errors import UserError
from ee_scale.families.llama_cpp import COMPOSING, DIGIT, PIECES, SPLITS, WORDS
from ee_scale.log import log

MARK = "\u2581"  # a space in sentencepiece's pieces


def add_tokens(writer: gguf.GGUFWriter, folder: Path, size: int) -> None:
    """Tokens with their kinds, merges or scores, special ids and chat template, for a model of `size` tokens.

    Raises `UserError` for a tokenizer that llama.cpp has no name for.
    """
    tokenizer = load_tokenizer(folder, "src")
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UserError(f"src={folder}: {type(tokenizer).__name__} is no tokenizer of the package tokenizers")
    rules = json.loads(backend.to_str())
    tokens = {index: token for token, index in tokenizer.get_vocab().items()}
    if (most := max(tokens)) >= size:
        raise UserError(f"src={folder}: its tokenizer has a token {most}, but config.vocab_size={size}")
    pieces = _is_pieces(rules)
    kinds = _kinds(rules, tokens, size, folder)
    written = [tokens.get(index, f"[PAD{index}]") for index in range(size)]
    if pieces:  # what llama.cpp looks for in a text is what a person writes
        own = gguf.TokenType.USER_DEFINED
        written = [t.replace(MARK, " ") if kind == own else t for t, kind in zip(written, kinds, strict=True)]
    writer.add_tokenizer_model(PIECES if pieces else WORDS)
    writer.add_tokenizer_pre("default" if pieces else _rule(rules, folder))
    writer.add_token_list(written)
    writer.add_token_types(kinds)
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in rules["model"]["merges"]]
    if pieces:
        writer.add_add_space_prefix(_begins_with_space(rules, folder))
        writer.add_token_scores(_scores(merges, tokens, kinds))
    else:
        writer.add_token_merges(merges)
    _add_special(writer, tokenizer)


def _is_pieces(rules: Mapping[str, Any]) -> bool:
    return rules["model"]["type"] == "BPE" and bool(rules["model"].get("byte_fallback"))


def _rule(rules: Mapping[str, Any], folder: Path) -> str:
    """What llama.cpp calls the rule that splits a text into words."""
    model, normalizer = rules["model"], rules["normalizer"]
    steps = rules["pre_tokenizer"] or {}
    *before, last = steps["pretokenizers"] if steps.get("type") == "Sequence" else [steps]
    found, name = tuple(map(_step, before)), None
    by_itself = found in ((), (DIGIT,))  # then the byte-level step splits too
    if last.get("type") == "ByteLevel" and not last.get("add_prefix_space") and last["use_regex"] == by_itself:
        name = SPLITS.get((found, bool(model.get("ignore_merges"))))
    composed = name == COMPOSING and normalizer == {"type": "NFC"}
    if model["type"] != "BPE" or name is None or not (normalizer is None or composed):
        what = f"{model['type']}, normalizer {_named(normalizer)}, pre-tokenizer {_named(rules['pre_tokenizer'])}"
        raise UserError(f"src={folder}: its tokenizer ({what}) is none that ee_scale knows llama.cpp's name of")
    return name


def _step(step: Mapping[str, Any]) -> str:
    """The pattern of which a step makes words of their own; empty: another step."""
    if step.get("type") == "Digits" and step.get("individual_digits"):
        return DIGIT
    if step.get("type") == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
        return str(step["pattern"].get("Regex", ""))
    return ""


def _begins_with_space(rules: Mapping[str, Any], folder: Path) -> bool:
    """Whether a text gets a space in front, as sentencepiece's dummy prefix."""
    normalizer, split = rules["normalizer"], rules["pre_tokenizer"]
    steps = (normalizer or {}).get("normalizers", [normalizer] if normalizer else [])
    marks = {"type": "Replace", "pattern": {"String": " "}, "content": MARK}
    prefix = {"type": "Prepend", "prepend": MARK}
    kind = (split or {}).get("type")
    if kind in (None, "Split") and steps in ([marks], [prefix, marks]):
        return prefix in steps
    if kind == "Metaspace" and not steps and split["replacement"] == MARK and not split.get("split", True):
        if split["prepend_scheme"] != "never":
            log.warning(
                "%s: llama.cpp puts a space in front of a text that begins with one too, and of text behind a "
                "special token; this tokenizer does not",
                folder,
            )
        return split["prepend_scheme"] != "never"
    what = f"normalizer {_named(normalizer)}, pre-tokenizer {_named(split)}"
    raise UserError(f"src={folder}: its tokenizer ({what}) is none of sentencepiece's that llama.cpp knows")


def _named(rule: Mapping[str, Any] | None) -> str:
    if rule is None:
        return "none"
    parts = rule.get("normalizers") or rule.get("pretokenizers")
    return " + ".join(map(_named, parts)) if parts else str(rule.get("type"))


def _kinds(rules: Mapping[str, Any], tokens: Mapping[int, str], size: int, folder: Path) -> list[gguf.TokenType]:
    kind, unknown = gguf.TokenType, rules["model"].get("unk_token")
    kinds = [kind.NORMAL if index in tokens else kind.UNUSED for index in range(size)]
    for added in rules["added_tokens"]:
        if added["lstrip"] or added["rstrip"] or added["single_word"]:
            raise UserError(
                f"src={folder}: its token {added['content']!r} takes spaces beside it, or must be a whole word, but "
                "in llama.cpp it is found anywhere and takes nothing"
            )
        kinds[added["id"]] = kind.CONTROL if added["special"] else kind.USER_DEFINED
    for index, token in tokens.items() if _is_pieces(rules) else ():
        if token == unknown or re.fullmatch(r"<0x[0-9A-F]{2}>", token):
            kinds[index] = kind.UNKNOWN if token == unknown else kind.BYTE
    return kinds


def _scores(merges: list[str], tokens: Mapping[int, str], kinds: list[gguf.TokenType]) -> list[float]:
    """sentencepiece joins the pair whose piece has the highest score; tokenizers the one that comes first."""
    rank = {merge.replace(" ", ""): -float(place) for place, merge in reversed(list(enumerate(merges)))}
    worst = -float(len(merges))
    return [
        rank.get(tokens.get(index, ""), worst) if kind == gguf.TokenType.NORMAL else 0.0
        for index, kind in enumerate(kinds)
    ]


def _add_special(writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerBase) -> None:
    """Ids of special tokens, which of them a text gets by itself, and the chat template."""
    for name in ("bos", "eos", "unk", "pad"):
        if (index := getattr(tokenizer, f"{name}_token_id")) is not None:
            getattr(writer, f"add_{name}_token_id")(index)
    ids = tokenizer("a").input_ids
    writer.add_add_bos_token(ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(ids[-1] == tokenizer.eos_token_id)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)
    elif isinstance(tokenizer.chat_template, dict) and "default" in tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template["default"])
