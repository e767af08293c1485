"""Records with a right answer, what a model answers, and how good that is."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ee_scale.backbone.model_folder import ModelFolder
from ee_scale.config.defer import DeferConfig
from ee_scale.config.schema import GenerateConfig
from ee_scale.data.folders import bad_bytes
from ee_scale.data.inputs import load_tokenizer
from ee_scale.data.labelled import Example, encode, evaluation_batches
from ee_scale.data.readers import RECORDS, file_kind, read_records, text_of
from ee_scale.errors import UserError, one_line
from ee_scale.families.build import AUTO_CLASS
from ee_scale.families.sizes import max_length
from ee_scale.files import is_file
from ee_scale.grid import pick_device
from ee_scale.inference.deferral import answer_score, plain, score_of, type_name
from ee_scale.inference.request import checked_request
from ee_scale.inference.run import DTYPES, answer_rows, decode_here, open_decoder
from ee_scale.progress import tracked

KEYS = {"generate": ("prompt", "reference"), "classify": ("text", "label")}


@dataclass(frozen=True)
class Case:
    """One record: the prompt (or text, with its second one), right answers, the large model's if it is there, a tag."""

    prompt: str
    pair: str | None
    references: tuple[str, ...]
    large: str
    tag: str | None


@dataclass(frozen=True)
class Answered:
    """Texts [n] (or names of classes), their scores [n] where they were wanted, and milliseconds of each on average.

    dtype: number type that was computed in, by torch's name.
    """

    texts: list[str]
    scores: list[float] = field(default_factory=list)
    ms: float = 0.0
    dtype: str = ""


def read_cases(config: DeferConfig) -> list[Case]:
    """The records of `data`. Raises `UserError` naming file, line and field."""
    path, here = Path(config.data).expanduser(), f"data='{config.data}'"
    if not is_file(path):
        raise UserError(f"{here}: {'cannot read a folder; give one file' if path.is_dir() else 'no such file'}")
    if (kind := file_kind(path, here)) not in RECORDS:
        raise UserError(f"{here}: is read as {kind}; prompts with references are fields of records (.jsonl)")
    bad, (prompt_key, reference_key) = bad_bytes("", config.errors), KEYS[config.task]
    prompt_key, reference_key = config.prompt_key or prompt_key, config.reference_key or reference_key
    cases = []
    for found in read_records(path, kind, here, bad):
        row, place = found.record, f"{here} {found.place}"
        prompt = text_of(row, prompt_key, place, "prompt_key", bad)
        if not prompt.strip():
            raise UserError(f"{place}: field '{prompt_key}' is empty")
        wanted = config.quality != "agreement"
        references = tuple(_names(row, reference_key, place, "reference_key")) if wanted else ()
        pair = None if config.pair_key is None else text_of(row, config.pair_key, place, "pair_key", bad)
        large = "" if config.large_key is None else text_of(row, config.large_key, place, "large_key", bad)
        tag = None if config.tag_key is None else _names(row, config.tag_key, place, "tag_key", many=False)[0]
        cases.append(Case(prompt, pair, references, large, tag))
    return cases


def _names(row: dict[str, object], key: str, here: str, setting: str, *, many: bool = True) -> list[str]:
    """A field that holds a text, a whole number or a bool, or a list of those. Raises `UserError`."""
    if key not in row:
        raise UserError(f"{here}: no field '{key}' (fields: {', '.join(sorted(row)[:12])}); set {setting}")
    value = row[key]
    values = value if many and isinstance(value, list) else [value]
    if not values or any(not isinstance(item, str | int) or item == "" for item in values):
        raise UserError(f"{here}: field '{key}'={value!r:.40}: give text that is not empty{', or a list' * many}")
    return [item if isinstance(item, str) else json.dumps(item) for item in values]


def qualities(kind: str, cases: Sequence[Case], texts: Sequence[str], large: Sequence[str]) -> np.ndarray:
    """[n] fp64: 1 where an answer is good. Case and white space do not count."""
    good = []
    for case, text, other in zip(cases, texts, large, strict=True):
        wanted = [other] if kind == "agreement" else case.references
        said = plain(text)
        good.append(any(plain(item) in said if kind == "contains" else plain(item) == said for item in wanted))
    return np.array(good, dtype=float)


