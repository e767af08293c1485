"""Models and prompts for decoding over stages."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

from ee_scale.inference.model import untrained_exits
from helpers.models import VOCAB, load_whole, spec_of, write_model


def prompts(rows: int = 3) -> list[list[int]]:
    """Of three lengths, one of them a single token."""
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, VOCAB, (length,), generator=generator).tolist() for length in (9, 1, 4)][:rows]


def export_noisy_exits(
    root: Path,
    family: str,
    exits: Sequence[int],
    kind: str,
    head: str,
    noise: float,
    change: Callable[[nn.Module], None],
) -> None:
    """Exported folder root/family, and its base in root/base/family; `change` makes something of the base first."""
    base = write_model(root / "base" / family, family, seed=3)
    whole = load_whole(base)
    with torch.no_grad():
        change(whole)
    whole.save_pretrained(base)
    model = untrained_exits(base, spec_of(whole.config, exits, kind, head))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.exit_heads.parameters():
            parameter.add_(noise * torch.randn_like(parameter))
    model.save_pretrained(root / family)
