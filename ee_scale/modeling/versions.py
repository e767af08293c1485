"""The versions of transformers this code works with, and what they name differently.

Imported before anything else of transformers: where it is too old, other imports fail in words that lead nowhere.
"""

import os
import re
import warnings
from dataclasses import fields
from typing import Any

import transformers
from transformers.modeling_outputs import CausalLMOutputWithPast

OLDEST, NEWEST = "5.21", "5.24"  # tested
CACHE_NAMES = ("cache", "past_key_values")


def check_transformers(version: str) -> None:
    """Raise ImportError, in one line, for a version that is too old; warn about one that is newer than those tested."""
    number = _number(version)
    if number < _number(OLDEST):
        raise ImportError(
            f"early exits need transformers {OLDEST} or newer (tested up to {NEWEST}), but {version} is installed: "
            f"pip install 'transformers=={NEWEST}.*'"
        )
    if number > _number(NEWEST) and os.environ.get("RANK", "0") == "0":  # of many processes one says it
        warnings.warn(
            f"early exits were tested with transformers {OLDEST} to {NEWEST}, but {version} is installed; if anything "
            f"fails: pip install 'transformers=={NEWEST}.*'",
            stacklevel=2,
        )


def cache_name(output: type = CausalLMOutputWithPast) -> str:
    """What the installed transformers calls the cache, as argument and in outputs: it was renamed in 5.24."""
    names = {field.name for field in fields(output)}
    return next(name for name in CACHE_NAMES if name in names)


def name_cache(kwargs: dict[str, Any]) -> None:
    """Give a cache among keyword arguments the installed transformers' name. Raises ValueError if there are two."""
    given = [cache for name in CACHE_NAMES if (cache := kwargs.pop(name, None)) is not None]
    if len(given) == 2 and given[0] is not given[1]:
        raise ValueError(f"{' and '.join(CACHE_NAMES)} are two names of one argument: give one of them")
    if given:
        kwargs[CACHE] = given[0]


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


check_transformers(transformers.__version__)
CACHE = cache_name()
