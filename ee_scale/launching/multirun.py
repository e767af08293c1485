"""Sweeps: every combination of the settings that have several values, each a run of its own."""

import itertools
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from ee_scale.config.compose import PATH_SHORTHANDS, compose_config, find_setting
from ee_scale.config.schema import TrainingConfig
from ee_scale.config.words import is_text, sweep_values, write_word
from ee_scale.errors import REQUEUE, UserError
from ee_scale.launching.scripts import Task, check_task
from ee_scale.launching.signals import passing_on
from ee_scale.log import log
from ee_scale.reading import parse_json

LONGEST_NAME = 80
INTERRUPTED = 130


@dataclass(frozen=True)
class Combination:
    """One run of a sweep: name (also of its folder), the words for `ee-scale <verb>`, and what they compose to."""

    name: str
    overrides: list[str]
    config: TrainingConfig


def expand(verb: str, arguments: Sequence[str]) -> list[Combination]:
    """The combinations of all settings with several values, composed. Raises `UserError`."""
    choices = [_choices(verb, word) for word in arguments]
    at = [number for number, found in enumerate(choices) if len(found) > 1]
    if not at:
        raise UserError("-m: no setting has several values; give some, e.g. optim.lr=1e-4,3e-4")
    keys = [arguments[i].partition("=")[0] for i in at]
    for key, i in zip(keys, at, strict=True):
        if key == "out" or key.startswith("launcher"):
            raise UserError(f"{arguments[i]}: cannot be swept; every combination gets its own folder below out")
    products = [list(words) for words in itertools.product(*choices)]
    first = _composed(verb, products[0])
    group = (
        [write_word("logging.wandb_group", Path(first.out).absolute().name)]
        if first.logging.wandb_group is None
        else []
    )
    shorts = [key.rsplit(".", 1)[-1].lstrip("+") for key in keys]
    names = [short if shorts.count(short) == 1 else key.lstrip("+") for key, short in zip(keys, shorts, strict=True)]
    found = []
    for number, words in enumerate(products):
        values = [words[i].partition("=")[2] for i in at]
        name = folder_name(number, len(products), list(zip(names, values, strict=True)))
        overrides = [*(word for word in words if not word.startswith("out=")), *group, f"out={first.out}/{name}"]
        found.append(Combination(name, overrides, _compose(verb, name, overrides)))
    return found


def folder_name(number: int, count: int, differs: Sequence[tuple[str, str]]) -> str:
    """`3_lr=1e-4_rank=8`: the same for the same command, in the order of the sweep, safe as a name of a folder."""
    pairs = [f"{key}=" + re.sub(r"[^\w.+-]+", "-", value).strip("-") for key, value in differs]
    return f"{number:0{len(str(count - 1))}d}_{'_'.join(pairs)[:LONGEST_NAME]}"


def _choices(verb: str, word: str) -> list[str]:
    """The word with each of its values. What is text is cut at its commas; the rest is read by Hydra."""
    key, equals, value = word.partition("=")
    if not equals or word.startswith("--"):
        return [word]
    name, field = find_setting(verb, key)
    if name in PATH_SHORTHANDS or is_text(field):
        return [f"{key}={item}" for item in sweep_values(value)]
    try:
        override = OverridesParser.create().parse_override(word)
    except HydraException:
        return [word]
    if not override.is_sweep_override():
        return [word]
    try:
        return [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]
    except HydraException as error:
        raise UserError(f"{word}: -m takes lists of values (a,b), choice() and range()") from error


def _compose(verb: str, name: str, overrides: Sequence[str]) -> TrainingConfig:
    try:
        return _composed(verb, overrides)
    except UserError as error:
        raise UserError(f"{name}: {error}") from error


def _composed(verb: str, overrides: Sequence[str]) -> TrainingConfig:
    config = compose_config(verb, overrides)
    assert isinstance(config, TrainingConfig), verb  # no other command is swept
    return config


def check(verb: str, combinations: Sequence[Combination], *, launched: bool) -> list[Task]:
    """Every combination against its model and grid. Raises `UserError` that begins with its name."""
    tasks = []
    for combination in combinations:
        config = combination.config
        if not launched:  # as if by hand: whatever group launcher says of other machines
            config = replace(config, launcher=replace(config.launcher, kind="local", nodes=1))
        try:
            tasks.append(check_task(verb, config, combination.overrides))
        except UserError as error:
            raise UserError(f"{combination.name}: {error}") from error
    sizes = [task.processes for task in tasks]
    if launched and combinations[0].config.launcher.kind == "slurm" and len(set(sizes)) > 1:
        other = next(i for i, size in enumerate(sizes) if size != sizes[0])
        raise UserError(
            f"{combinations[other].name}: {sizes[other]} ranks per node, {sizes[0]} for {combinations[0].name}; "
            "the elements of one array job are of one size"
        )
    return tasks


def run_all(combinations: Sequence[Combination], commands: Sequence[Sequence[str]]) -> list[int | None]:
    """Exit codes; None for what a stop left out. A signal goes on to the run that is there, and ends the sweep."""
    codes: list[int | None] = [None] * len(commands)
    for number, command in enumerate(commands):
        log.info("run %d of %d: %s", number + 1, len(commands), combinations[number].name)
        signals: list[int] = []
        with passing_on(signals):
            codes[number] = subprocess.run(command, check=False).returncode
        if signals or codes[number] in (REQUEUE, INTERRUPTED):
            break
    return codes


def last_losses(out: Path) -> dict[str, float]:
    """Step and losses, by exit or subnet, of the last line of metrics.jsonl; empty if there is none."""
    try:
        last = parse_json((out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
        step, losses = last["step"], last.get("loss")
    except (OSError, ValueError, IndexError, KeyError, TypeError, AttributeError):
        return {}
    losses = losses if isinstance(losses, dict) else {"": losses}
    return {"step": step, **{key: value for key, value in losses.items() if isinstance(value, float)}}
