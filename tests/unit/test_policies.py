"""What a person may ask of `exit_policy`, and what it decides."""

from math import inf, log, nan

import pytest
import torch

from ee_scale.modeling.policies import NEVER, Decisions, choose_layers, resolve_policy, score

EXITS = (2, 4, 6)
CALIBRATION = {
    "policy": "threshold",
    "thresholds": {"2": 0.9, "4": None, "6": 0.5},
    "shortlist": [7, 3, 9, 1],
    "tags": {"sql": {"thresholds": {"2": None, "4": 0.8, "6": 0.7}}},
}


def _resolve(name, **options):
    return resolve_policy(name, EXITS, **options)


def test_forms_of_a_threshold():
    for threshold in (
        0.7,
        [0.7, 0.7, 0.7],
        {2: 0.7, "4": 0.7, 6: 0.7},
        torch.tensor([0.7, 0.7, 0.7], dtype=torch.float64),
    ):
        policy = _resolve("threshold", threshold=threshold)
        assert policy.layers == EXITS
        assert policy.limits == ((0.7, 0.7, 0.7),)
    rows = _resolve("threshold", threshold=[[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]], batch_size=2)
    assert rows.limits == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


def test_exits_that_no_row_can_take_are_not_looked_at():
    assert _resolve("threshold", threshold={4: 0.5}).layers == (4,)
    assert _resolve("threshold", threshold=1.5).layers == ()
    assert _resolve("threshold", threshold=1.0).layers == EXITS
    assert _resolve("entropy", threshold=[-0.1, 0.0, 2.0]).layers == (4, 6)
    rows = _resolve("threshold", threshold=[[2.0, 0.5, 2.0], [2.0, 2.0, 0.5]], batch_size=2)
    assert rows.layers == (4, 6)
    assert rows.limits == ((0.5, 2.0), (2.0, 0.5))
    assert _resolve("threshold", threshold=[0.1, 0.2, 0.3], min_layer=4).limits == ((0.2, 0.3),)
    assert _resolve("off").layers == _resolve(None).layers == ()


def test_calibrated_limits():
    policy = _resolve("threshold", calibration=CALIBRATION)
    assert policy.layers == (2, 6)
    assert policy.limits == ((0.9, 0.5),)
    tagged = _resolve("threshold", calibration=CALIBRATION, tags=["sql", "prose"], batch_size=2)
    assert tagged.layers == EXITS
    assert tagged.limits == ((inf, 0.8, 0.7), (0.9, inf, 0.5))
    assert _resolve("threshold", calibration=CALIBRATION, threshold=0.3).limits == ((0.3, 0.3, 0.3),)
    assert _resolve("lossless", calibration=CALIBRATION, shortlist=2).shortlist == (7, 3)
    assert _resolve("lossless", shortlist=[5, 6], vocab_size=8).shortlist == (5, 6)


def test_shortlist_heads_draft_among_their_own_tokens():
    heads = {"head_tokens": (4, 9, 1), "calibration": CALIBRATION}
    assert _resolve("lossless", **heads).shortlist == (4, 9, 1)
    assert _resolve("lossless", shortlist=2, **heads).shortlist == (4, 9)
    assert _resolve("lossless", shortlist=[1, 4], **heads).shortlist == (1, 4)
    assert _resolve("threshold", **heads).shortlist is None


def test_fixed_and_lossless_layers():
    assert _resolve("fixed", layer=4).layers == (4,)
    assert _resolve("lossless", layer=4).layers == (4,)
    assert _resolve("lossless").layers == EXITS
    assert _resolve("lossless", min_layer=4).layers == (4, 6)


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("speed", {}, "exit_policy='speed'.*lossless"),
        ("threshold", {}, "exit_threshold.*calibrate"),
        ("margin", {"calibration": CALIBRATION}, "exit_threshold.*calibrated for 'threshold'"),
        ("threshold", {"threshold": [0.1, 0.2]}, "exit_threshold=.*2 limits for 3 exits.*2, 4, 6"),
        ("threshold", {"threshold": []}, "exit_threshold=.*0 limits for 3 exits"),
        ("threshold", {"threshold": nan}, "exit_threshold=.*nan"),
        ("threshold", {"threshold": [0.1, nan, 0.2]}, "exit_threshold=.*nan"),
        ("threshold", {"threshold": [0.1, None, 0.2]}, "exit_threshold=.*None"),
        ("threshold", {"threshold": True}, "exit_threshold=.*True"),
        ("threshold", {"threshold": "0.5"}, "exit_threshold=.*'0.5'"),
        ("threshold", {"threshold": {3: 0.5}}, "exit_threshold.*layer 3.*2, 4, 6"),
        ("threshold", {"threshold": [[0.1, 0.2, 0.3]], "batch_size": 2}, "exit_threshold.*1 rows .* 2 rows"),
        ("patience", {"threshold": 0.5}, "exit_threshold=0.5.*patience"),
        ("lossless", {"threshold": 0.5}, "exit_threshold=0.5.*lossless"),
        ("fixed", {}, "exit_layer.*2, 4, 6"),
        ("fixed", {"layer": 3}, "exit_layer=3.*2, 4, 6"),
        ("fixed", {"layer": True}, "exit_layer=True"),
        ("lossless", {"layer": 8}, "exit_layer=8.*2, 4, 6"),
        ("threshold", {"threshold": 0.5, "layer": 2}, "exit_layer=2.*fixed and lossless"),
        ("patience", {"patience": 0}, "exit_patience=0"),
        ("patience", {"patience": 1.5}, "exit_patience=1.5"),
        ("fixed", {"layer": 2, "max_pending": -1}, "exit_max_pending=-1"),
        ("lossless", {"draft_length": -1}, "exit_draft_length=-1"),
        ("lossless", {"draft_sources": "text"}, "exit_draft_sources='text': give exits or prompt"),
        ("lossless", {"draft_sources": []}, r"exit_draft_sources=\[\]"),
        ("lossless", {"draft_sources": 3}, "exit_draft_sources=3"),
        ("lossless", {"draft_sources": "prompt", "layer": 4}, "exit_layer=4.*drafts from no exit"),
        ("threshold", {"threshold": 0.5, "draft_sources": "prompt"}, "exit_draft_sources.*lossless"),
        ("lossless", {"draft_length": True}, "exit_draft_length=True"),
        ("threshold", {"threshold": 0.5, "draft_length": 2}, "exit_draft_length=2.*lossless"),
        ("threshold", {"threshold": 0.5, "min_layer": "4"}, "exit_min_layer='4'"),
        ("lossless", {"shortlist": 100}, "exit_shortlist=100.*calibrate"),
        ("lossless", {"shortlist": 0, "calibration": CALIBRATION}, "exit_shortlist=0"),
        ("lossless", {"shortlist": []}, "exit_shortlist.*empty"),
        ("lossless", {"shortlist": [1, 1]}, "exit_shortlist.*repeated"),
        ("lossless", {"shortlist": [1, 8], "vocab_size": 8}, r"exit_shortlist.*8 is not in 0\.\.7"),
        ("fixed", {"layer": 2, "shortlist": [1]}, "exit_shortlist.*lossless"),
        ("lossless", {"shortlist": [1, 3], "head_tokens": (4, 1)}, "exit_shortlist: token 3 is not among the 2"),
    ],
)
def test_bad_requests_name_the_option(name, options, says):
    with pytest.raises(ValueError, match=says) as caught:
        _resolve(name, **options)
    assert "\n" not in str(caught.value)


