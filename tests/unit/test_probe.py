"""The probe: readings against transformers' own forward pass, timed work against the real one, the verdict's words."""

import pytest
import torch
from helpers.models import FAMILIES, VOCAB, load_whole, tiny_config, write_model
from transformers import DynamicCache

from ee_scale.errors import UserError
from ee_scale.evaluation.cost_model import flat_costs, threshold_speedup
from ee_scale.evaluation.probe import Passage, Reading, given_text, own_text, read_exits, repeated_share
from ee_scale.evaluation.probe_report import cost_lines, outlook, outlook_table, verdict
from ee_scale.evaluation.timing import FilledCache, PartTimes, layer_pass, measure_parts
from ee_scale.exits.placement import exit_spec
from ee_scale.inference.model import untrained_exits
from ee_scale.modeling.costs import best_draft_length
from ee_scale.modeling.versions import CACHE

TEMPERATURE, BOUND = 0.7, 0.9


def _model(folder, family, layers=(1, 3), kind="mlp", **changes):
    write_model(folder, family, **changes)
    head = "low_rank" if kind == "mlp" else "tied"
    model = untrained_exits(folder, exit_spec(tiny_config(family, **changes), layers, kind, head, 4))
    with torch.no_grad():  # so that exits differ from the logit lens, and their low-rank part counts
        for name, parameter in model.exit_heads.named_parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    return model


def counted(ids):
    """Windows of which every prediction counts."""
    return ids, torch.ones(ids.shape[0], ids.shape[1] - 1, dtype=torch.bool)


@pytest.mark.parametrize("family", FAMILIES)
def test_readings_are_those_of_a_plain_forward_pass(tmp_path, family):
    model = _model(tmp_path, family)
    passages = list(given_text(counted(torch.randint(VOCAB, shape)) for shape in ((2, 12), (3, 9))))
    passages[0].kept[1, 5:] = False
    rows = read_exits(model, passages, TEMPERATURE, BOUND)
    found = {1: [], 3: [], 5: []}
    for passage in passages:
        with torch.no_grad():
            output = model(passage.ids[:, :-1])
        for k, logits in {**output.exit_logits, 5: output.logits}.items():
            found[k].append(logits[passage.kept])
    logits = {k: torch.cat(parts) for k, parts in found.items()}
    final = (logits[5] / TEMPERATURE).softmax(-1)
    for row in rows:
        own = logits[row.layer]
        agreed = own.argmax(-1) == logits[5].argmax(-1)
        scores = own.softmax(-1).amax(-1)
        shared = torch.minimum(final, (own / TEMPERATURE).softmax(-1)).sum(-1)
        assert row.tokens == len(agreed) == 11 + 5 + 24
        assert row.agreement == pytest.approx(agreed.double().mean().item())
        assert row.acceptance == pytest.approx(shared.double().mean().item(), rel=1e-5)
        # Any limit: what it lets go, and whether the others make up for what it gets wrong.
        allowed = [
            (scores >= limit).double().mean().item()
            for limit in scores
            if (agreed | ~(scores >= limit)).double().mean() >= BOUND
        ]
        assert row.leaving == pytest.approx(max(allowed, default=0.0))
        if row.limit is not None:
            left = scores >= row.limit - 1e-6
            assert left.double().mean().item() == pytest.approx(row.leaving)


def test_equal_scores_leave_together(tmp_path):
    """An exit that is equally sure of everything, and often wrong, must not be let go by the order of its tokens."""
    model = _model(tmp_path, "llama")
    with torch.no_grad():
        model.exit_heads["1"].norm.weight.zero_()
    (row, _) = read_exits(model, given_text([counted(torch.randint(VOCAB, (4, 20)))]), 1.0, 0.5)
    assert (row.leaving, row.limit) == (0.0, None)


def test_nothing_to_read(tmp_path):
    with pytest.raises(UserError, match="no tokens"):
        read_exits(_model(tmp_path, "llama"), [], 1.0, 0.98)


def test_own_text_is_generate_up_to_the_end_mark(tmp_path):
    model, prompts = _model(tmp_path, "llama"), torch.randint(3, VOCAB, (6, 5))
    plain = load_whole(tmp_path)
    free = plain.generate(prompts, max_new_tokens=12, do_sample=False, eos_token_id=None)
    end = free[0, 8].item()  # row 0 has it as a new token
    model.generation_config.eos_token_id = [1, end]
    passage = own_text(model, prompts, 12, None, 0)
    for row, ids in enumerate(free[:, 5:].tolist()):
        ended = next((i for i, token in enumerate(ids) if token in (1, end)), 11)
        assert passage.ids[row, 5 : 5 + ended + 1].tolist() == ids[: ended + 1]
        expected = [False] * 4 + [True] * (ended + 1) + [False] * 20
        assert passage.kept[row].tolist() == expected[: passage.kept.shape[1]]


