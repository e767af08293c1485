"""Calibrated limits hold their bound as often as they say; the simulation decides as decoding does."""

import json
from math import inf

import numpy as np
import pytest
import torch
from helpers.models import VOCAB, write_model
from transformers import AutoModelForCausalLM

from ee_scale.artifact.hf_folder import write_calibration
from ee_scale.backbone.model_folder import ModelFolder
from ee_scale.errors import UserError
from ee_scale.evaluation.calibration import (
    LEARN_SHARE,
    Goal,
    betting_p_value,
    calibrate,
    calibrated_layers,
    limit_policy,
    shortlist,
    threshold_path,
)
from ee_scale.evaluation.records import Records, Window, batched, collect, outcome, simulate
from ee_scale.evaluation.tags import document_windows, tagged_windows
from ee_scale.exits.placement import exit_spec
from ee_scale.inference.model import untrained_exits
from ee_scale.modeling.policies import NEVER, choose_layers, resolve_policy

LAYERS, NUM_LAYERS = (2, 4), 6
WINDOW = 16
POOL = 4000


def population(spread: float, seed: int = 0, *, ragged: bool = False) -> Records:
    """Windows of two exits whose scores are calibrated, except that whole windows are harder or easier by `spread`.

    The whole model always says token 0, and an exit says it with the probability of its score, minus the window's own
    difficulty: tokens of one window go wrong together.
    """
    random = np.random.default_rng(seed)
    sizes = random.integers(1, WINDOW + 1, POOL) if ragged else np.full(POOL, WINDOW)
    units = np.repeat(np.arange(POOL), sizes)
    difficulty = spread * (random.random(POOL) < 0.04)[units]
    scores = random.beta(*np.array([[2.0, 1.0], [3.0, 1.0]]).T[:, :, None], size=(2, len(units)))
    wrong = random.random(scores.shape) >= scores**0.5 * (1 - difficulty)
    losses = np.where(wrong, 1.0 + random.random(scores.shape), 1.0)
    zeros = torch.zeros(len(units))
    return Records(
        LAYERS,
        NUM_LAYERS,
        {"threshold": torch.tensor(scores).float(), "entropy": torch.tensor(1 - scores).float()},
        torch.tensor(wrong).int(),
        torch.tensor(losses).float(),
        zeros.int(),
        zeros + 1,
        torch.tensor(units),
        (None,) * POOL,
    )


def resampled(pool: Records, num_units: int, random: np.random.Generator) -> Records:
    """Independent draws of units from a pool (with replacement; the same unit twice is two units)."""
    starts = np.concatenate([[0], np.bincount(pool.units).cumsum()])
    drawn = random.integers(0, len(pool.tags), num_units)
    index = torch.from_numpy(np.concatenate([np.arange(starts[i], starts[i + 1]) for i in drawn]))
    units = torch.from_numpy(np.repeat(np.arange(num_units), (starts[1:] - starts[:-1])[drawn]))
    return Records(
        pool.layers,
        pool.num_layers,
        {name: values[:, index] for name, values in pool.scores.items()},
        pool.tokens[:, index],
        pool.losses[:, index],
        pool.final_tokens[index],
        pool.final_losses[index],
        units,
        (None,) * num_units,
    )


def true_risk(pool: Records, goal: Goal, limits) -> float:
    """The mean harm of the population's tokens."""
    result = outcome(pool, simulate(pool, limit_policy(pool, goal.policy, limits)))
    return float(goal.harm(result, pool.final_losses).mean())


def violations(pool: Records, goal: Goal, choose, *, num_units: int, times: int) -> tuple[float, float]:
    """(share of resamplings whose limits break the bound on the population, share that may leave somewhere)."""
    broken = certified = 0
    for seed in range(times):
        limits = choose(resampled(pool, num_units, np.random.default_rng([1, seed])), goal, seed)
        certified += any(limit is not None for limit in limits)
        broken += true_risk(pool, goal, limits) > goal.bound
    return broken / times, certified / times


