"""Limits that follow: the bound holds on whatever stream, a change of task is followed, and exits come back."""

from math import inf

import numpy as np
import pytest

from ee_scale.modeling import following
from ee_scale.modeling.following import MOST_TAGS, FollowedLimits, check_following

AGREEMENT, LIMIT = 0.9, 0.6


def decode(follow, task, tokens, seed, share=1.0, late=0, tag="sql"):
    """A stream of tokens with one exit: (audited, wrong) of each, wrong ones of all tokens, and which left early.

    task: score -> chance that the exit says the full model's token. Audits come `late` tokens later. Where nothing
    helps the exit is always sure.
    """
    random, waiting = np.random.default_rng(seed), []
    weights, errors, wrong, early = (np.zeros(tokens) for _ in range(4))
    for i in range(tokens):
        if len(waiting) > late:
            follow.saw(tag, waiting.pop(0))
        score = 1.0 if task is hopeless else random.random()
        (limit,) = follow.limits("threshold", [LIMIT], tag)
        if score < limit:
            follow.saw_full(tag, share)
            weights[i] = share
            continue
        agrees = random.random() < task(score)
        early[i], wrong[i] = 1, not agrees
        if random.random() < share:
            waiting.append(agrees)
            weights[i], errors[i] = 1, not agrees
    return weights, errors, wrong, early


def good(score):
    return 0.98


def needs_more(score):
    return 0.98 if score > 0.9 else 0.5


def hopeless(score):
    return 0.2


def worst_window(weights, errors, size):
    """Smallest share that agrees in any stretch of audited tokens of this weight."""
    seen, wrong = np.concatenate([[0], weights.cumsum()]), np.concatenate([[0], errors.cumsum()])
    ends = np.searchsorted(seen, seen + size)
    starts = np.flatnonzero(ends < len(seen))
    ends = ends[starts]
    return 1 - ((wrong[ends] - wrong[starts]) / (seen[ends] - seen[starts])).max()


@pytest.mark.parametrize("tasks", [[hopeless], [good, hopeless, good, needs_more], [lambda score: 0.0]])
@pytest.mark.parametrize(("share", "late"), [(1.0, 0), (0.2, 8)])
def test_the_bound_holds_wherever_one_begins_to_count(tasks, share, late):
    follow = FollowedLimits(AGREEMENT, tell=lambda *_: None)
    size = follow.settles(late + 2)
    parts = [decode(follow, task, round(3 * size / share), seed, share, late) for seed, task in enumerate(tasks)]
    weights, errors, wrong, _ = (np.concatenate(values) for values in zip(*parts, strict=True))
    assert worst_window(weights, errors, size) >= AGREEMENT
    assert wrong.mean() <= 1.1 * (1 - AGREEMENT)  # of all tokens, audited or not


def test_limits_that_stay_break_it():
    """The streams above are hard enough to see the difference."""
    still = FollowedLimits(AGREEMENT, step=1e-9, tell=lambda *_: None)
    size = FollowedLimits(AGREEMENT).settles(2)
    for task in (hopeless, needs_more):
        assert worst_window(*decode(still, task, 3 * size, seed=0)[:2], size) < AGREEMENT


def test_a_change_of_task_is_followed_and_told():
    told = []
    follow = FollowedLimits(AGREEMENT, tell=lambda tag, known: told.append((tag, known.state)))
    size = follow.settles(2)
    _, _, wrong, early = decode(follow, good, 2 * size, seed=1)
    assert follow.tags["sql"].level < 0.25
    assert not told
    assert early.mean() > 0.35  # of the 0.4 that pass the limit as given
    assert wrong.mean() < 1 - AGREEMENT

    # A task that is as easy, but for scores above 0.9 alone: limits settle there, and exits are still taken.
    _, _, wrong, early = decode(follow, needs_more, 3 * size, seed=2)
    assert ("sql", "raised") in told
    assert wrong[:size].mean() <= 1 - AGREEMENT
    assert wrong[size:].mean() < 1 - AGREEMENT
    assert early[size:].mean() > 0.05

    # Nothing helps: hardly an exit is taken any more.
    told.clear()
    _, _, wrong, early = decode(follow, hopeless, 3 * size, seed=3)
    assert ("sql", "off") in told
    assert early[size:].mean() < 0.1  # as often as the bound allows, to see whether they help again
    assert wrong[size:].mean() < 1 - AGREEMENT
    # And back: exits are taken as before.
    told.clear()
    _, _, _, early = decode(follow, good, 3 * size, seed=4)
    assert told[-1] == ("sql", "usual")
    assert early[-size:].mean() > 0.35
    assert set(follow.tags) == {"sql"}


