"""What the frozen teacher says of a text: kept in memory when a text is first met, so that it is computed once."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from ee_scale.backbone.digest import named_generator
from ee_scale.exits.losses import LossSettings, chunk_tokens
from ee_scale.exits.vocab_parallel import mask_padding, systematic_sample


@dataclass
class Taught:
    """What the teacher said about one micro-batch, on one stage.

    Attributes:
        features: layer -> projected hidden states [B, S, p].
        final: last stage, where nothing is kept: input of the head.
        logits: last stage of a classifier: [B, C].
        tokens, negentropy: last stage of a causal LM, where it is kept: [B, S, K] and [B, S] of `systematic_sample`.
    """

    features: dict[int, torch.Tensor] = field(default_factory=dict)
    final: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    tokens: torch.Tensor | None = None
    negentropy: torch.Tensor | None = None

    def by_token(self) -> dict[int | str, torch.Tensor]:
        """[B, S, ...] each."""
        sampled = {"tokens": self.tokens, "negentropy": self.negentropy}
        return {**self.features, **{name: value for name, value in sampled.items() if value is not None}}


class TeacherCache:
    """What the teacher said of each text, on this stage, in the memory of this process (not the GPU's).

    Texts that no longer fit are computed each time they come. Which ones fit follows from the texts that a replica has
    read, so that all of its stages and tensor ranks decide alike.
    """

    def __init__(self, most_tokens: int):
        """most_tokens: of all texts together, the same on every rank."""
        self.left = most_tokens
        self._kept: dict[int, tuple[torch.Tensor | None, dict[int | str, torch.Tensor]]] = {}

    def holds(self, texts: Sequence[int]) -> bool:
        """Whether nothing of a micro-batch has to be computed."""
        return all(text in self._kept for text in texts)

    def keep(self, texts: Sequence[int], lengths: Sequence[int], taught: Taught) -> None:
        """Keep what is new of a micro-batch and fits; `lengths`: tokens of each text without its padding."""
        host = {name: value.cpu() for name, value in taught.by_token().items()}
        logits = None if taught.logits is None else taught.logits.cpu()
        for row, (text, length) in enumerate(zip(texts, lengths, strict=True)):
            if text not in self._kept and length <= self.left:
                self.left -= length
                own = {name: value[row, :length].clone() for name, value in host.items()}
                self._kept[text] = (None if logits is None else logits[row].clone(), own)

    def read(self, texts: Sequence[int], length: int, device: torch.device) -> Taught:
        """The micro-batch of these texts, padded to `length` tokens with zeros."""
        found = [self._kept[text] for text in texts]
        rows = {}
        for name, first in found[0][1].items():
            rows[name] = first.new_zeros(len(texts), length, *first.shape[1:])
            for row, (_, own) in enumerate(found):
                rows[name][row, : len(own[name])] = own[name]
        rows = {name: value.to(device) for name, value in rows.items()}
        logits = [logits for logits, _ in found if logits is not None]
        return Taught(
            features={name: value for name, value in rows.items() if isinstance(name, int)},
            logits=torch.stack(logits).to(device) if logits else None,
            tokens=rows.get("tokens"),
            negentropy=rows.get("negentropy"),
        )


def sample_teacher(
    head: nn.Module, final: torch.Tensor, texts: Sequence[int], count: int, settings: LossSettings, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`systematic_sample` of the teacher's distributions [B, S] at the loss's temperature, from its head's input.

    Points follow from (seed, text) alone. Logits exist for `chunk_tokens` tokens at a time.
    """
    length, flat = final.shape[1], final.flatten(0, 1)
    points = torch.cat(
        [torch.rand(length, generator=named_generator(f"text {t}", seed), dtype=torch.float64) for t in texts]
    ).to(final.device)
    size = chunk_tokens(settings.chunk_tokens, settings.vocab_size, final.device.type)
    found = []
    for state, point in zip(flat.split(size), points.split(size), strict=True):
        logits = mask_padding(head(state), settings.vocab_size) / settings.kl_temperature
        found.append(systematic_sample(logits, point, count))
    tokens, negentropy = (torch.cat(parts) for parts in zip(*found, strict=True))
    return tokens.view(-1, length, count), negentropy.view(-1, length)
