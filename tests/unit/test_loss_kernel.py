"""Another kernel for the cross entropies, and chunks by device. Liger's own kernel runs on GPUs alone; here a stand-in
does to its tensors what that one does: it writes the gradient over the logits, and nobody's graph knows."""

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from torch import nn

from ee_scale.config.compose import compose_config
from ee_scale.data.builtin import tiny_model
from ee_scale.errors import UserError
from ee_scale.exits.losses import LossSettings, chunk_tokens, token_backward, whole_teacher
from ee_scale.planning import fits, loss
from ee_scale.training.recipe import recipe_of

TOKENS, WIDTH, VOCAB = 22, 8, 31


class Group:
    def size(self) -> int:
        return 1


class StandIn(torch.autograd.Function):
    """LigerCrossEntropyFunction of liger-kernel 0.8, as far as it is used."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, labels: torch.Tensor, *settings: Any) -> tuple[torch.Tensor, None]:
        assert settings == (None, -100, 0.0, 0.0, "none")
        log_p = logits.detach().float().log_softmax(-1)
        rows = torch.arange(len(labels))
        losses = -log_p[rows, labels]
        gradient = log_p.exp()
        gradient[rows, labels] -= 1
        logits.data.copy_(gradient)
        ctx.save_for_backward(logits.detach())
        return losses.to(logits.dtype), None

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, _: None) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad.unsqueeze(-1), *[None] * 6


@pytest.fixture
def liger(monkeypatch: pytest.MonkeyPatch) -> None:
    ops = ModuleType("liger_kernel.ops")
    ops.LigerCrossEntropyFunction = StandIn  # type: ignore[attr-defined]
    for name, module in (("liger_kernel", ModuleType("liger_kernel")), ("liger_kernel.ops", ops)):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(parallel_state, "get_tensor_model_parallel_world_size", lambda: 1)
    monkeypatch.setattr(parallel_state, "get_tensor_model_parallel_rank", lambda: 0)
    monkeypatch.setattr(parallel_state, "get_tensor_model_parallel_group", Group)


def run(kernel: str, cap: float | None, **more: Any) -> list[torch.Tensor]:
    """Means; gradients of the states and of what the head trains."""
    generator = torch.Generator().manual_seed(0)
    hidden, final = (torch.randn(2, TOKENS // 2, WIDTH, generator=generator) for _ in range(2))
    labels = torch.randint(0, VOCAB, (2, TOKENS // 2), generator=generator)
    mask = torch.rand(2, TOKENS // 2, generator=generator).round() * 0.7
    frozen, head = nn.Linear(WIDTH, VOCAB + 1, bias=False), nn.Linear(WIDTH, VOCAB + 1, bias=False)
    for layer in (frozen, head):
        nn.init.normal_(layer.weight, generator=generator)

    def logits(x: torch.Tensor) -> torch.Tensor:
        both = frozen.requires_grad_(False)(x) + head(x)
        return both if cap is None else torch.tanh(both / cap) * cap

    settings = LossSettings(VOCAB, 5, kernel=kernel, **more)
    teacher = whole_teacher(frozen, final, settings) if settings.kl_weight else None
    hidden.requires_grad_(True)
    means, gradient = token_backward(logits, hidden, labels, mask, settings, 0.3, teacher)
    return [means, gradient, head.weight.grad]


@pytest.mark.parametrize("cap", [None, 4.0])
@pytest.mark.parametrize(
    "more", [{}, {"kl_weight": 0.5, "kl_temperature": 2.0}, {"confidence_weighting": True}], ids=str
)
def test_same_losses_and_gradients(liger: None, cap: float | None, more: dict[str, Any]) -> None:
    for found, expected in zip(run("liger", cap, **more), run("torch", cap, **more), strict=True):
        assert expected.abs().sum() > 0
        torch.testing.assert_close(found, expected)


def test_chunks_by_device() -> None:
    assert chunk_tokens(None, 128_256, "cpu") == 1024
    assert chunk_tokens(None, 128_256, "cuda") == 2048
    assert chunk_tokens(None, 32_000, "cuda") == 8192
    assert chunk_tokens(None, 1_000_000, "cuda") == 1024
    assert chunk_tokens(14, 128_256, "cuda") == 14


COMMANDS = {"tune": ["model=tiny", "data=python"], "supernet": ["+debug=supernet_cpu"]}


@pytest.mark.parametrize("verb", COMMANDS)
def test_what_it_cannot_compute_is_refused(monkeypatch: pytest.MonkeyPatch, verb: str) -> None:
    tiny_model()

    def refusal(*words: str) -> str:
        words = (*COMMANDS[verb], "parallel.pp=1", "train.loss_kernel=liger", *words)
        with pytest.raises(UserError, match=r"^train\.loss_kernel=liger") as caught:
            recipe_of(verb).of(compose_config(verb, words))
        return str(caught.value)

    text = "with parallel.tp=2: it reads whole logits; use parallel.tp=1, or train.loss_kernel=torch"
    assert text in refusal("parallel.tp=2", "parallel.device=cuda")
    assert "with parallel.device=cpu: it needs a GPU" in refusal("parallel.device=cpu")
    monkeypatch.setattr(loss, "find_spec", lambda name: None)
    assert "pip install 'ee-scale[liger]'" in refusal("parallel.device=cuda")
    monkeypatch.setattr(loss, "find_spec", lambda name: name)
    monkeypatch.setattr(fits.torch.cuda, "is_available", lambda: False)
    words = (*COMMANDS[verb], "parallel.pp=1", "train.loss_kernel=liger", "parallel.device=cuda")
    assert recipe_of(verb).of(compose_config(verb, words)).config.train.loss_kernel == "liger"