def test_a_level_beside_a_border_is_told_once():
    told = []
    follow = FollowedLimits(AGREEMENT, tell=lambda tag, known: told.append(known.state))
    for _ in range(22):
        follow.saw(None, agrees=False)
    for _ in range(40):
        follow.saw(None, agrees=True)
        follow.saw(None, agrees=False) if follow.tags[None].level < 0.98 else None
    assert told == ["raised", "off"]


def test_what_is_logged(monkeypatch):
    lines = []
    monkeypatch.setattr(following.logger, "warning", lines.append)
    follow = FollowedLimits(0.98)
    for _ in range(30):
        follow.saw("sql", agrees=False)
    assert lines[0].startswith("exit_follow: limits of tag 'sql' were raised: too many early tokens differ")
    assert "0 of 6 compared tokens agreed so far" in lines[0]
    assert "take no exit any more" in lines[1]
    assert len(lines) == 2


def test_limits_by_hand():
    follow = FollowedLimits(0.98)
    follow.tags[None] = following.Followed()
    given = [0.8, 0.0, inf]
    assert follow.limits("threshold", given, None) == tuple(given)
    follow.tags[None].level = 0.5
    assert follow.limits("threshold", given, None) == pytest.approx((0.9, 0.5, inf))
    assert follow.limits("margin", [0.2], None) == pytest.approx((0.6,))
    assert follow.limits("entropy", [2.0, -inf, inf], None) == (1.0, -inf, 8.0)
    follow.tags[None].level = 1.0
    assert follow.limits("threshold", given, None) == (inf,) * 3
    assert follow.limits("entropy", [2.0, -inf], None) == (-inf,) * 2
    assert follow.off(None)
    assert follow.limits("threshold", given, "another tag") == tuple(given)


def test_tags_without_end_share_a_level():
    follow = FollowedLimits(0.98)
    for number in range(2 * MOST_TAGS):
        follow.saw(f"tag {number}", agrees=False)
    assert len(follow.tags) <= MOST_TAGS + 1
    assert follow.tags[None].audited >= MOST_TAGS
    assert follow.tags["tag 0"].audited == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"agreement": 1.0}, "agreement=1.0: must be"), ({"step": 0}, "step=0: must be"), ({"agreement": "x"}, "'x'")],
)
def test_numbers_that_mean_nothing_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        FollowedLimits(**settings)


@pytest.mark.parametrize(
    ("follow", "policy", "share", "message"),
    [
        (0.98, "threshold", 0.1, "exit_follow=0.98: give a FollowedLimits"),
        (FollowedLimits(), "lossless", 0.1, "exit_policy=lossless has no limits that could follow"),
        (FollowedLimits(), "margin", 0.0, "give exit_audit"),
    ],
)
def test_what_cannot_follow_is_refused(follow, policy, share, message):
    with pytest.raises(ValueError, match=message):
        check_following(follow, policy, share)


def test_changes_tell_when_limits_have_to_be_asked_for_again():
    follow = FollowedLimits(0.98)
    follow.saw_full("sql", 0.05)
    assert follow.changes == 0  # lower than as they were given they never are
    follow.saw("sql", agrees=False)
    assert follow.changes == 1
    for _ in range(15):  # 0.05 * 0.01 * 0.05 each, from 0.0495
        follow.saw_full("sql", 0.05)
    assert follow.changes == 1
    for _ in range(10):
        follow.saw_full("sql", 0.05)
    assert follow.changes == 2  # below 0.049
    for _ in range(40):
        follow.saw_full("sql", 0.05)
    assert follow.changes == 3
