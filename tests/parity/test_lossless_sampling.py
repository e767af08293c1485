"""Sampling with drafts has the full model's distribution: the joint law of three tokens, counted."""

from itertools import product
from math import sqrt
from typing import Any

import pytest
import torch
from helpers.decoding import Pair, make_pair

from ee_scale.modeling.speculate import accept_sampled

VOCAB = 7
TEXTS = 20_000
PROMPT = [3, 1, 4]


SIZES = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 4}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 1, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Pair:
    return make_pair(tmp_path_factory.mktemp("sampling"), "llama", exits=(1, 3), calm=0.3, **SIZES)


@pytest.fixture(scope="module")
def short_pair(tmp_path_factory) -> Pair:
    """Exits that score three of the seven tokens."""
    return make_pair(tmp_path_factory.mktemp("short"), "llama", head="shortlist", exits=(1, 3), calm=0.3, **SIZES)


@torch.no_grad()
def joint_law(base: Any, length: int, temperature: float, top_p: float) -> torch.Tensor:
    """Probability of every text of `length` new tokens, [V, ..., V]; the processors worked out by hand."""
    law = torch.ones(1, dtype=torch.float64)
    for count in range(length):
        texts = torch.tensor([[*PROMPT, *tail] for tail in product(range(VOCAB), repeat=count)])
        p = (base(texts, use_cache=False).logits[:, -1].double() / temperature).softmax(-1)
        if top_p < 1:
            best, order = p.sort(-1, descending=True)
            before = best.cumsum(-1) - best
            best = torch.where(before < top_p, best, 0.0)
            p = torch.zeros_like(p).scatter(-1, order, best)
            p = p / p.sum(-1, keepdim=True)
        law = (law[:, None] * p).flatten()
    return law.view([VOCAB] * length)


def surprise(counts: torch.Tensor, expected: torch.Tensor) -> float:
    """z of Pearson's chi-square; cells with fewer than 5 expected are put together."""
    assert counts[expected == 0].sum() == 0, "a token that cannot be"
    rare = expected < 5
    cells = torch.cat([expected[~rare], expected[rare].sum()[None]])
    found = torch.cat([counts[~rare], counts[rare].sum()[None]])
    found, cells = found[cells > 0], cells[cells > 0]
    degrees = len(cells) - 1
    return float((((found - cells) ** 2 / cells).sum() - degrees) / sqrt(2 * degrees))


def sample(model: Any, seed: int, texts: int = TEXTS, **options: Any) -> Any:
    torch.manual_seed(seed)
    return model.generate(
        torch.tensor([PROMPT]),
        attention_mask=torch.ones(1, len(PROMPT), dtype=torch.long),
        max_new_tokens=5,
        do_sample=True,
        top_k=0,
        num_return_sequences=texts,
        return_dict_in_generate=True,
        use_cache="exit_policy" not in options,  # nobody wants it; our loops keep their own
        **options,
    )


def counted(sequences: torch.Tensor, first: int) -> torch.Tensor:
    """How often each three tokens come up from new token `first` on, [V, V, V]."""
    start = len(PROMPT) + first
    a, b, c = sequences[:, start : start + 3].T
    return torch.bincount((a * VOCAB + b) * VOCAB + c, minlength=VOCAB**3).view(VOCAB, VOCAB, VOCAB).double()


CASES = {
    "one draft of a shallow exit": ({"exit_layer": 1, "exit_draft_length": 1}, 1.0, 1.0),
    "three drafts of a deep exit": ({"exit_layer": 3, "exit_draft_length": 3}, 1.0, 1.0),
    "any drafts": ({}, 1.0, 1.0),
    "drafts from the text": ({"exit_draft_sources": "prompt", "exit_draft_length": 3}, 1.0, 1.0),
    "drafts from the text, top p": ({"exit_draft_sources": "prompt", "exit_draft_length": 2}, 1.2, 0.8),
    "shortlist": ({"exit_layer": 3, "exit_draft_length": 3, "exit_shortlist": [5, 0, 2]}, 1.3, 1.0),
    "int8 drafts": ({"exit_layer": 3, "exit_draft_length": 2, "exit_draft_weights": "int8"}, 1.3, 1.0),
    "top p": ({"exit_layer": 1, "exit_draft_length": 2}, 1.2, 0.8),
    "shortlist heads": ({"exit_layer": 3, "exit_draft_length": 2}, 1.3, 1.0),
}


@pytest.mark.parametrize("name", CASES)
def test_joint_law(pair, short_pair, name):
    pair = short_pair if name == "shortlist heads" else pair
    options, temperature, top_p = CASES[name]
    got = sample(pair.model, 1, exit_policy="lossless", temperature=temperature, top_p=top_p, **options)
    assert got.sequences.shape == (TEXTS, len(PROMPT) + 5)
    law = joint_law(pair.base, 4, temperature, top_p)
    # Tokens 2 to 4: all of them come from drafts, corrections and bonuses (the first is the prompt's).
    assert abs(surprise(counted(got.sequences, 1), TEXTS * law.sum(0))) < 4
    assert abs(surprise(counted(got.sequences, 0), TEXTS * law.sum(3))) < 4
    if "exit_draft_length" in options:
        assert 0.05 < got.exit_stats["acceptance"] < 0.95  # both branches of the rule were at work