def test_scores():
    p = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]])
    logits = p.log() + 3  # a shift says nothing
    for name, want in (
        ("threshold", [0.5, 0.8]),
        ("margin", [0.25, 0.7]),
        ("entropy", [0.5 * log(2) + 0.5 * log(4), -0.2 * log(0.1) - 0.8 * log(0.8)]),
    ):
        scores, tokens = score(name, logits)
        assert scores.tolist() == pytest.approx(want, abs=1e-6)
        assert tokens.tolist() == [0, 2]
    assert score("threshold", logits.bfloat16())[0].dtype == torch.float32


@pytest.mark.parametrize("name", ["threshold", "margin", "entropy"])
def test_never_is_never(name):
    certain = torch.tensor([[100.0, 0.0, 0.0]])
    policy = _resolve(name, threshold=[0.5, NEVER[name], 0.5])
    assert policy.layers == (2, 6)
    rows = _resolve(name, threshold=[[NEVER[name]] * 3, [0.5, 0.5, 0.5]], batch_size=2)
    leave, _, _ = Decisions(rows, 2).ask(2, certain.expand(2, -1))
    assert leave.tolist() == [False, True]


def _says(*tokens: int) -> torch.Tensor:
    return torch.eye(5)[list(tokens)] * 4


def test_patience_counts_exits_in_a_row():
    decisions = Decisions(_resolve("patience", patience=2), 3)
    assert decisions.ask(2, _says(1, 2, 3))[0].tolist() == [False, False, False]
    assert decisions.ask(4, _says(1, 4, 3))[0].tolist() == [True, False, True]
    # Only row 1 goes on; row 2 of the batch stays where it is.
    assert decisions.ask(6, _says(4), torch.tensor([1]))[0].tolist() == [True]
    decisions.start()  # the next token: what exits said before does not count
    assert decisions.ask(2, _says(1, 4, 3))[0].tolist() == [False, False, False]
    three = Decisions(_resolve("patience", patience=3), 1)
    assert [three.ask(k, _says(token))[0].item() for k, token in ((2, 1), (4, 1), (6, 1))] == [False, False, True]


def test_rows_have_their_own_limits():
    policy = _resolve("threshold", threshold=[[0.9] * 3, [0.3] * 3, [0.5] * 3], batch_size=3)
    decisions = Decisions(policy, 3)
    logits = torch.tensor([[0.6, 0.2, 0.2]]).log()
    assert decisions.ask(4, logits.expand(3, -1))[0].tolist() == [False, True, True]
    assert decisions.ask(4, logits.expand(2, -1), torch.tensor([2, 0]))[0].tolist() == [True, False]


def test_choose_layers_takes_the_first():
    sure, unsure = torch.tensor([[5.0, 0.0]]), torch.tensor([[0.1, 0.0]])
    logits = {
        2: torch.cat([sure, unsure, unsure, unsure]),
        4: torch.cat([unsure, sure, unsure, sure]),
        6: torch.cat([sure, sure, unsure, sure]),
    }
    policy = _resolve("threshold", threshold=0.9)
    assert choose_layers(policy, logits, 8).tolist() == [2, 4, 8, 4]
    assert choose_layers(_resolve("fixed", layer=4), logits, 8).tolist() == [4] * 4
    assert choose_layers(_resolve("threshold", threshold={6: 0.9}), logits, 8).tolist() == [6, 6, 8, 6]


def test_a_limit_is_reached_by_equality():
    logits = torch.tensor([[0.0, 0.0]])
    assert Decisions(_resolve("threshold", threshold=0.5), 1).ask(2, logits)[0].item()
    assert Decisions(_resolve("margin", threshold=0.0), 1).ask(2, logits)[0].item()
    assert not Decisions(_resolve("threshold", threshold=0.51), 1).ask(2, logits)[0].item()
