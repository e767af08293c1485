"""Compose a command's config from `configs/`, the schema and the command line."""

from collections.abc import Sequence
from copy import copy
from dataclasses import asdict, fields, is_dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar, cast, overload

import yaml
from hydra import compose, initialize, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ee_scale.config.checks import check_rules
from ee_scale.config.groups import Settings
from ee_scale.config.schema import GONE, VERBS, Config, EvaluateConfig
from ee_scale.config.supernet import SupernetConfig
from ee_scale.config.tune import TuneConfig
from ee_scale.config.words import find_field, literal, read_word
from ee_scale.errors import UserError, one_line

# A person writes model=<folder>; Hydra reads model=<option of the group>. A value that is no option means the path.
PATH_SHORTHANDS = {"model": "model.path", "data": "data.path"}
C = TypeVar("C", bound=Settings)


def config_dir() -> Path:
    """The folder of the YAML files: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    return package / "configs" if (package / "configs").is_dir() else package.parent / "configs"


@overload
def compose_config(verb: Literal["tune"], overrides: Sequence[str] = ()) -> TuneConfig: ...
@overload
def compose_config(verb: Literal["supernet"], overrides: Sequence[str] = ()) -> SupernetConfig: ...
@overload
def compose_config(verb: Literal["evaluate"], overrides: Sequence[str] = ()) -> EvaluateConfig: ...
@overload
def compose_config(verb: str, overrides: Sequence[str] = ()) -> Config: ...
def compose_config(verb: str, overrides: Sequence[str] = ()) -> Config:
    """The config of `verb`, an instance of its dataclass: defaults and overrides merged, references resolved.

    Raises `UserError` in one line for unknown keys, wrong types and values that their field refuses.
    """
    for name, schema in VERBS.items():
        _store(name, schema)
    try:
        arguments = [word for word in (expand_shorthand(verb, text) for text in overrides) if not _gone(verb, word)]
        with _hydra(verb):
            config = compose(verb if has_groups(verb) else f"{verb}_schema", overrides=arguments)
        return cast(Config, _finished(config))
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_one_line(error, verb)) from error


@cache  # Hydra reads the whole schema each time
def _store(verb: str, schema: type) -> None:
    ConfigStore.instance().store(name=f"{verb}_schema", node=schema)


def checked(config: C) -> C:
    """A config made in Python, as the command line makes it: complete, of the schema's types, within its rules.

    Raises `UserError` in one line.
    """
    verb = next(name for name, schema in VERBS.items() if isinstance(config, schema))
    try:
        return _finished(OmegaConf.merge(OmegaConf.structured(type(config)), _literal(asdict(cast(Any, config)))))
    except OmegaConfBaseException as error:
        raise UserError(_one_line(error, verb)) from error


def _finished(config: DictConfig | ListConfig) -> Any:
    """The dataclass of what was composed, if nothing is missing and every field's rule holds."""
    if missing := sorted(OmegaConf.missing_keys(config)):
        shorthands = {path: short for short, path in PATH_SHORTHANDS.items()}
        raise UserError(f"missing value: {', '.join(shorthands.get(key, key) for key in missing)} (give key=value)")
    composed = cast(Settings, OmegaConf.to_object(config))
    check_rules(composed)
    return composed


def _gone(verb: str, word: str) -> bool:
    key, _, value = word.lstrip("+").partition("=")
    return is_gone(VERBS[verb], key, value)


def is_gone(schema: type, key: str, value: str) -> bool:
    """Whether a setting is there no more and has its one legal value. Raises `UserError` for another value."""
    legal, why = GONE.get(schema, {}).get(key, (value, ""))
    if value != legal:
        raise UserError(f"{key}={value}: {why}")
    return bool(why)


def has_groups(verb: str) -> bool:
    """Whether the verb is built from the groups in `configs/`; the others are flat and need no YAML."""
    return (config_dir() / f"{verb}.yaml").is_file()


def group_options(verb: str) -> dict[str, list[str]]:
    """The groups that a verb is built from, with the options that fit its schema, by name."""
    root, known = config_dir(), {field.name for field in fields(VERBS[verb])}
    defaults = OmegaConf.load(root / f"{verb}.yaml").defaults
    groups = sorted({"debug", *(str(name) for entry in defaults if isinstance(entry, DictConfig) for name in entry)})
    found = {}
    for group in groups:
        paths = sorted((root / group).glob("*.yaml"))
        # What goes to the top of the config (debug, recipe) may belong to another verb.
        fitting = [path for path in paths if not _is_global(path) or set(OmegaConf.load(path)) - {"defaults"} <= known]
        found[group] = [path.stem for path in fitting]
    return found


def _is_global(path: Path) -> bool:
    return path.read_text(encoding="utf-8").startswith("# @package _global_")


def _hydra(verb: str) -> Any:
    # A flat verb must not see the folder: hydra would take its `model=` for the group of that name.
    return (
        initialize_config_dir(str(config_dir()), version_base="1.3")
        if has_groups(verb)
        else initialize(None, version_base="1.3")
    )


