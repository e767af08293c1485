"""The model's own text: prompts, documents, what a stop leaves, and what is written again."""

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.models import tiny_config
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

from ee_scale.cli.main import main
from ee_scale.config.compose import compose_config
from ee_scale.planning.tune import TunePlan, plan_tune
from ee_scale.training.own_text import ROWS, write_own_text

END, PROMPT, LENGTH = 1, 4, 12
TUNE = ["model=tiny", "data=python", f"data.seq_length={LENGTH}", "train.global_batch_size=16", "exits.layers=[2]"]
TUNE += ["data.own_text=0.25", f"data.own_text_prompt={PROMPT}", "train.steps=200", "parallel.device=cpu"]


class StoppedError(Exception):
    pass


class Writer:
    """Counts up from the last token of a prompt; sampled rows count in twos. The third row ends early."""

    def __init__(self, stop_at: int = -1):
        self.calls: list[tuple[bool, int]] = []
        self.stop_at = stop_at

    def __call__(self, prompts: torch.Tensor, sampled: bool, seed: int) -> torch.Tensor:
        if len(self.calls) == self.stop_at:
            raise StoppedError
        self.calls.append((sampled, seed))
        rows = prompts[:, -1:] + torch.arange(1, LENGTH - PROMPT + 1) * (2 if sampled else 1)
        rows[2, 3:] = END
        return rows


def plan(*overrides: str) -> TunePlan:
    return plan_tune(compose_config("tune", [*TUNE, *overrides]), Path("nowhere"), tiny_config("llama"))


@pytest.fixture
def corpora(tmp_path) -> list[str]:
    """Two: 10, 11, ..., 39 and 60, 61, ..., 64."""
    prefixes = []
    for first, count in ((10, 30), (60, 5)):
        prefix = str(tmp_path / f"corpus-{first}")
        builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(131))
        builder.add_item(torch.arange(first, first + count))
        builder.end_document()
        builder.finalize(f"{prefix}.idx")
        prefixes.append(prefix)
    return prefixes


def documents(folder: Path) -> list[list[int]]:
    dataset = IndexedDataset(str(folder / "tokens"))
    return [np.asarray(dataset[i]).tolist() for i in range(len(dataset))]


def test_documents_are_prompts_and_what_follows(tmp_path, corpora):
    writer = Writer()
    write_own_text(plan("data.own_text_tokens=500"), tmp_path / "own", corpora, END, writer)
    found = documents(tmp_path / "own")
    assert [sampled for sampled, _ in writer.calls] == [False, True] * (len(writer.calls) // 2)
    assert len({seed for _, seed in writer.calls}) == len(writer.calls)
    assert len(found) == ROWS * len(writer.calls)
    assert sum(map(len, found[: -2 * ROWS])) < 500 <= sum(map(len, found))
    for number, document in enumerate(found):
        first, step = document[0], 1 + number // ROWS % 2
        assert 10 <= first <= 36 or 60 <= first <= 61  # never across two corpora
        continued = 3 if number % ROWS == 2 else LENGTH - PROMPT
        last = first + PROMPT - 1
        wanted = [*range(first, last + 1), *(last + step * i for i in range(1, continued + 1)), END]
        assert document == wanted
    starts = [document[0] for document in found]
    assert len(set(starts)) > 10
    assert any(start >= 60 for start in starts)


@pytest.mark.parametrize("cut", [None, 10])
def test_a_restart_writes_what_is_missing_and_the_same_text(tmp_path, corpora, cut):
    given = plan("data.own_text_tokens=900")
    write_own_text(given, tmp_path / "whole", corpora, END, Writer())
    with pytest.raises(StoppedError):
        write_own_text(given, tmp_path / "own", corpora, END, Writer(stop_at=3))
    assert not (tmp_path / "own").exists()
    parts = sorted((tmp_path / "own.parts").iterdir())
    assert len(parts) == 3
    if cut is not None:
        parts[1].write_bytes(parts[1].read_bytes()[:cut])
    again = Writer()
    write_own_text(given, tmp_path / "own", corpora, END, again)
    assert len(again.calls) == len(documents(tmp_path / "whole")) // ROWS - (3 if cut is None else 2)
    for name in ("tokens.bin", "tokens.idx"):
        assert (tmp_path / "own" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not (tmp_path / "own.parts").exists()


def test_how_much_is_written():
    assert plan("data.own_text=0").own_text_tokens == 0
    assert plan().own_text_tokens == 200 * 16 * LENGTH // 4
    assert plan("data.sequences=100").own_text_tokens == 100 * LENGTH // 4
    assert plan("data.own_text_tokens=77").own_text_tokens == 77


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["tune", *TUNE, "data.own_text=1"], "data.own_text=1.0: must be at least 0 and below 1"),
        (["tune", *TUNE, f"data.own_text_prompt={LENGTH}"], f"data.own_text_prompt={LENGTH} is not below"),
        (["supernet", "+debug=supernet_cpu", "data.own_text=0.5"], "data.own_text=0.5: a setting of ee-scale tune"),
    ],
)
def test_refused(arguments, words, capsys):
    assert main(arguments) == 2
    assert capsys.readouterr().err.startswith(f"error: {words}")


def test_check_tells_it(capsys):
    assert main(["check", "tune", *TUNE]) == 0
    assert "own text 9,600 tokens, written first by the whole model" in " ".join(capsys.readouterr().out.split())