def learned(records: Records, goal: Goal, seed: int):
    return calibrate(records, goal, seed).limits


def plugged_in(records: Records, goal: Goal, seed: int):
    """What most people do: the last candidate whose mean risk on the same text is within the bound."""
    within = [limits for limits in threshold_path(records, goal) if true_risk(records, goal, limits) <= goal.bound]
    return within[-1]


CASES = {
    "agreement": (0.0, Goal("threshold", agreement=0.9, confidence=0.9, unit_tokens=WINDOW)),
    "hard windows": (0.9, Goal("threshold", agreement=0.9, confidence=0.9, unit_tokens=WINDOW)),
    "loss": (0.9, Goal("threshold", loss_increase=0.15, confidence=0.9, unit_tokens=WINDOW)),
    "entropy": (0.5, Goal("entropy", agreement=0.9, confidence=0.9, unit_tokens=WINDOW)),
}


@pytest.mark.parametrize("case", CASES)
def test_the_bound_holds_at_least_at_the_stated_confidence(case):
    spread, goal = CASES[case]
    broken, certified = violations(population(spread), goal, learned, num_units=150, times=100)
    # 1 - confidence = 0.1; three standard deviations of a share of 100 are 0.09.
    assert broken <= 0.1 + 0.09
    assert certified >= 0.9  # the promise is not kept by promising nothing


def test_tokens_weigh_the_same_in_windows_of_any_length():
    goal = Goal("threshold", agreement=0.9, confidence=0.9, unit_tokens=WINDOW)
    broken, certified = violations(population(0.9, ragged=True), goal, learned, num_units=250, times=100)
    assert broken <= 0.1 + 0.09
    assert certified >= 0.9


def test_the_plug_in_limits_would_break_it():
    spread, goal = CASES["hard windows"]
    broken, _ = violations(population(spread), goal, plugged_in, num_units=150, times=100)
    assert broken > 0.25  # 0.1 is what was asked for


def test_p_values_are_uniform_or_larger_at_the_edge_of_the_null_hypothesis():
    """Risks that are exactly at the bound on average, of every shape: rejected at 0.05 in at most 5% of the samples."""
    random, bound, times, n = np.random.default_rng(0), 0.1, 2000, 200
    shapes = {
        "rare and total": lambda: (random.random(n) < bound).astype(float),
        "constant but for one": lambda: np.where(random.random(n) < 0.01, 1.0, (bound - 0.01) / 0.99),
        "smooth": lambda: random.beta(1, 9, n),
        "below zero": lambda: np.where(random.random(n) < 0.5, 2 * bound + 0.5, -0.5),
    }
    for name, draw in shapes.items():
        rejected = np.mean([betting_p_value(draw(), bound, draw()[:30]) <= 0.05 for _ in range(times)])
        assert rejected <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / times), name
    # And it is not idle: half of the allowed risk is shown with these numbers.
    powers = [betting_p_value(random.beta(1, 19, n), bound, random.beta(1, 19, 30)) <= 0.05 for _ in range(200)]
    assert np.mean(powers) > 0.9


def test_tested_units_never_choose_the_candidates():
    """Poison in the testing part alone must not change the path: only the test may see it."""
    pool, goal = population(0.0), CASES["agreement"][1]
    records = resampled(pool, 200, np.random.default_rng(3))
    order = np.random.default_rng(7).permutation(200)
    tested = torch.from_numpy(order[round(LEARN_SHARE * 200) :])
    poisoned = torch.where(torch.isin(records.units, tested), 1, records.tokens).int()
    found = calibrate(Records(**{**vars(records), "tokens": poisoned}), goal, seed=7)
    assert calibrate(records, goal, seed=7).certified
    assert not found.certified
    assert found.limits == (None, None)
    assert found.mean_depth == NUM_LAYERS
    assert found.match_rate == 1.0
    assert found.risk > goal.bound
    assert found.p_value > 0.1


