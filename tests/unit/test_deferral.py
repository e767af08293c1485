"""Deferral: the map, the figures and the limits, against brute force and on populations whose truth is known."""

import json
from dataclasses import replace
from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
from rich.console import Console

from ee_scale.config.defer import AGREEMENT, SEQUENCE_SCORES, DeferConfig
from ee_scale.errors import UserError
from ee_scale.evaluation.answering import Case, qualities, read_cases
from ee_scale.evaluation.deferral import (
    Deferral,
    Pairs,
    Point,
    check_size,
    find_groups,
    find_limit,
    limit_path,
    records_needed,
)
from ee_scale.evaluation.deferral_report import curve_table, group_table, statements
from ee_scale.evaluation.reliability import ErrorMap, auroc, calibration_error
from ee_scale.inference.deferral import DeferralRule, read_rule, score_of
from ee_scale.reading import write_json


def _best_steps(scores, wrong):
    """Least squares over all falling step functions of the distinct scores."""
    values = np.unique(scores)
    best, fitted = np.inf, None
    for count in range(len(values)):
        for cuts in combinations(range(1, len(values)), count):
            parts = np.split(values, cuts)
            means = [wrong[np.isin(scores, part)].mean() for part in parts]
            if all(a >= b for a, b in pairwise(means)):
                steps = np.concatenate([np.full(len(part), mean) for part, mean in zip(parts, means, strict=True)])
                error = ((steps[np.searchsorted(values, scores)] - wrong) ** 2).sum()
                if error < best - 1e-12:
                    best, fitted = error, steps
    return values, fitted


@pytest.mark.parametrize("seed", range(8))
def test_the_map_is_the_least_squares_one(seed):
    random = np.random.default_rng(seed)
    scores = random.integers(0, 9, 30) / 9  # with ties
    wrong = (random.random(30) > scores).astype(float)
    values, steps = _best_steps(scores, wrong)
    found = ErrorMap.fitted(scores, wrong)
    assert found(values) == pytest.approx(steps)
    assert (np.diff(found(np.linspace(-0.5, 1.5, 200))) <= 0).all()


def test_the_map_is_scikit_learns():
    """IsotonicRegression(increasing=False, out_of_bounds="clip") of scikit-learn 1.9.1 on the same points."""
    scores = np.array([0.05, 0.1, 0.2, 0.25, 0.4, 0.45, 0.6, 0.7, 0.8, 0.95])
    wrong = np.array([1.0, 1, 0, 1, 0, 1, 1, 0, 0, 0])
    given = np.array([0.0, 0.075, 0.15, 0.3, 0.5, 0.65, 0.75, 1.0])
    assert ErrorMap.fitted(scores, wrong)(given) == pytest.approx([1.0, 1.0, 0.8, 0.6, 0.6, 0.3, 0.0, 0.0])


def test_auroc_and_calibration_error_by_hand():
    scores, right = np.array([0.9, 0.8, 0.8, 0.3]), np.array([1.0, 1, 0, 0])
    # Of four pairs of a right and a wrong answer three are in order and one is tied.
    assert auroc(scores, right) == pytest.approx(3.5 / 4)
    assert auroc(scores, np.ones(4)) is None
    # Bins of 1/15: 0.9 | 0.8, 0.8 | 0.3.
    assert calibration_error(scores, right) == pytest.approx((0.1 + abs(1.6 - 1) + 0.3) / 4)
    assert calibration_error(np.array([1.0]), np.array([1.0])) == 0


def test_scores_by_hand():
    logits = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.8, 0.1]]).log()
    found = {name: score_of(name, logits) for name in SEQUENCE_SCORES if name != AGREEMENT}
    wanted = {"margin": (0.2 + 0.7) / 2, "min_margin": 0.2, "probability": (0.5 + 0.8) / 2, "min_probability": 0.5}
    assert found == pytest.approx(wanted)
    exits = [torch.tensor([[1.0, 0, 0], [1.0, 0, 0]]), torch.tensor([[0.0, 1, 0], [0.0, 1, 0]])]
    assert score_of(AGREEMENT, logits, exits) == pytest.approx(2 / 4)