def test_sampled_text_follows_its_seed(tmp_path):
    model, prompts = _model(tmp_path, "llama"), torch.randint(3, VOCAB, (2, 5))
    state = torch.get_rng_state()
    first, again, other = (own_text(model, prompts, 8, 2.0, seed).ids.tolist() for seed in (1, 1, 2))
    assert first == again != other
    assert torch.equal(torch.get_rng_state(), state)


def test_repeated_share():
    looping = torch.tensor([[9, 1, 2, 1, 2, 1, 2, 7, 7]])
    kept = torch.ones(1, 8, dtype=torch.bool)
    kept[0, -2:] = False
    # Runs of two among 1 2 1 2 1 2: five, of which the last three came before.
    assert repeated_share(Passage(looping, kept), length=2) == pytest.approx(3 / 5)
    assert repeated_share(Passage(looping, kept), length=9) == 0.0


@pytest.mark.parametrize("family", ["llama", "qwen3", "olmo2"])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_timed_pass_is_the_real_one(tmp_path, family, rows, attention):
    base = load_whole(write_model(tmp_path, family)).base_model
    base.config._attn_implementation = attention
    cache, hidden = FilledCache(7, 4), torch.randn(1, rows, 64)
    run = layer_pass(base, cache, hidden)
    with torch.no_grad():
        run()
        states = run()  # the second pass must not see the first
        real = DynamicCache(config=base.config)
        for index, (keys, values) in cache.layers.items():
            real.update(keys[:, :, :7].clone(), values[:, :, :7].clone(), index)
        expected = base(inputs_embeds=hidden, **{CACHE: real}).last_hidden_state
    torch.testing.assert_close(base.norm(states), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_part_gets_a_time(tmp_path, family):
    heard: list[float] = []
    kind = "norm" if family == "qwen2" else "mlp"
    parts = measure_parts(_model(tmp_path, family, kind=kind), 16, 0.01, rows=(1, 4), advance=heard.append)
    costs = parts.costs
    assert costs.num_layers == 5
    assert (set(costs.layer), set(costs.head), set(costs.checks)) == ({1, 4}, {1, 4}, {1, 3})
    assert min([*costs.layer.values(), *costs.head.values(), *costs.checks.values(), parts.generate]) > 0
    assert parts.shortlist == VOCAB // 8
    assert heard == sorted(heard)
    assert heard[-1] == 1.0
    assert 0 < costs.draft_cost(1) < costs.draft_cost(3)


def _rows(costs, agreement, leaving=0.0, shortlist=None, layers=(2, 4)):
    parts = PartTimes(costs, 16_000, shortlist or costs, generate=1.0)
    readings = [Reading(k, 1000, agreement, agreement, leaving, 0.9) for k in layers]
    return parts, outlook(parts, dict.fromkeys(("text", "greedy", "sampled"), readings))


def test_outlook_is_the_cost_models():
    costs = flat_costs(8, 0.5, 0.5)
    parts, rows = _rows(costs, 0.8, leaving=0.5)
    assert rows[0].greedy == rows[0].sampled == best_draft_length(costs, 2, 0.8)
    assert rows[1].threshold == threshold_speedup(costs, {4: 0.5})
    assert rows[0].cost == pytest.approx(2.5 / 8.5)
    assert outlook_table(rows, "").row_count == 2
    assert "final head 0.5 layers" in cost_lines(parts)[0]


def test_verdict_names_the_exit_that_wins():
    parts, rows = _rows(flat_costs(8, 0.5, 0.1), 0.9)
    said = verdict(rows, parts, untrained=False, repeated=0.1, bound=0.98)
    assert said[0].startswith("Worth it on this machine: lossless decoding reaches ")
    assert f"{rows[0].sampled[1]:.2f}x" in said[0]
    assert "from layer 2 " in said[0]
    assert len(said) == 1


def test_verdict_on_exits_that_read_nothing():
    parts, rows = _rows(flat_costs(8, 0.5, 0.1), 0.1)
    said = verdict(rows, parts, untrained=True, repeated=0.5, bound=0.98)
    assert said[0].startswith("Not worth it on this machine as it is: no exit makes lossless decoding faster")
    assert "lower bound" in said[1]
    assert f"{rows[0].needed:.0%} of its drafts" in said[2]
    assert "50% of the greedy text repeats itself" in said[3]


def test_verdict_on_heads_that_cost_too_much():
    costs, short = flat_costs(8, 9.0, 9.0), flat_costs(8, 9.0, 0.5)
    parts, rows = _rows(costs, 0.85, shortlist=short)
    said = " ".join(verdict(rows, parts, untrained=False, repeated=0.0, bound=0.98))
    assert "full head costs 9.0 layers" in said
    assert f"{best_draft_length(short, 2, 0.85)[1]:.2f}x" in said
    hopeless = flat_costs(8, 0.5, 7.0)
    parts, rows = _rows(hopeless, 0.3)
    assert "No acceptance would bring" in " ".join(verdict(rows, parts, untrained=True, repeated=0.0, bound=0.98))