def test_an_exit_that_is_never_right_is_never_taken_and_the_other_still_is():
    pool, goal = population(0.0), CASES["agreement"][1]
    tokens = pool.tokens.clone()
    tokens[0] = 1
    found = calibrate(Records(**{**vars(pool), "tokens": tokens}), goal)
    assert found.limits[0] is None
    assert found.limits[1] is not None
    assert found.shares[0] == 0
    assert found.agreements[0] is None
    assert found.agreements[1] > 0.85


def test_evidence_is_that_of_the_testing_part():
    records, goal = resampled(population(0.3), 300, np.random.default_rng(0)), CASES["agreement"][1]
    found = calibrate(records, goal, seed=5)
    tested = records.take(torch.from_numpy(np.random.default_rng(5).permutation(300)[75:]))
    result = outcome(tested, simulate(tested, limit_policy(tested, "threshold", found.limits)))
    assert (found.units, found.tested_units, found.tokens) == (300, 225, 300 * WINDOW)
    assert found.match_rate == pytest.approx(float(result.match.float().mean()), abs=1e-6)
    assert found.risk == pytest.approx(1 - found.match_rate, abs=1e-6)
    assert found.mean_depth == pytest.approx(float(result.layers.float().mean()), abs=1e-5)
    assert found.p_value <= 0.1
    assert sum(found.shares) == pytest.approx(float((result.layers < NUM_LAYERS).float().mean()))


def test_each_tag_under_its_own_limits():
    records = resampled(population(0.0), 4, np.random.default_rng(0))
    records = Records(**{**vars(records), "tags": ("a", "b", None, "c")})
    tables = {None: (0.5, 0.5), "a": (None, None), "b": (0.0, None)}
    layers = calibrated_layers(records, "threshold", tables)
    assert set(layers[records.units == 0].tolist()) == {NUM_LAYERS}
    assert set(layers[records.units == 1].tolist()) == {LAYERS[0]}
    overall = simulate(records, limit_policy(records, "threshold", tables[None]))
    assert torch.equal(layers[records.units >= 2], overall[records.units >= 2])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"agreement": 1.2}, "agreement=1.2: must be above 0 and below 1"),
        ({"agreement": 0.98, "confidence": 0.0}, "confidence=0.0: must be above 0 and below 1"),
        ({"agreement": 0.98, "confidence": 1.0}, "confidence=1.0"),
        ({"agreement": float("nan")}, "agreement=nan"),
        ({"loss_increase": 2.0}, "loss_increase=2.0: must be above 0 and below 1 nats per token"),
        ({"agreement": 0.9, "loss_increase": 0.1}, "agreement=0.9 and loss_increase=0.1: give exactly one"),
        ({}, "agreement=None and loss_increase=None: give exactly one"),
        ({"agreement": 0.9, "policy": "patience"}, "policy=patience: choose one of threshold, entropy, margin"),
    ],
)
def test_a_goal_that_says_nothing_is_refused(settings, message):
    with pytest.raises(UserError, match=message):
        Goal(**settings)


@pytest.mark.parametrize("unit_tokens", [WINDOW, 0])
def test_too_little_text_is_refused_with_the_number_that_is_needed(unit_tokens):
    goal = Goal("threshold", agreement=0.98, confidence=0.95, unit_tokens=unit_tokens)
    with pytest.raises(UserError, match=r"agreement=0.98 at confidence=0.95 needs at least") as refused:
        goal.check_size(np.full(100, WINDOW))
    needed = int(str(refused.value).partition("needs at least ")[2].split()[0])
    assert 150 / (1 - LEARN_SHARE) < needed < 240  # ln(20) / -ln(0.98) = 148 units are needed by any method
    goal.check_size(np.full(needed, WINDOW))
    with pytest.raises(UserError):
        goal.check_size(np.full(needed - 8, WINDOW))