def expand_shorthand(verb: str, override: str) -> str:
    """`model=<folder>` -> `model.path="<folder>"`, for the commands whose model and data are groups.

    `--show-exits` -> `show_exits=true`.
    """
    if override.startswith("--"):
        name, equals, value = override[2:].partition("=")
        override = f"{name.replace('-', '_')}={value if equals else 'true'}"
    key, equals, value = override.partition("=")
    if not equals:
        raise UserError(f"argument {override!r} is not of the form key=value")
    if any("\ud800" <= char <= "\udfff" for char in value):
        raise UserError(f"argument {override!r} is not UTF-8 text")
    key, field = find_setting(verb, key)
    if key in PATH_SHORTHANDS and has_groups(verb):
        if (config_dir() / key / f"{Path(value).name}.yaml").is_file() and "/" not in value:
            return f"{key}={value}"
        key, field = find_setting(verb, PATH_SHORTHANDS[key])
    return read_word(key, value, field)


def find_setting(verb: str, key: str) -> tuple[str, Any]:
    """The key as the schema has it, and its field (None: of no setting)."""
    if key == "dry_run" and has_groups(verb):
        key = "launcher.dry_run"
    key = next((field.name for field in fields(VERBS[verb]) if field.metadata.get("written") == key), key)
    return key, find_field(VERBS[verb], key)


def to_yaml(config: Settings) -> str:
    """A config as it is stored beside a run."""
    return OmegaConf.to_yaml(OmegaConf.create(_literal(asdict(config))), resolve=True)


def from_yaml(schema: type[C], text: str) -> C:
    """What `to_yaml` wrote; nothing in it is a reference.

    Raises `YAMLError` or OmegaConf's errors for anything else.
    """
    values = yaml.safe_load(text)
    if not isinstance(values, dict):
        raise yaml.YAMLError(f"not a mapping but {type(values).__name__}")
    for key in GONE.get(schema, {}):
        group, _, name = key.partition(".")
        if isinstance(found := values.get(group), dict) and name in found and is_gone(schema, key, str(found[name])):
            del found[name]
    return cast(C, OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), _literal(values))))


def stored_config(schema: type[C], path: Path, otherwise: str) -> C:
    """What `to_yaml` wrote to a file, within the rules. Raises `UserError` that begins with `otherwise`."""
    try:
        return checked(from_yaml(schema, path.read_text(encoding="utf-8")))
    except (OSError, ValueError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{otherwise} ({one_line(error)})") from error


def with_value(config: C, key: str, value: object) -> C:
    """A copy of a config with another value of a dotted key."""
    group, _, rest = key.partition(".")
    changed = copy(config)
    setattr(changed, group, with_value(getattr(config, group), rest, value) if rest else value)
    return changed


def _literal(value: object) -> Any:
    if isinstance(value, dict):
        return {key: _literal(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_literal(item) for item in value]
    return literal(str(value)) if isinstance(value, (str, Path)) else value


def known_keys(schema: type, prefix: str = "") -> list[str]:
    """Every dotted key of a schema, as it is written on the command line."""
    keys = []
    for field in fields(schema):
        keys.append(prefix + field.metadata.get("written", field.name))
        if is_dataclass(field.default_factory):
            keys += known_keys(field.default_factory, f"{prefix}{field.name}.")
    return keys


def _one_line(error: Exception, verb: str) -> str:
    """Hydra's several lines, said in one with the fix."""
    if isinstance(error, OverrideParseException):
        return f"cannot read argument {error.override!r}: close brackets and quotes, and quote what is text: key='...'"
    text = " ".join(line.strip() for line in str(error.__cause__ or error).splitlines() if line.strip())
    for marker in ("Could not override '", "Key '"):
        if marker in text:
            key = text.split(marker, 1)[1].split("'", 1)[0].lstrip("+")
            return _unknown_key(_full_key(text, key), verb)
    if "Could not find '" in text:
        group, _, option = text.split("Could not find '", 1)[1].split("'", 1)[0].rpartition("/")
        options = text.partition(f"Available options in '{group}':")[2].partition("Config search path")[0]
        return (
            f"{group}={option}: no such file or folder, and no option of configs/{group} ({', '.join(options.split())})"
        )
    return f"{_full_key(text, '')}: {text.partition(' full_key:')[0]}".removeprefix(": ")


def _full_key(text: str, otherwise: str) -> str:
    return text.partition("full_key: ")[2].split(" ", 1)[0] or otherwise


def _unknown_key(key: str, verb: str) -> str:
    keys = known_keys(VERBS[verb])
    near = [name for name in keys if name.rsplit(".", 1)[-1] == key] or get_close_matches(key, keys, n=1, cutoff=0.6)
    hint = f"did you mean {', '.join(near)}?" if near else f"see ee-scale {verb} --help"
    return f"unknown key '{key}'; {hint}"
