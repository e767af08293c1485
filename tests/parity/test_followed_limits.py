"""Followed limits in decoding: audits arrive, and each row's text is that of its limits alone."""

from typing import Any

import pytest
import torch
from helpers.decoding import LAYERS, Pair, limits_for, make_pair, prompts

from ee_scale.modeling.following import Followed, FollowedLimits
from ee_scale.modeling.row_queue import QueuedRow, RowQueue

EXITS, NEW = (1, 2, 4), 12


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Pair:
    """Exits with layers of their own, which have to catch up when they were not asked."""
    return make_pair(
        tmp_path_factory.mktemp("followed"), "llama", "layer", "tied", EXITS, dtype=torch.float64, calm=0.3
    )


def at_level(**levels: float) -> FollowedLimits:
    """Levels that stay, by tag."""
    follow = FollowedLimits(step=1e-12, tell=lambda *_: None)
    follow.tags |= {tag: Followed(level) for tag, level in levels.items()}
    return follow


def followed(pair: Pair, follow: FollowedLimits, limits: list[float], **options: Any) -> Any:
    return pair.generate(
        prompts(4),
        "threshold",
        exit_threshold=limits,
        max_new_tokens=NEW,
        exit_follow=follow,
        exit_audit=0.5,
        exit_tags=["usual", "raised", "off", "raised"],
        **options,
    )


@pytest.mark.parametrize("graphs", [False, True])
def test_rows_leave_by_the_level_of_their_tag(pair, graphs):
    limits = limits_for(pair, "threshold", (0.3, 0.4, 0.5))
    raised = [limit + 0.5 * (1 - limit) for limit in limits]
    wanted = pair.generate(
        prompts(4), "threshold", exit_threshold=[limits, raised, [2.0] * 3, raised], max_new_tokens=NEW
    )
    assert len(set(wanted.exit_layers[0].tolist())) > 1
    got = followed(pair, at_level(usual=0.0, raised=0.5, off=2.0), limits, exit_graphs=graphs)
    assert torch.equal(got.sequences, wanted.sequences)
    assert torch.equal(got.exit_layers, wanted.exit_layers)


def test_exits_that_are_off_are_not_asked(pair):
    limits = limits_for(pair, "threshold", (0.3, 0.4, 0.5))
    got = followed(pair, at_level(usual=2.0, raised=2.0, off=2.0), limits)
    assert torch.equal(got.sequences, pair.reference(prompts(4), max_new_tokens=NEW))
    assert set(got.exit_stats["exit_checks"].values()) == {0}


def test_audits_move_the_limits_while_a_text_is_decoded(pair):
    """Exits are always taken as given, and often wrong: after a few wrong ones none is, in later calls neither."""
    follow = FollowedLimits(0.98, step=0.3, tell=lambda *_: None)
    options = {"exit_threshold": 0.0, "exit_follow": follow, "exit_audit": 1.0, "exit_max_pending": 2}
    got = pair.generate(prompts(2), "threshold", max_new_tokens=40, eos_token_id=[], exit_tags=["a", "b"], **options)
    for row, tag in enumerate("ab"):
        layers, known = got.exit_layers[row].tolist(), follow.tags[tag]
        early = [i for i, layer in enumerate(layers) if layer < LAYERS]
        assert known.audited == len(early)
        assert known.audited - known.agreed >= 2  # of 0.3 each
        assert known.level > 0.5
        assert set(layers[early[-1] + 1 :]) == {LAYERS}
        assert early[-1] < 30
    assert got.exit_stats["audited"] == sum(known.audited for known in follow.tags.values())
    again = pair.generate(prompts(2), "threshold", max_new_tokens=8, exit_tags=["a", "b"], **options)
    assert set(again.exit_layers.flatten().tolist()) <= {LAYERS, 0}


def test_rows_of_a_queue(pair):
    limits, inputs = limits_for(pair, "threshold", (0.3, 0.4, 0.5)), prompts(4)
    rows = [
        QueuedRow(ids[mask.bool()].tolist(), {"max_new_tokens": 8, "do_sample": False}, tag=("usual", "off")[i % 2])
        for i, (ids, mask) in enumerate(zip(inputs["input_ids"], inputs["attention_mask"], strict=True))
    ]
    options = {"exit_policy": "threshold", "exit_threshold": limits, "exit_audit": 1.0}
    with RowQueue(pair.model, options | {"exit_follow": at_level(off=2.0)}, 2, 30) as queue:
        for row in rows:
            queue.add(row)
        while queue.busy:
            queue.step()
    for row in rows:
        own = limits if row.tag == "usual" else [2.0] * 3
        alone = pair.generate(
            {"input_ids": torch.tensor([row.prompt])}, "threshold", exit_threshold=own, max_new_tokens=8
        )
        assert row.tokens == alone.sequences[0, len(row.prompt) :].tolist()
        assert row.layers == alone.exit_layers[0].tolist()


def test_what_cannot_follow_is_refused_by_generate(pair):
    follow = FollowedLimits()
    with pytest.raises(ValueError, match="exit_policy=lossless has no limits"):
        pair.generate(prompts(1), "lossless", max_new_tokens=2, exit_follow=follow, exit_audit=0.1)
    with pytest.raises(ValueError, match="give exit_audit"):
        pair.generate(prompts(1), "threshold", exit_threshold=0.5, max_new_tokens=2, exit_follow=follow)