# -- limits ------------------------------------------------------------------------------------------------------------

LOSS, CONFIDENCE = 0.1, 0.9


def population(size: int, seed: int, right_at: float = 0.5) -> Pairs:
    """The large model is right for nine of ten, the small one where its score says so, mostly."""
    random = np.random.default_rng(seed)
    scores = random.random(size)
    small = random.random(size) < right_at + (1 - right_at) * scores
    return Pairs(scores, small.astype(float), (random.random(size) < 0.9).astype(float), [None] * size)


def test_the_bound_holds_as_often_as_it_says():
    """Over many draws of records, limits whose true loss is above the bound are rarer than 1 - confidence."""
    truth = population(200_000, seed=10_000)
    true_loss = {}
    broken, named = 0, 0
    for seed in range(300):
        fit, test, _ = population(400, seed).parts(seed)
        limit, _ = find_limit(fit, test, LOSS, CONFIDENCE)
        if limit is not None:
            named += 1
            key = round(limit, 3)
            loss = true_loss.setdefault(key, truth.harm(limit).mean())
            broken += loss > LOSS
    assert named > 250  # it says something
    assert broken <= 300 * (1 - CONFIDENCE)
    # What keeps as much as the same records seem to allow breaks it far more often.
    plugged = 0
    for seed in range(100):
        _, test, _ = population(400, seed).parts(seed)
        best = min((limit for limit in limit_path(test.scores) if test.harm(limit).mean() <= LOSS), default=None)
        plugged += best is not None and truth.harm(best).mean() > LOSS
    assert plugged > 100 * 2 * (1 - CONFIDENCE)


def test_a_small_model_that_is_never_worse_is_never_left():
    pairs = population(400, seed=0)
    found = find_groups(replace(pairs, small=pairs.large), LOSS, CONFIDENCE, seed=0)[1]
    assert (found.limit, found.check.asked, found.check.loss) == (0.0, 0.0, 0.0)


def test_one_that_is_always_wrong_is_always_left():
    pairs = population(400, seed=0)
    found = find_groups(replace(pairs, small=0 * pairs.small), 0.005, 0.6, seed=0)[1]
    assert found.limit is None
    assert not found.verdict.holds
    assert (found.check.asked, found.check.loss, found.auroc) == (1.0, 0.0, None)


def test_tested_and_checking_records_choose_no_candidate():
    fit, test, check = population(400, seed=3).parts(0)
    limit, verdict = find_limit(fit, test, LOSS, CONFIDENCE)
    assert sorted(map(len, (fit.scores, test.scores, check.scores))) == [100, 100, 200]
    assert len(np.unique(np.concatenate([fit.scores, test.scores, check.scores]))) == 400
    assert limit in limit_path(fit.scores)
    assert verdict.risk == test.harm(limit).mean()
    assert verdict.p_value <= 1 - CONFIDENCE


def test_a_point_by_hand():
    pairs = Pairs(np.array([0.9, 0.8, 0.4, 0.1]), np.array([1.0, 0, 1, 0]), np.array([0.0, 1, 1, 1]), [None] * 4)
    point = Point.of(pairs, 0.5)  # keeps one that is better and one that is worse
    assert (point.asked, point.quality, point.loss, point.worse, point.better) == (0.5, 0.75, 0.0, 1, 1)
    assert point.loss_range[0] < 0 < point.loss_range[1]


def test_tags_have_limits_of_their_own_or_are_told():
    easy, hard = population(800, seed=1, right_at=0.95), population(800, seed=2, right_at=0.0)
    pairs = Pairs(
        *(np.concatenate([getattr(part, name) for part in (easy, hard)]) for name in ("scores", "small", "large")),
        ["easy"] * 790 + ["rare"] * 10 + ["hard"] * 800,
    )
    _, found, groups, _ = find_groups(pairs, LOSS, CONFIDENCE, seed=0)
    assert groups["easy"].limit < found.limit < groups["hard"].limit
    assert (groups["rare"].own, groups["rare"].limit, groups["rare"].verdict) == (False, found.limit, None)