def answer(config: DeferConfig, setting: str, cases: Sequence[Case], *, scored: bool = False) -> Answered:
    """What the model that the setting `small` or `large` names says to every record. Raises `UserError`."""
    return (_generate if config.task == "generate" else _classify)(config, setting, cases, scored)


def _generate(config: DeferConfig, setting: str, cases: Sequence[Case], scored: bool) -> Answered:
    """Greedy answers, without exits."""
    own = GenerateConfig(
        model=getattr(config, setting),
        prompt=[case.prompt for case in cases],
        chat=config.chat,
        max_new_tokens=config.max_new_tokens,
        batch_size=config.batch_size,
        device=config.device,
        dtype=config.dtype,
    )
    try:
        request, device = checked_request(own), pick_device(config.device)
        model = open_decoder(request, device)
        answers = decode_here(request, device, model=model)
    except UserError as error:
        raise UserError(f"{setting}={getattr(config, setting)}: {one_line(error)}") from error
    said = list(zip(request.prompts, answers.tokens, strict=True)) if scored else []
    scores = [answer_score(model, config.score, *ids) for ids in tracked(said, "scoring answers")]
    texts = [row["text"] for row in answer_rows(request, answers)]
    return Answered(texts, scores, 1000 * answers.seconds / len(cases), type_name(model))


@torch.inference_mode()
def _classify(config: DeferConfig, setting: str, cases: Sequence[Case], scored: bool) -> Answered:
    """The most likely class of each text."""
    name = getattr(config, setting)
    model, tokenizer = _open_classifier(config, setting)
    labels = [str(label) for _, label in sorted(model.config.id2label.items())]
    unknown = sorted({label for case in cases for label in case.references} - set(labels))
    if unknown:
        raise UserError(f"{setting}={name}: no class '{unknown[0]}' (its classes: {', '.join(labels[:12])})")
    examples = [Example(case.prompt, case.pair, labels[0]) for case in cases]
    length = min(config.seq_length, max_length(model.config))
    data = encode(examples, tokenizer, labels, length, model.config.vocab_size, "")
    texts, scores = [""] * len(cases), [0.0] * len(cases)
    started = time.perf_counter()
    for batch in tracked(list(evaluation_batches(data, config.batch_size)), f"asking the {setting} model"):
        inputs = {"input_ids": batch["tokens"]} | {
            key: batch[key] for key in ("attention_mask", "token_type_ids") if key in tokenizer.model_input_names
        }
        logits = model(**{key: value.to(model.device) for key, value in inputs.items()}).logits.float()
        for number, row in zip(batch["sample"].tolist(), logits, strict=True):
            texts[number], scores[number] = labels[int(row.argmax())], score_of(config.score, row[None])
    ms = 1000 * (time.perf_counter() - started) / len(cases)
    return Answered(texts, scores if scored else [], ms, type_name(model))


def _open_classifier(config: DeferConfig, setting: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Raises `UserError` for anything but a classifier with all its weights."""
    folder = ModelFolder.named(getattr(config, setting), setting)
    here = f"{setting}={getattr(config, setting)}"
    named = str((getattr(folder.config, "architectures", None) or [""])[0])
    if not named.endswith("ForSequenceClassification"):
        raise UserError(f"{here}: task=classify needs a classifier (...ForSequenceClassification), this is a {named!r}")
    dtype = {"dtype": DTYPES[config.dtype]} if config.dtype in DTYPES else {}
    try:
        model, info = AUTO_CLASS["classify"].from_pretrained(
            folder.path, trust_remote_code=False, output_loading_info=True, **dtype
        )
    except Exception as error:  # a folder that is damaged or was made up fails in many ways
        raise UserError(f"{here}: {one_line(error)}") from error
    if missing := sorted(info["missing_keys"]):  # transformers fills them with random numbers
        raise UserError(f"{here}: no tensor '{missing[0]}' in it ({len(missing)} are missing)")
    return model.to(pick_device(config.device)).eval(), load_tokenizer(folder.path, setting)
