"""A draft model by itself: an exit as a stock model, or a size of a palette, checked against what it drafts for."""

import json
import shutil
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from ee_scale.artifact.exports import check_given
from ee_scale.artifact.hf_folder import write_beside
from ee_scale.artifact.run_folder import IDENTITY, read_run
from ee_scale.artifact.submodel import write_submodel
from ee_scale.backbone.loading import INDEX_NAME, weight_bytes, weight_files
from ee_scale.backbone.model_folder import ModelFolder, base_path
from ee_scale.backbone.model_path import plain_folder
from ee_scale.config.schema import ExportConfig
from ee_scale.data.dataset import check_tokens
from ee_scale.data.inputs import load_tokenizer, sources
from ee_scale.data.loader import windows
from ee_scale.data.text import prepare_text
from ee_scale.errors import UserError
from ee_scale.files import new_folder, write_text
from ee_scale.grid import pick_device
from ee_scale.palettes.draft_commands import Drafted, engine_sections
from ee_scale.palettes.draft_report import SOURCE, pair_words
from ee_scale.palettes.draft_trials import PROMPT, DraftTrials, Timed
from ee_scale.palettes.drafts import VERIFIED, DraftPair, whole_costs
from ee_scale.palettes.edge import measure_edge
from ee_scale.reading import shown

REPORT = "drafter.md"
DRAFTS = 4  # per cycle, where nothing was measured
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def run_drafter(config: ExportConfig) -> DraftPair | None:
    """Write the folder `out`, a stock model with a `drafter.md`; with `data`, what it brings. Raises `UserError`."""
    check_given(config)
    source, out = Path(config.src).expanduser(), Path(config.out).expanduser()
    is_run = (source / IDENTITY).is_file()
    target = _target(config, source, is_run=is_run)
    with new_folder(out) as folder:
        scored = 0
        if is_run:
            trained = write_submodel(folder, source, out.name, config.layer or 0, config.step, drafts=True)
            scored = trained.facts["early_exit"].get("shortlist", 0)
            if trained.files and config.base is None:
                raise UserError(
                    f"base: missing; {source} trained its backbone too: export it with kind=early_exit, and give that"
                )
        else:
            _copy(plain_folder(source), folder)
        check_pair(target, folder, f"src={source}")
        pair = None if config.data is None else _tried(config, target, folder, out.name)
        write_text(folder / REPORT, _markdown(target.resolve(), folder, out.name, pair, scored))
    return pair


def _target(config: ExportConfig, source: Path, *, is_run: bool) -> Path:
    """The model that it drafts for."""
    if is_run and config.layer is None:
        layers = ", ".join(map(str, read_run(source)["early_exit"]["layers"]))
        raise UserError(f"exit: missing; choose one of {source}'s exits: {layers}")
    for name, given in (("exit", config.layer), ("step", config.step)):
        if given is not None and not is_run:
            raise UserError(f"{name}={given}: goes with a tune run as src; {source} is none")
    if config.base is None and not is_run:
        raise UserError(f"base: missing; give the model that {source} drafts for")
    return base_path(source, read_run(source)) if config.base is None else Path(config.base).expanduser()


def _copy(source: Path, folder: Path) -> None:
    write_beside(folder, source)
    index = [source / INDEX_NAME] if (source / INDEX_NAME).is_file() else []
    for path in (*weight_files(source), *index):
        shutil.copyfile(path, folder / path.name)


def check_pair(target: Path, drafter: Path, source: str) -> None:
    """Raises `UserError`, which begins with `source`, unless every engine takes one as draft model of the other."""
    plain = plain_folder(target)
    large, small = (ModelFolder(path) for path in (plain, drafter))
    facts = [("config.vocab_size", large.config.vocab_size, small.config.vocab_size)]
    tokenizers = [load_tokenizer(path, name) for path, name in ((plain, "base"), (drafter, "src"))]
    facts += [(f"tokenizer: {name}", *both) for name, both in _differences(*tokenizers)]
    settings = [folder.generation_config() for folder in (large, small)]
    facts += [(name, *(getattr(one, name) for one in settings)) for name in TOKENS]
    for name, wanted, found in facts:
        if wanted != found:
            raise UserError(
                f"{source}: {name} is {shown(found)}, but {shown(wanted)} in {target}, for which it is to draft"
            )
    context = "max_position_embeddings"
    least, most = (getattr(one.config, context) for one in (large, small))
    if most < least:
        raise UserError(f"{source}: {context} is {most}, but {target} reads {least} tokens")


