"""Logits of the re-housed backbone equal transformers' at every cut: TP 1, 2, 4; PP 1, 2, 4; 2 x 2."""

from pathlib import Path

import pytest
import torch
from helpers.features import LENGTH, features_of
from helpers.models import FAMILIES, MIXTURES, MORE_FAMILIES, VARIANTS, VOCAB, load_whole, write_model
from helpers.spawn import spawn
from helpers.tuning import pipeline_logits

from ee_scale.grid import Layout, join_grid, leave_grid

TOLERANCE = 1e-5
GRIDS = [(1, 1), (2, 1), (1, 2), (4, 1), (1, 4), (2, 2)]  # tp, pp; 5 layers, so PP cuts are uneven
CASES = [(family, tied, grid) for family in FAMILIES for tied in (False, True) for grid in GRIDS]
MORE_GRIDS = [(2, 1), (1, 2), (4, 1), (2, 2)]
CASES += [(family, False, grid) for family in (*MORE_FAMILIES, *VARIANTS) for grid in MORE_GRIDS]
CASES += [(family, False, (1, 1)) for family in MIXTURES]  # whose experts are found in files otherwise
MODELS = sorted({case[:2] for case in CASES})


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders <family>-<tied>, each with `reference.pt`: ids and transformers' logits."""
    root = tmp_path_factory.mktemp("logits")
    for family, tied in MODELS:
        folder = write_model(root / f"{family}-{tied}", family, tie_word_embeddings=tied)
        torch.manual_seed(1)
        ids = torch.randint(0, VOCAB, (2, LENGTH))
        with torch.no_grad():
            logits = load_whole(folder)(ids).logits
        torch.save((ids, logits), folder / "reference.pt")
    return root


@pytest.fixture(scope="module")
def differences(models: Path) -> dict[tuple, float]:
    """Largest absolute difference of every case; the ranks of a world run all its cases."""
    found: dict[tuple, float] = {}
    for world in (1, 2, 4):
        cases = [case for case in CASES if case[2][0] * case[2][1] == world]
        for result in spawn(run_cases, world, models, cases):
            found |= result
    return found


def run_cases(rank: int, models: Path, cases: list[tuple]) -> dict[tuple, float]:
    found = {}
    for family, tied, (tp, pp) in cases:
        folder = models / f"{family}-{tied}"
        ids, expected = torch.load(folder / "reference.pt")
        grid = join_grid(Layout(tp, pp, 1), torch.device("cpu"))
        with torch.no_grad():
            logits = pipeline_logits(folder, grid, ids)
        if logits is not None:
            # Every tensor rank gathers the same logits; the worst of them counts.
            found[family, tied, (tp, pp)] = (logits - expected).abs().max().item()
        leave_grid()
    return found


def _name(case: tuple) -> str:
    family, tied, (tp, pp) = case
    return f"{family}-{'tied' if tied else 'untied'}-tp{tp}-pp{pp}"


@pytest.mark.parametrize("case", CASES, ids=_name)
def test_logits_equal_transformers(case: tuple, differences: dict[tuple, float]) -> None:
    assert differences[case] <= TOLERANCE


@pytest.mark.parametrize("family", [family for family, tied in MODELS if not tied])
@torch.no_grad()
def test_the_models_would_show_what_is_left_out(models: Path, family: str) -> None:
    """Without its window, its cap or the right table the logits differ by far more than the tolerance."""
    folder = models / f"{family}-False"
    ids, expected = torch.load(folder / "reference.pt")
    for feature in features_of(load_whole(folder)):
        model = load_whole(folder)
        feature.spoil(model)
        assert (model(ids).logits - expected).abs().max() > 100 * TOLERANCE, feature.words


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}),
        ("mixtral", {"num_experts_per_tok": 1}),
        ("olmoe", {"norm_topk_prob": True}),
    ],
)
def test_the_models_would_show_a_mistake(models: Path, family: str, change: dict) -> None:
    """With another rotary base or other experts the logits differ by far more than the tolerance."""
    folder = models / f"{family}-False"
    ids, expected = torch.load(folder / "reference.pt")
    model = load_whole(folder)
    changed = type(model)(type(model.config)(**{**model.config.to_dict(), **change})).eval()
    changed.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert (changed(ids).logits - expected).abs().max() > 100 * TOLERANCE