def test_shortlist_is_ordered_by_frequency():
    records = resampled(population(0.0), 1, np.random.default_rng(0))
    tokens = torch.tensor([5, 3, 3, 9, 9, 9, 2, 5] * 2).int()
    assert shortlist(Records(**{**vars(records), "final_tokens": tokens})) == [9, 3, 5, 2]


@pytest.fixture(scope="module", params=["llama-mlp", "gemma2-mlp", "llama-layer"])
def measured(request, tmp_path_factory):
    """A tiny model with exits, windows of different lengths, their records, and the model's own logits."""
    family, kind = request.param.split("-")
    folder = write_model(tmp_path_factory.mktemp("model"), family)
    config = AutoModelForCausalLM.from_pretrained(folder).config
    model = untrained_exits(folder, exit_spec(config, [1, 3, 4], kind, "tied", 1)).eval()
    torch.manual_seed(1)
    windows = [Window(torch.randint(VOCAB, (n,)), unit) for unit, n in enumerate((9, 24, 2, 17, 24, 5))]
    records = collect(model, batched(windows, 4))
    ordered = [window for batch in batched(windows, 4) for window in batch]
    logits = {k: [] for k in (1, 3, 4, 5)}
    labels = torch.cat([window.tokens[1:] for window in ordered])
    with torch.no_grad():
        for window in ordered:
            output = model(window.tokens[None, :-1], use_cache=False)
            for k, value in {**output.exit_logits, 5: output.logits}.items():
                logits[k].append(value[0].float())
    return records, {k: torch.cat(values) for k, values in logits.items()}, labels


def test_records_are_the_models_own_figures(measured):
    records, logits, labels = measured
    assert records.units.tolist() == [unit for unit, n in enumerate((23, 23, 16, 8, 4, 1)) for _ in range(n)]
    for i, k in enumerate(records.layers):
        losses = torch.nn.functional.cross_entropy(logits[k], labels, reduction="none")
        assert torch.allclose(records.losses[i], losses, atol=1e-4)
        assert torch.equal(records.tokens[i].long(), logits[k].argmax(-1))
    assert torch.equal(records.final_tokens.long(), logits[5].argmax(-1))
    losses = torch.nn.functional.cross_entropy(logits[5], labels, reduction="none")
    assert torch.allclose(records.final_losses, losses, atol=1e-4)


@pytest.mark.parametrize("name", ["threshold", "entropy", "margin", "patience", "fixed"])
def test_the_simulation_decides_as_decoding_does(measured, name):
    records, logits, _ = measured
    settings = [{}]
    if name in NEVER:
        ordered = records.scores[name].sort(-1).values
        # Limits half-way between two scores: rounding of the two passes cannot matter.
        middle = (ordered[:, 30:-1:7] + ordered[:, 31::7]) / 2
        settings = [{"threshold": row} for row in middle.T.tolist()] + [{"threshold": {1: inf, 3: 0.5}}]
    if name == "fixed":
        settings = [{"layer": k} for k in records.layers]
    found = set()
    for values in settings:
        policy = resolve_policy(name, records.layers, **values)
        expected = choose_layers(policy, logits, records.num_layers)
        assert torch.equal(simulate(records, policy), expected)
        found |= set(expected.tolist())
    assert len(found) > 1


def test_stored_limits_leave_the_rest_of_the_file_alone(tmp_path):
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": 7, "temperature": 0.5}))
    assert ModelFolder(tmp_path).calibration() is None
    values = {"policy": "threshold", "thresholds": {"2": 0.5, "4": None}}
    write_calibration(tmp_path, {"old": 1})
    write_calibration(tmp_path, values)
    assert json.loads(path.read_text()) == {"eos_token_id": 7, "temperature": 0.5, "early_exit_calibration": values}
    assert ModelFolder(tmp_path).calibration() == values
    assert [file.name for file in tmp_path.iterdir()] == ["generation_config.json"]
    path.write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        write_calibration(tmp_path, values)


