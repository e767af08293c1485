"""The prompts of `ee-scale generate`: read, put into a template, turned into ids, checked against the model."""

import os
import sys
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from ee_scale.config.schema import GenerateConfig
from ee_scale.data.encode import without_row
from ee_scale.data.readers import TEXT, file_kind, read_records, read_text, whole_characters
from ee_scale.data.utf8 import bad_bytes
from ee_scale.errors import UserError, one_line
from ee_scale.files import is_file


def read_prompts(config: GenerateConfig) -> list[str]:
    """The texts of `prompt` or `prompts`. Raises `UserError` if there is none, both are given, or one is empty."""
    if (config.prompt is None) == (config.prompts is None):
        raise UserError("give either prompt=<text> (or prompt=- for standard input) or prompts=<file>")
    if config.prompts is not None:
        texts = _read_file(Path(config.prompts).expanduser(), config.prompts)
    elif isinstance(config.prompt, str):
        texts = [_standard_input() if config.prompt == "-" else config.prompt]
    else:
        texts = list(config.prompt)
    if not texts:
        raise UserError(
            f"prompts={config.prompts}: no prompt in it" if config.prompts else "prompt=[]: no prompt in it"
        )
    for number, text in enumerate(texts, 1):
        if not text:
            raise UserError(f"{_name(config, number, len(texts))}: empty; give at least one character")
    # Half a surrogate pair, from JSON or from an argument that is not UTF-8, is no text that a tokenizer takes.
    return [text.encode("utf-8", "replace").decode() for text in texts]


def encode_prompts(
    texts: list[str], tokenizer: PreTrainedTokenizerBase, model_config: PreTrainedConfig, config: GenerateConfig
) -> list[list[int]]:
    """Token ids of each prompt. Raises `UserError` for one that does not fit the context or the vocabulary."""
    if config.chat and not getattr(tokenizer, "chat_template", None):
        raise UserError(f"chat=true: the tokenizer of {config.model} has no chat template; use chat=false")
    context, rows = model_config.max_position_embeddings, []
    for number, text in enumerate(texts, 1):
        ids = _in_template(text, tokenizer, config) if config.chat else tokenizer(text, verbose=False)["input_ids"]
        name = _name(config, number, len(texts))
        if not ids:
            raise UserError(f"{name}: the tokenizer makes no token of it")
        if len(ids) >= context:
            raise UserError(f"{name}: {len(ids)} tokens, but the model's context has {context}; shorten it")
        if len(ids) + config.max_new_tokens > context:
            raise UserError(
                f"max_new_tokens={config.max_new_tokens}: with the {len(ids)} tokens of {name} above the model's "
                f"context of {context}; at most {context - len(ids)} fit"
            )
        if max(ids) >= model_config.vocab_size:
            raise UserError(f"{name}: {without_row(tokenizer, max(ids), model_config.vocab_size)}")
        rows.append(list(ids))
    return rows


def _in_template(text: str, tokenizer: PreTrainedTokenizerBase, config: GenerateConfig) -> list[int]:
    message = [{"role": "user", "content": text}]
    try:
        encoded: Any = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=True)
        return encoded["input_ids"]
    except Exception as error:  # jinja2 missing, or whatever a template does
        raise UserError(f"chat=true: the chat template of {config.model}: {one_line(error)}") from error


def _standard_input() -> str:
    try:
        return sys.stdin.read().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise UserError(f"prompt=-: {bad_bytes(error)}") from error


def _read_file(path: Path, given: str) -> list[str]:
    """One prompt per record with a field 'prompt', or per line that is not empty."""
    here = f"prompts={given}"
    if not is_file(path):
        raise UserError(f"{here}: cannot read it ({'a folder' if os.path.isdir(path) else 'no such file'})")
    if (kind := file_kind(path, here)) == TEXT:
        # Lines end with line feeds: other ends that Unicode knows stand in prompts.
        lines = "".join(text for text, _ in read_text(path, here)).split("\n")
        return [line for line in (line.removesuffix("\r") for line in lines) if line]
    return [_field(found.record, f"{here}: {found.place}") for found in read_records(path, kind, here)]


def _field(record: dict[str, Any], here: str) -> str:
    if "prompt" not in record:
        raise UserError(f"{here} is no JSON object with a field 'prompt'")
    if not isinstance(record["prompt"], str):
        raise UserError(f"{here}: 'prompt' is not a text but {type(record['prompt']).__name__}")
    return whole_characters(record["prompt"])


def _name(config: GenerateConfig, number: int, count: int) -> str:
    """How an error calls a prompt."""
    name = "prompt" if config.prompts is None else f"prompts={config.prompts}"
    return name if count == 1 and config.prompts is None else f"{name}: prompt {number}"