def _differences(*tokenizers: PreTrainedTokenizerBase) -> list[tuple[str, tuple[object, object]]]:
    """(what, of both) where two tokenizers differ."""
    a, b = (tokenizer.get_vocab() for tokenizer in tokenizers)
    if changed := sorted(token for token in a.keys() | b.keys() if a.get(token) != b.get(token)):
        return [(f"id of {changed[0]!r}", (a.get(changed[0]), b.get(changed[0])))]
    rules = [json.loads(t.backend_tokenizer.to_str()) if hasattr(t, "backend_tokenizer") else {} for t in tokenizers]
    parts = ("normalizer", "pre_tokenizer", "post_processor", "model")
    return [(part, (rules[0][part], rules[1][part])) for part in parts if rules[0].get(part) != rules[1].get(part)][:1]


def _tried(config: ExportConfig, target: Path, drafter: Path, name: str) -> DraftPair:
    """Texts that the target writes, drafted, and both models timed by themselves."""
    plain, device, names = plain_folder(target), pick_device(config.device), sources(config.data)
    shape, tokenizer = ModelFolder(plain).config, load_tokenizer(plain, "base")
    prefixes = prepare_text(names, tokenizer, plain, config.cache_dir, "text", True, fields="")
    check_tokens(prefixes, shape.vocab_size, 1, names=names, fields="", tokenizer=tokenizer)
    longest = shape.max_position_embeddings
    texts = windows(prefixes, min(PROMPT, longest // 2), 4, config.samples * PROMPT)
    trials = DraftTrials([{"tokens": rows} for rows, _ in texts], config.samples, longest, 0, device)
    timed = []
    for called, folder in ((str(target), plain), (name, drafter)):
        found = measure_edge(
            folder,
            "causal_lm",
            tokens=min(128, longest // 4),
            seconds=config.seconds,
            device=device.type,
            verify=VERIFIED,
        )
        assert found.token_ms is not None  # of a decoder
        timed.append(Timed(called, folder, whole_costs(found.token_ms, found.verify_ms)))
    return next(iter(trials.pairs(timed[0], timed[1:])))


def _markdown(target: Path, folder: Path, name: str, pair: DraftPair | None, scored: int) -> str:
    """scored: tokens of a shortlist head; 0: it scores all."""
    config, drafts = ModelFolder(folder).config, DRAFTS if pair is None else pair.greedy.drafts
    if pair is None:
        worth = f"""\
Not measured. `data=<held-out text>` measures acceptance and times when it is exported; the commands below draft
{drafts} tokens per cycle, a guess."""
    else:
        worth = f"""\
Foretold: {pair_words(pair)}; each draft takes {pair.cost:.0%} of the target's time for a token.

On texts that the target wrote itself, batch 1, with the times of both models under transformers on one machine
({SOURCE}). Engines with other kernels have other times; the acceptance is the same."""
    size, special = f"{config.num_hidden_layers} layers, {weight_bytes(folder) / 1e6:,.1f} MB", ", ".join(TOKENS)
    head = f" Its head scores {scored} tokens; the others have the logit 0." if scored else ""
    engines = "\n\n".join(engine_sections(Drafted(str(target), name, drafts)))
    return f"""\
# {name}: a draft model for `{target}`

{size}, a model of its own for any engine: the first layers run twice, with a cache of their own.
(ee_scale's lossless decoding runs them once.){head}

Checked against the target: {config.vocab_size} tokens, the tokenizer, special tokens ({special}), a
context of {config.max_position_embeddings} tokens.

## What it brings

{worth}

## Engines

Text stays the target's own, token by token (greedy) or in distribution. The commands are to be run in the folder that
the drafter lies in.

{engines}
"""