def test_too_few_records_name_no_limit():
    needed = records_needed(0.02, 0.95)
    check_size(needed, 0.02, 0.95)
    with pytest.raises(UserError, match=rf"loss=0.02 at confidence=0.95 needs at least {needed} records.*no limit"):
        check_size(needed - 1, 0.02, 0.95)
    # The number is right: with it something can be shown of a small model that is never worse.
    zeros = Pairs(np.linspace(0, 1, needed), np.ones(needed), np.ones(needed), [None] * needed)
    fit, test, _ = zeros.parts(0)
    assert find_limit(fit, test, 0.02, 0.95)[0] == 0.0


# -- records and rules -------------------------------------------------------------------------------------------------


def _config(path, **settings):
    return DeferConfig(small="s", large="l", data=str(path), out="o", **settings)


def _written(tmp_path, *rows):
    path = tmp_path / "cases.jsonl"
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return path


def test_records_are_read(tmp_path):
    path = _written(tmp_path, {"prompt": "a?", "reference": ["b", 3], "task": 7}, {"prompt": "c", "reference": True})
    (first, second) = read_cases(_config(path))
    assert first == Case("a?", None, ("b", "3"), "", None)
    assert second.references == ("true",)
    path = _written(tmp_path, {"q": "a?", "text": "two", "api": "said", "task": 7})
    settings = {"prompt_key": "q", "tag_key": "task", "large_key": "api", "pair_key": "text", "quality": "agreement"}
    assert read_cases(_config(path, **settings)) == [Case("a?", "two", (), "said", "7")]


@pytest.mark.parametrize(
    ("row", "settings", "message"),
    [
        ({"text": "a"}, {}, "line 1: no field 'prompt' .fields: text.; set prompt_key"),
        ({"prompt": "a"}, {}, "line 1: no field 'reference' .fields: prompt.; set reference_key"),
        ({"prompt": 3, "reference": "b"}, {}, "field 'prompt' is not text but int"),
        ({"prompt": " ", "reference": "b"}, {}, "field 'prompt' is empty"),
        ({"prompt": "a", "reference": []}, {}, r"field 'reference'=\[\]: give text"),
        ({"prompt": "a", "reference": {"x": 1}}, {}, "field 'reference'={'x': 1}: give text"),
        ({"prompt": "a", "reference": ["b", None]}, {}, "give text that is not empty, or a list"),
        ({"prompt": "a", "reference": ""}, {}, "give text that is not empty"),
        ({"prompt": "a", "reference": "b", "tag": ["x"]}, {"tag_key": "tag"}, r"field 'tag'=\['x'\]: give text"),
        ({"prompt": "a", "reference": "b"}, {"large_key": "api"}, "no field 'api'.*set large_key"),
        ("[1]", {}, "line 1: not a JSON object but list"),
        ("{", {}, "line 1: not valid JSON"),
    ],
)
def test_bad_records_are_refused_by_line_and_field(tmp_path, row, settings, message):
    with pytest.raises(UserError, match=message):
        read_cases(_config(_written(tmp_path, row), **settings))


def test_what_is_no_file_of_records_is_refused(tmp_path):
    with pytest.raises(UserError, match="cannot read a folder"):
        read_cases(_config(tmp_path))
    with pytest.raises(UserError, match="no such file"):
        read_cases(_config(tmp_path / "none.jsonl"))
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(UserError, match="read as text"):
        read_cases(_config(tmp_path / "a.txt"))


def test_qualities():
    cases = [Case("", None, ("The Sea", "hill"), "", None)] * 3
    said = [" the  sea\n", "It is the sea.", "town"]
    assert qualities("exact", cases, said, [""] * 3).tolist() == [1, 0, 0]
    assert qualities("contains", cases, said, [""] * 3).tolist() == [1, 1, 0]
    assert qualities("agreement", cases, said, ["x", "it is THE sea.", "x"]).tolist() == [0, 1, 0]


