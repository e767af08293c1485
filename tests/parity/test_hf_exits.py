"""The exits as trained and the exits as opened by transformers are the same function, for every kind and family."""

from pathlib import Path

import pytest
import torch
from helpers.models import FAMILIES, VOCAB, some_tokens, spec_of, write_model
from helpers.spawn import spawn
from transformers import AutoModelForCausalLM

from ee_scale.backbone.loading import TensorFolder
from ee_scale.backbone.model_folder import ModelFolder
from ee_scale.backbone.stages import plan_stages
from ee_scale.exits.stage import build_stage, load_stage
from ee_scale.grid import Layout, join_grid
from ee_scale.inference.model import untrained_exits
from ee_scale.modeling.kinds import KINDS

EXITS = [2, 5]
HEADS = {"embedding": "full", "norm": "tied", "mlp": "low_rank", "layer": "shortlist"}


def _ids() -> torch.Tensor:
    return torch.randint(0, VOCAB, (2, 24), generator=torch.Generator().manual_seed(1))


def _trained_logits(rank: int, folder: Path, family: str) -> dict[str, dict]:
    """For every kind: the exits' parameters (random ones) and their logits, from the training side."""
    grid = join_grid(Layout(), torch.device("cpu"))
    config, results = ModelFolder(folder / family).decoder_config, {}
    for kind in KINDS:
        spec = spec_of(config, EXITS, kind, HEADS[kind])
        stage = build_stage(config, plan_stages(5, 1, EXITS), spec, grid, torch.float32)
        load_stage(stage, TensorFolder(folder / family), grid, init="copy", seed=0)
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in stage.exit_heads.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
            _, taps = stage(_ids())
            logits = {k: stage.exit_logits(k, taps[k]) for k in EXITS}
        results[kind] = {"logits": logits, "exits": stage.exit_heads.state_dict(), "spec": spec}
    return results


@pytest.fixture(scope="module", params=FAMILIES)
def trained(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    write_model(folder / request.param, request.param)
    (results,) = spawn(_trained_logits, 1, folder, request.param)
    return folder / request.param, results


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_side_equals_training_side(trained, kind):
    folder, results = trained
    model = untrained_exits(folder, results[kind]["spec"])
    exits = {name: value for name, value in results[kind]["exits"].items() if "_extra_state" not in name}
    model.exit_heads.load_state_dict(exits)
    stock = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        output = model(_ids())
        assert torch.equal(output.logits, stock(_ids()).logits)
        for k in EXITS:
            expected = results[kind]["logits"][k]
            assert expected.std() > 0.1
            if HEADS[kind] == "shortlist":  # in training, its own tokens alone
                none = torch.full_like(output.logits, -torch.inf)
                expected = none.index_copy(-1, torch.tensor(some_tokens()), expected)
            torch.testing.assert_close(output.exit_logits[k], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["norm", "mlp"])
def test_untrained_exits_are_the_logit_lens(trained, kind):
    folder, results = trained
    model, stock = untrained_exits(folder, results[kind]["spec"]), AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        hidden = stock(_ids(), output_hidden_states=True).hidden_states
        for k in EXITS[:1]:
            lens = model.exit_heads[str(k)].spec.capped(stock.lm_head(stock.model.norm(hidden[k])))
            assert torch.equal(model(_ids()).exit_logits[k], lens)


def test_a_padded_batch_gives_each_row_its_own_logits(trained):
    folder, results = trained
    model, ids = untrained_exits(folder, results["layer"]["spec"]), _ids()
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        padded = model(ids, attention_mask=mask, position_ids=positions).exit_logits
        alone = model(ids[:1, 7:]).exit_logits
    for k in EXITS:
        torch.testing.assert_close(padded[k][:1, 7:], alone[k], atol=1e-4, rtol=0)
