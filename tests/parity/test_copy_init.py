"""A copied exit is the logit lens at step 0: final norm and lm_head on the hidden state after layer k, bit for bit."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from helpers.models import FAMILIES, VOCAB, load_whole, some_tokens, spec_of, tiny_config, write_model
from helpers.reference import backbone_states, soft_cap
from helpers.spawn import spawn
from torch.nn import functional

from ee_scale.backbone.loading import TensorFolder
from ee_scale.backbone.model_folder import ModelFolder
from ee_scale.backbone.stages import plan_stages
from ee_scale.exits.stage import TuningStage, build_stage, load_stage
from ee_scale.grid import Layout, join_grid

LAYERS = (1, 2, 3, 4, 5)  # 5 is the last: its lens is the model itself
EXITS = [(kind, head) for kind in ("norm", "mlp") for head in ("tied", "low_rank", "full")] + [("norm", "shortlist")]
CASES = [(family, tied, *exit_) for family in FAMILIES for tied in (False, True) for exit_ in EXITS]


@pytest.fixture(scope="module")
def logits(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple, dict[int, tuple[torch.Tensor, torch.Tensor]]]:
    """By case and exit layer: (logits of the exit, logit lens)."""
    root = tmp_path_factory.mktemp("copy_init")
    for family in FAMILIES:
        for tied in (False, True):
            write_model(root / f"{family}-{tied}", family, tie_word_embeddings=tied)
    return spawn(exits_and_lenses, 1, root)[0]


def exits_and_lenses(rank: int, root: Path) -> dict[tuple, dict[int, tuple[torch.Tensor, torch.Tensor]]]:
    grid = join_grid(Layout(), torch.device("cpu"))
    ids = torch.randint(0, VOCAB, (2, 20), generator=torch.Generator().manual_seed(3))
    found = {}
    for family, tied, kind, head in CASES:
        folder = root / f"{family}-{tied}"
        config = ModelFolder(folder).decoder_config
        spec = spec_of(config, LAYERS, kind, head)
        stage = build_stage(config, plan_stages(5, 1, LAYERS), spec, grid, torch.float32)
        load_stage(stage, TensorFolder(folder), grid, init="copy", seed=0)
        lens = logit_lens(folder, ids, some_tokens() if head == "shortlist" else None)
        found[family, tied, kind, head] = {k: (exit_, lens[k]) for k, exit_ in exit_logits(stage, ids).items()}
    return found


@torch.no_grad()
def exit_logits(stage: TuningStage, ids: torch.Tensor) -> dict[int, torch.Tensor]:
    _, taps = stage(ids)
    return {k: stage.exit_logits(k, taps[k]) for k in LAYERS}


@torch.no_grad()
def logit_lens(folder: Path, ids: torch.Tensor, tokens: list[int] | None) -> dict[int, torch.Tensor]:
    """Of some tokens, in this order, or of all."""
    model = load_whole(folder)
    states, _, final = backbone_states(model, ids)
    matrix = model.lm_head.weight if tokens is None else model.lm_head.weight[tokens]
    lens = {k: soft_cap(functional.linear(model.model.norm(states[k]), matrix), model.config) for k in LAYERS}
    if tokens is None:
        assert torch.equal(lens[LAYERS[-1]], final)
    else:
        torch.testing.assert_close(lens[LAYERS[-1]], final[..., tokens])
    return lens


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_copied_exit_is_the_logit_lens(case: tuple, logits: dict) -> None:
    assert logits[case].keys() == set(LAYERS)
    for k, (exit_, lens) in logits[case].items():
        assert torch.equal(exit_, lens), f"exit {k}: off by {(exit_ - lens).abs().max()}"


def test_lenses_differ(logits: dict) -> None:
    """Each layer has its own lens, so an exit at the wrong layer would show."""
    for family in FAMILIES:
        lenses = [lens for _, lens in logits[family, False, "norm", "tied"].values()]
        assert all((a - b).abs().max() > 0.1 for a, b in pairwise(lenses))
    assert tiny_config("llama").num_hidden_layers == LAYERS[-1]
