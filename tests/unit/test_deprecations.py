"""The net for deprecated calls catches ours, however they are made, in every process; it lets others pass."""

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
import torch
from helpers.cli import run_cli
from helpers.spawn import RankError, spawn
from transformers.utils.deprecation import deprecate_kwarg
from typing_extensions import deprecated


class Renamed(torch.nn.Module):
    """As in transformers: the warning is attributed to torch, which calls the wrapper."""

    @deprecate_kwarg("old", "99.0", new_name="new")
    def forward(self, new: int = 0) -> int:
        return new


@deprecated("use another one", category=FutureWarning)
def old_function() -> int:
    return 1


def warn_as_torch(level: int) -> int:
    warnings.warn("use another one", DeprecationWarning, stacklevel=level)
    return 1


def elsewhere(code: str) -> Callable[..., int]:
    """A function of another library."""
    names = {"warnings": warnings}
    exec(compile(f"def call(function, **options):\n    {code}", "/site-packages/other.py", "exec"), names)
    return names["call"]


OUR_CALLS = [
    lambda: Renamed()(old=1),
    lambda: torch.no_grad()(Renamed())(old=1),
    old_function,
    lambda: warn_as_torch(1),
    lambda: warn_as_torch(2),
    lambda: elsewhere("warnings.warn('old', FutureWarning)")(None),
]


@pytest.mark.parametrize("call", OUR_CALLS)
def test_our_calls_are_errors(call: Callable[[], int]) -> None:
    with pytest.raises((FutureWarning, DeprecationWarning)):
        call()


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(("function", "options"), [(Renamed(), {"old": 1}), (old_function, {})])
def test_those_of_other_libraries_are_not(function: Callable[..., int], options: dict[str, int]) -> None:
    assert elsewhere("return function(**options)")(function, **options) == 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_another_library_asks_of_compiled_code_is_not() -> None:
    """As Megatron does with numpy."""
    assert elsewhere("return function(options['what'], dtype=float)")(numpy.array, what=Old()) == 1
    with pytest.raises(DeprecationWarning):
        numpy.array(Old(), dtype=float)


class Old:
    """numpy 2 warns, from C, about the missing `copy`."""

    def __array__(self, dtype: type | None = None) -> numpy.ndarray:
        return numpy.ones(1)


def rename_in_a_rank(rank: int) -> None:
    Renamed()(old=1)


def test_those_in_other_processes_are_errors_too(tmp_path: Path) -> None:
    with pytest.raises(RankError, match="FutureWarning: `old` is deprecated"):
        spawn(rename_in_a_rank, 1)
    finished = run_cli(["tune", "+debug=cpu", "--cfg"], tmp_path, inject=rename_in_a_rank)
    assert finished.code == 1
    assert "FutureWarning: `old` is deprecated" in finished.output