@pytest.mark.parametrize("there", [True, False])
def test_transformers_reads_it_back_and_keeps_its_end_token(tmp_path, there):
    folder = write_model(tmp_path / "model", "llama")
    if not there:
        (folder / "generation_config.json").unlink()
    before = AutoModelForCausalLM.from_pretrained(folder).generation_config
    write_calibration(folder, {"policy": "threshold"})
    after = AutoModelForCausalLM.from_pretrained(folder).generation_config
    assert after.early_exit_calibration == {"policy": "threshold"}
    assert after.eos_token_id == before.eos_token_id == 1
    assert after.pad_token_id == before.pad_token_id == 2


class Letters:
    """A tokenizer of letters, for files of a few tokens."""

    eos_token_id = 0

    def __call__(self, text, **_):
        return type("Encoded", (), {"input_ids": [ord(letter) - 96 for letter in text]})


def write_lines(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return [str(path)]


def test_tagged_documents_become_windows_of_their_own(tmp_path):
    rows = [{"text": "abcde", "task": "x"}, {"text": "fg", "task": "y"}, {"text": " ", "task": "z"}]
    windows = tagged_windows(write_lines(tmp_path / "a.jsonl", rows), Letters(), "text", "task", 3)
    found = {(window.tag, tuple(window.tokens.tolist())) for window in windows}
    assert found == {("x", (1, 2, 3, 4)), ("x", (4, 5, 0)), ("y", (6, 7, 0))}
    assert sorted(window.unit for window in windows) == [0, 1, 2]
    windows = tagged_windows([str(tmp_path / "a.jsonl")], Letters(), "text", "task", 3, unit="document")
    assert {window.tag: window.unit for window in windows if window.tag == "x"}["x"] in (0, 1)
    assert len({(window.tag, window.unit) for window in windows}) == 2
    windows = tagged_windows([str(tmp_path / "a.jsonl")], Letters(), "text", "task", 3, max_tokens=1)
    assert len(windows) == 1


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        ("a.jsonl", [{"text": "a", "tsk": "x"}], r"line 1: no field 'task' \(fields: text, tsk\); set tag_key"),
        ("a.jsonl", [{"text": "ab", "task": [3]}], "line 1: field 'task' is not text but list"),
        ("a.txt", [], "tag_key=task: data='.*a.txt' is read as text; tags are fields of records"),
        ("a.jsonl", [{"text": " ", "task": "x"}], "data: no document has the 2 tokens that a prediction needs"),
    ],
)
def test_data_without_tags_is_refused(tmp_path, name, rows, message):
    with pytest.raises(UserError, match=message):
        tagged_windows(write_lines(tmp_path / name, rows), Letters(), "text", "task", 3)


def test_a_tag_that_is_a_number_is_its_text(tmp_path):
    tags = ["7", '"7"', "7.10", '"7.10"', "true", "1e5"]
    (tmp_path / "a.jsonl").write_text("\n".join(f'{{"text": "abcde", "task": {tag}}}' for tag in tags))
    windows = tagged_windows([str(tmp_path / "a.jsonl")], Letters(), "text", "task", 9)
    assert sorted(window.tag for window in windows) == ["1e5", "7", "7", "7.10", "7.10", "true"]


def test_windows_end_where_documents_do(tmp_path):
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(tmp_path / "tokens.bin"), dtype=np.int32)
    builder.add_document(torch.tensor([1, 2, 3, 4, 0, 5, 6, 0]), [8])
    builder.finalize(str(tmp_path / "tokens.idx"))
    windows = document_windows([str(tmp_path / "tokens")], 0, 2)
    assert sorted(window.tokens.tolist() for window in windows) == [[1, 2, 3], [3, 4, 0], [5, 6, 0]]
