"""`ee-scale <verb> key=value ...`: compose the config, then hand it to the verb's file."""

import errno
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from ee_scale.cli.console import console
from ee_scale.cli.help import guide, overview, prefix_help, verb_help
from ee_scale.config.compose import compose_config, stored_config, to_yaml
from ee_scale.config.schema import PREFIXES, RECIPES, VERBS, Config
from ee_scale.errors import BAD_INPUT, FAILED, REQUEUE, OutOfMemoryError, Requeue, RunError, UserError
from ee_scale.launching.signals import STOPPING
from ee_scale.libraries import prepare_libraries
from ee_scale.log import spelled
from ee_scale.reading import shown


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point. Returns the exit code: 0, 2 for bad input (one line on stderr), 1 for a run that cannot go on,
    75 for one that a signal stopped after it had saved, 130 when interrupted.
    """
    code = FAILED  # of an error that nobody catches
    try:
        code = _main(arguments)
    finally:
        _leave_grid(in_order=code in (0, REQUEUE))
    return code


def _main(arguments: Sequence[str] | None) -> int:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments:
        guide()
        return 0
    if arguments[0] in ("-h", "--help", "help"):
        overview()
        return 0
    if arguments == ["--models"]:
        prepare_libraries()
        importlib.import_module("ee_scale.cli.models").run()
        return 0
    try:
        if STOPPING in os.environ:  # a rank that torchrun starts again after a signal; the first one has said why
            return REQUEUE
        if arguments[0] == "check" and [word.partition("=")[0] for word in arguments[1:]] == ["model"]:
            prepare_libraries()
            importlib.import_module("ee_scale.cli.models").check(arguments[1].partition("=")[2])
            return 0
        prefix, verb, rest = split_command(arguments)
        if verb is None:
            assert prefix is not None  # of a command that trains; alone, it asks for help
            prefix_help(prefix)
            return 0
        if "-h" in rest or "--help" in rest:
            verb_help(verb)
            return 0
        if "-m" in rest or "--multirun" in rest:
            prepare_libraries()
            return importlib.import_module("ee_scale.cli.multirun").run(prefix, verb, rest)
        shows = _take_cfg_flag(rest)
        config = _given_config(verb, rest)
        if shows:
            sys.stdout.write(to_yaml(config))
            return 0
        prepare_libraries(config)
        if verb in RECIPES:
            return _loaded(prefix or "train").run(verb, config, rest) or 0
        return _loaded(verb).run(config, rest) or 0
    except KeyboardInterrupt:
        return 130
    except Requeue as left:
        return _say(str(left), REQUEUE, speaks=_is_first())
    except RunError as error:
        return _say(f"error: {error}", FAILED, speaks=_is_first() or isinstance(error, OutOfMemoryError))
    except UserError as error:
        return _say(f"error: {error}", BAD_INPUT, speaks=_speaks())
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        return _say(f"error: {error.strerror}: {shown(error.filename)}", BAD_INPUT, speaks=_speaks())


def _leave_grid(*, in_order: bool) -> None:
    """Of the groups that a command made. Where ranks did not end together, none waits for the others."""
    if (grid := sys.modules.get("ee_scale.grid")) is not None:
        grid.leave_grid() if in_order else grid.abandon_grid()


def _loaded(name: str) -> ModuleType:
    """The file of a command; torch and the others take seconds, in which a person sees that something is going on."""
    module = f"ee_scale.cli.{name}"
    if "RANK" in os.environ:
        return importlib.import_module(module)
    with console(stderr=True).status("loading torch, transformers, DeepSpeed and Megatron-Core"):
        return importlib.import_module(module)


def split_command(arguments: Sequence[str]) -> tuple[str | None, str | None, list[str]]:
    """(prefix, verb, overrides) of 'check tune model=...' or 'tune model=...'; no verb: help on the prefix is wanted.

    Raises `UserError` for words that are no command.
    """
    prefix, (first, *rest) = None, arguments
    if first in PREFIXES:
        prefix = first
        if not rest or rest[0] in ("-h", "--help"):
            return prefix, None, []
        first, *rest = rest
        if first not in RECIPES:
            raise UserError(f"ee-scale {prefix} {first}: give a command that trains: {' or '.join(RECIPES)}")
    if first not in VERBS:
        raise UserError(f"unknown command '{first}'; choose one of {', '.join([*VERBS, *PREFIXES])}")
    return prefix, first, rest


def _say(line: str, code: int, *, speaks: bool) -> int:
    if speaks:
        sys.stderr.write(f"{spelled(line)}\n")
    return code


def _is_first() -> bool:
    """What all ranks raise together, rank 0 says."""
    return os.environ.get("RANK", "0") == "0"


def _speaks() -> bool:
    """Before the ranks meet all of them see the same error and rank 0 says it; after that each has its own."""
    torch = sys.modules.get("torch")
    return _is_first() or (torch is not None and torch.distributed.is_initialized())


def _given_config(verb: str, words: Sequence[str]) -> Config:
    """Of the words, or of the file in `--config <file>` (as a run's config.yaml), which stands alone."""
    if not words or words[0] != "--config":
        return compose_config(verb, words)
    if len(words) != 2:
        raise UserError("--config: give one file, and no other setting beside it")
    return stored_config(VERBS[verb], Path(words[1]), f"--config {words[1]}: not the config of ee-scale {verb}")


def _take_cfg_flag(arguments: list[str]) -> bool:
    """`--cfg job` (Hydra's flag) or `--cfg`: print the resolved config and stop."""
    if "--cfg" not in arguments:
        return False
    at = arguments.index("--cfg")
    del arguments[at : at + 2 if arguments[at + 1 : at + 2] == ["job"] else at + 1]
    return True
