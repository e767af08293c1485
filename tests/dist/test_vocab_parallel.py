"""Cross entropy, KL and confidence on logits cut over a padded vocabulary equal dense torch, values and gradients."""

import pytest
import torch
import torch.distributed as dist
from helpers.spawn import spawn
from torch.nn import functional

from ee_scale.backbone.parallel import padded_vocab
from ee_scale.exits.vocab_parallel import (
    confidence,
    cross_entropy,
    kl_divergence,
    mask_padding,
    sampled_kl,
    systematic_sample,
)
from ee_scale.grid import Grid, Layout, join_grid, leave_grid

TOKENS = 19
TEMPERATURES = (1.0, 2.0, 0.5)
SAMPLES, POINTS = 3, 500  # K of a sampled teacher, and starting points that its expectation is taken over
VOCABULARIES = (131, 128, 5)  # padded, even, and so small that the last of four ranks holds padding alone
CASES = [(tp, vocab) for tp in (1, 2, 4) for vocab in VOCABULARIES]


def make_inputs(vocab: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(student logits, teacher logits, labels, token weights)."""
    generator = torch.Generator().manual_seed(vocab)
    student, teacher = (4 * torch.randn(TOKENS, vocab, generator=generator) for _ in range(2))
    # The last real row is a label too: its neighbour is padding.
    labels = torch.randint(0, vocab, (TOKENS,), generator=generator).index_fill(0, torch.tensor([0]), vocab - 1)
    return student, teacher, labels, torch.rand(TOKENS, generator=generator)


def dense(vocab: int) -> dict[str, torch.Tensor]:
    student, teacher, labels, weights = make_inputs(vocab)
    found = {"confidence": student.softmax(-1).max(-1).values}

    def keep(name: str, loss: torch.Tensor) -> None:
        found[name] = loss.detach()
        found[f"{name}_gradient"] = torch.autograd.grad((loss * weights).sum(), student)[0]

    student.requires_grad_(True)
    keep("ce", functional.cross_entropy(student, labels, reduction="none"))
    for t in TEMPERATURES:
        p, q = (student / t).log_softmax(-1), (teacher / t).log_softmax(-1)
        keep(f"kl{t}", functional.kl_div(p, q, log_target=True, reduction="none").sum(-1) * t**2)
    return found


def run_cases(rank: int, tp: int) -> dict[int, dict[str, torch.Tensor]]:
    grid = join_grid(Layout(tp=tp), torch.device("cpu"))
    found = {vocab: cut(vocab, grid) for vocab in VOCABULARIES}
    leave_grid()
    return found


def cut(vocab: int, grid: Grid) -> dict[str, torch.Tensor]:
    student, teacher, labels, weights = make_inputs(vocab)
    rows = padded_vocab(vocab, grid.layout.tp) // grid.layout.tp
    padding = rows * grid.layout.tp - vocab

    def shard(logits: torch.Tensor) -> torch.Tensor:
        # Padded rows hold what would win every softmax, if anything looked at them.
        return functional.pad(logits, (0, padding), value=50.0).narrow(1, grid.tp_rank * rows, rows).contiguous()

    mine = shard(student).requires_grad_(True)
    target = mask_padding(shard(teacher), vocab)
    found = {"confidence": confidence(mask_padding(mine, vocab))}

    def keep(name: str, loss: torch.Tensor) -> None:
        gradient = torch.autograd.grad((loss * weights).sum(), mine)[0].contiguous()
        shards = [torch.empty_like(gradient) for _ in range(grid.layout.tp)]
        dist.all_gather(shards, gradient, group=grid.tp_group)
        whole = torch.cat(shards, -1)
        assert not whole[:, vocab:].any(), f"{name}: the padding has a gradient"
        found[name], found[f"{name}_gradient"] = loss.detach(), whole[:, :vocab]

    keep("ce", cross_entropy(mask_padding(mine * 1.0, vocab), labels))  # a copy: Megatron overwrites its input
    for t in TEMPERATURES:
        keep(f"kl{t}", kl_divergence(mask_padding(mine, vocab), target, t))
        keep(f"sampled{t}", sampled(mine, target, vocab, t))
    broken = target.clone()
    broken[0, 0] = torch.nan  # on one token's row
    lost = kl_divergence(mask_padding(mine.detach(), vocab), broken).isnan()
    assert lost.tolist() == [True, *[False] * (TOKENS - 1)], "what is no number must not pass for no distance"
    found["tokens"] = systematic_sample(target, torch.full((TOKENS,), 0.3, dtype=torch.float64), 50)[0]
    return found


def sampled(mine: torch.Tensor, target: torch.Tensor, vocab: int, t: float) -> torch.Tensor:
    """Mean KL over draws from POINTS starting points."""
    points = ((torch.arange(POINTS, dtype=torch.float64) + 0.5) / POINTS).repeat_interleave(TOKENS)
    tokens, negentropy = systematic_sample(target.repeat(POINTS, 1) / t, points, SAMPLES)
    assert tokens.max() < vocab
    kl = sampled_kl(mask_padding(mine, vocab).repeat(POINTS, 1), tokens, negentropy, t)
    return kl.view(POINTS, TOKENS).mean(0)


@pytest.fixture(scope="module")
def found() -> dict[int, list]:
    return {tp: spawn(run_cases, tp, tp) for tp in (1, 2, 4)}


@pytest.mark.parametrize(("tp", "vocab"), CASES)
def test_equal_to_dense(tp: int, vocab: int, found: dict[int, list]) -> None:
    expected = dense(vocab)
    for rank, results in enumerate(found[tp]):
        mine = {name: value for name, value in results[vocab].items() if not name.startswith(("sampled", "tokens"))}
        assert mine.keys() == expected.keys()
        for name, value in mine.items():
            torch.testing.assert_close(
                value, expected[name], rtol=1e-5, atol=2e-6, msg=lambda m, r=rank, n=name: f"{n}, rank {r}: {m}"
            )


@pytest.mark.parametrize(("tp", "vocab"), CASES)
@pytest.mark.parametrize("t", TEMPERATURES)
def test_sampled_teachers_are_right_on_average(tp: int, vocab: int, t: float, found: dict[int, list]) -> None:
    """Three tokens each, over many draws: the loss and the gradient of the whole distribution. A cut to the three
    largest is far off."""
    expected, (student, teacher, _, weights) = dense(vocab), make_inputs(vocab)
    q = (teacher / t).softmax(-1)
    top = q * (q >= q.topk(SAMPLES).values[:, -1:])
    cut_off = weights[:, None] * t * ((student / t).softmax(-1) - top / top.sum(-1, keepdim=True))
    for results in found[tp]:
        gradient, whole = results[vocab][f"sampled{t}_gradient"], expected[f"kl{t}_gradient"]
        torch.testing.assert_close(gradient, whole, rtol=0, atol=2e-3 * t)
        torch.testing.assert_close(results[vocab][f"sampled{t}"], expected[f"kl{t}"], rtol=2e-2, atol=2e-2 * t)
        if vocab > SAMPLES + 2 and t >= 1:
            assert (cut_off - whole).norm() > 10 * (gradient - whole).norm()


@pytest.mark.parametrize(("tp", "vocab"), CASES)
def test_samples_are_those_of_the_distribution_at_every_grid(tp: int, vocab: int, found: dict[int, list]) -> None:
    q = make_inputs(vocab)[1].double().softmax(-1)
    for results in found[tp]:
        tokens = results[vocab]["tokens"]
        assert torch.equal(tokens, found[1][0][vocab]["tokens"])
        counts = torch.nn.functional.one_hot(tokens.long(), vocab).sum(1)
        assert (counts >= (50 * q - 1e-4).floor()).all()
        assert (counts <= (50 * q + 1e-4).ceil()).all()