RULE = DeferralRule(
    version=1,
    task="generate",
    score="margin",
    limit=0.5,
    tags={"sql": 0.25, "law": None},
    map_scores=[0.1, 0.9],
    map_errors=[0.6, 0.1],
    small="2:abc",
    quality="exact",
    loss=0.02,
    confidence=0.95,
    evidence={"tested": 500, "auroc": None},
)


def test_a_rule_decides_as_it_was_written(tmp_path):
    RULE.write(tmp_path / "deferral.json")
    rule = read_rule(tmp_path / "deferral.json")
    assert rule == RULE
    assert [rule.keeps(score) for score in (0.49, 0.5)] == [False, True]
    assert rule.keeps(0.3, "sql")
    assert not rule.keeps(1.0, "law")
    assert not rule.keeps(0.3, "a tag that nobody has seen")
    assert not replace(rule, limit=None).keeps(1.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "version=2, this ee-scale reads 1"),
        ({"score": "luck"}, "score='luck': not one of margin"),
        ({"limit": 1.5}, "limit=1.5"),
        ({"limit": "0.5"}, "limit='0.5'"),
        ({"tags": {"sql": -0.1}}, "tags.sql=-0.1"),
        ({"map_scores": []}, "0 map_scores and 2 map_errors"),
        ({"map_scores": [0.9, 0.1]}, "map_scores do not grow"),
        ({"map_errors": [0.1, 0.6]}, "map_errors do"),
        ({"command": "rm"}, "command"),
    ],
)
def test_other_rules_are_refused(tmp_path, changes, message):
    write_json(tmp_path / "deferral.json", {**RULE.__dict__, **changes})
    with pytest.raises(UserError, match=message):
        read_rule(tmp_path / "deferral.json")


def test_an_edited_rule_is_refused(tmp_path):
    path = tmp_path / "deferral.json"
    RULE.write(path)
    path.write_text(path.read_text().replace('"limit": 0.5', '"limit": 0.0'))
    with pytest.raises(UserError, match="edited or damaged"):
        read_rule(path)


# -- what is said ------------------------------------------------------------------------------------------------------


def _deferral(pairs, loss, confidence):
    error_map, found, groups, checked = find_groups(pairs, loss, confidence, seed=0)
    rule = replace(RULE, loss=loss, confidence=confidence, limit=found.limit)
    curve = [Point.of(checked, limit) for limit in (None, *limit_path(pairs.parts(0)[0].scores))]
    times = {"small_ms": 10.0, "large_ms": 60.0, "link_ms": 40.0, "cost": 0.5}
    return Deferral(rule, error_map, len(pairs.scores), found, groups, curve, checked, **times)


def test_a_promise_and_its_check():
    pairs = replace(population(1000, seed=1), tags=["often"] * 990 + ["rare"] * 10)
    deferral = _deferral(pairs, LOSS, CONFIDENCE)
    said = statements(deferral)
    assert said[0].startswith("Guaranteed with confidence 0.9 on records like these: deferred answering loses at most")
    assert said[1].startswith("Check on records that chose and tested nothing: loss")
    assert "within the bound" in said[1]
    assert any("used without a promise: 'rare' (" in line for line in said)
    assert deferral.latency(0.5) == 10 + 0.5 * 100
    for table in (curve_table(deferral), group_table(deferral)):
        assert Console(width=1000).measure(table).maximum <= 80


def test_a_check_that_breaks_the_bound_says_so():
    deferral = _deferral(population(1000, seed=1), LOSS, CONFIDENCE)
    worse = Point(0.5, 0.2, 0.5, 0.3, (0.25, 0.35), 75, 0)
    found = replace(deferral.found, check=worse)
    assert "ABOVE THE BOUND beyond chance" in statements(replace(deferral, found=found))[1]
    by_chance = replace(found, check=replace(worse, loss=0.11, loss_range=(0.06, 0.16)))
    assert "above the bound, as chance may have it" in statements(replace(deferral, found=by_chance))[1]


def test_no_promise_where_nothing_can_be_shown():
    pairs = population(400, seed=0)
    said = statements(_deferral(replace(pairs, small=0 * pairs.small), 0.005, 0.6))
    assert said[0].startswith("Nothing could be promised")
    assert "The large model is always asked" in said[0]