def test_the_count_would_notice(pair):
    """Thresholds do change the law, and the test sees it; transformers' own sampling passes."""
    law = joint_law(pair.base, 3, 1.0, 1.0) * 5000
    assert abs(surprise(counted(sample(pair.base, 1, 5000).sequences, 0), law)) < 4
    early = sample(pair.model, 1, 5000, exit_policy="fixed", exit_layer=3)
    assert surprise(counted(early.sequences, 0), law) > 10


def test_a_seed_gives_the_same_text(pair):
    options = {"texts": 50, "exit_policy": "lossless", "exit_layer": 3, "exit_draft_length": 2}
    assert torch.equal(sample(pair.model, 5, **options).sequences, sample(pair.model, 5, **options).sequences)
    assert not torch.equal(sample(pair.model, 5, **options).sequences, sample(pair.model, 6, **options).sequences)


def _accept(
    p: list[list[float]], q: list[list[float]], seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Many rows of one draft each, drawn from q: (drafts, accepted, token after them); p of two positions."""
    rows = 40_000
    torch.manual_seed(seed)
    drawn = torch.tensor([q[0]]).expand(rows, -1)
    drafts = torch.multinomial(drawn, 1)
    accepted, token = accept_sampled(torch.tensor([p]).expand(rows, -1, -1), drafts, [drawn])
    return drafts[:, 0], accepted, token


def test_equal_distributions_accept_everything():
    drafts, accepted, token = _accept([[0.7, 0.2, 0.1], [0.0, 0.5, 0.5]], [[0.7, 0.2, 0.1]])
    assert (accepted == 1).all()
    assert not (token == 0).any()  # the bonus is drawn from the second position
    assert abs(float((drafts == 0).float().mean()) - 0.7) < 0.01


def test_disjoint_distributions_accept_nothing():
    _, accepted, token = _accept([[0.0, 0.25, 0.75], [1.0, 0.0, 0.0]], [[1.0, 0.0, 0.0]])
    assert (accepted == 0).all()
    assert abs(float((token == 2).float().mean()) - 0.75) < 0.01
    assert not (token == 0).any()


def test_first_token_has_the_wanted_distribution():
    p = [[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]]
    drafts, accepted, token = _accept(p, [[0.1, 0.6, 0.3]])
    first = torch.where(accepted == 1, drafts, token)
    for index, want in enumerate(p[0]):
        assert abs(float((first == index).float().mean()) - want) < 0.01
    # sum of min(p, q)
    assert abs(float(accepted.float().mean()) - 0.6) < 0.01
    # What is left after a rejection is p - q: only the first token.
    assert (token[accepted == 0] == 0).all()


def test_nothing_left_after_a_rejection_by_rounding():
    """p and q the same up to rounding and a draft that is rejected all the same: p, no division by zero."""
    p = torch.tensor([[[0.0, 0.4, 0.6], [1.0, 0.0, 0.0]]])
    q = torch.tensor([[1e-9, 0.4, 0.6]])  # q never drew token 0 in exact arithmetic
    accepted, token = accept_sampled(
        p.expand(1000, -1, -1), torch.zeros(1000, 1, dtype=torch.long), [q.expand(1000, -1)]
    )
    assert (accepted == 0).all()
    assert set(token.tolist()) == {1, 2}


def test_no_drafts():
    p = torch.tensor([[[0.0, 1.0]], [[1.0, 0.0]]])
    accepted, token = accept_sampled(p, torch.zeros(2, 0, dtype=torch.long), [])
    assert accepted.tolist() == [0, 0]
    assert token.tolist() == [1, 0]


def test_rows_stop_at_their_own_first_rejection():
    """Three drafts: refused at 0, 1, 2, or never; what comes after a refusal does not count."""
    sure = torch.eye(4)
    drafts = torch.tensor([[1, 1, 1]] * 4)
    p = torch.stack(
        [torch.stack([sure[2 if i == refused else 1] for i in range(3)] + [sure[3]]) for refused in range(4)]
    )
    accepted, token = accept_sampled(p, drafts, [sure[1].expand(4, -1)] * 3)
    assert accepted.tolist() == [0, 1, 2, 3]
    assert token.tolist() == [2, 2, 2, 3]


def test_a_draft_that_was_not_drawn():
    """Always the same token: kept with its probability, else one of the others by theirs."""
    p = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]])
    torch.manual_seed(0)
    accepted, token = accept_sampled(p.expand(40_000, -1, -1), torch.ones(40_000, 1, dtype=torch.long), [None])
    assert abs(float(accepted.float().mean()) - 0.3) < 0.01
    for index, want in enumerate((0.5, 0.0, 0.2)):
        assert abs(float(((accepted == 0) & (token == index)).float().mean()) - want) < 0.01
