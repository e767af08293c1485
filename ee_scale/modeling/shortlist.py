"""A part of the vocabulary: what a shortlist head scores, and what lossless decoding drafts among.

N tokens of the list, V of the vocabulary.
"""

from collections.abc import Sequence
from math import isfinite

import torch


class Shortlist:
    """N token ids in the order of their logits, and the way between that order and the vocabulary's."""

    def __init__(self, tokens: Sequence[int], vocab_size: int):
        """Raises ValueError for a token that the vocabulary has not."""
        self.tokens, self.vocab_size = tuple(tokens), vocab_size
        if self.tokens and max(self.tokens) >= vocab_size:
            raise ValueError(f"early_exit: shortlist_ids: {max(self.tokens)} is not in 0..{vocab_size - 1}")
        self._tables: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}

    def ids(self, device: torch.device) -> torch.Tensor:
        """The tokens, int64 [N]."""
        return self._on(device)[0]

    def places(self, tokens: torch.Tensor) -> torch.Tensor:
        """Token ids [...] -> their places in the list, int64 [...]; -1 for those that are not in it."""
        return self._on(tokens.device)[1][tokens]

    def over_vocabulary(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits in the order of the list [..., N] -> by token id [..., V], minus infinity for all other tokens."""
        whole = logits.new_full((*logits.shape[:-1], self.vocab_size), float("-inf"))
        return whole.index_copy(-1, self.ids(logits.device), logits)

    def _on(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        # No buffers: transformers leaves those that are not stored empty when it opens a model.
        if device not in self._tables:
            with torch.inference_mode(False):  # training may read the same tables
                ids = torch.tensor(self.tokens, device=device)
                places = torch.full((self.vocab_size,), -1, device=device)
                places[ids] = torch.arange(len(ids), device=device)
            self._tables[device] = ids, places
        return self._tables[device]


def choose_tokens(
    wanted: int | Sequence[int] | None,
    policy: str,
    calibrated: Sequence[int] | None,
    vocab_size: int | None,
    head_tokens: Sequence[int],
) -> tuple[int, ...] | None:
    """The tokens that drafts are chosen among; None: the whole vocabulary.

    wanted: so many of those that the exits' heads score (`head_tokens`, empty: all) or else of the calibrated ones, or
    token ids. Raises ValueError in one line.
    """
    if wanted is None:
        return tuple(head_tokens) if head_tokens and policy == "lossless" else None
    if policy != "lossless":
        raise ValueError(f"exit_shortlist: only exit_policy=lossless can draft from a shortlist, not {policy!r}")
    if isinstance(wanted, bool) or (isinstance(wanted, (int, float)) and (not isfinite(wanted) or wanted < 1)):
        raise ValueError(f"exit_shortlist={wanted!r}: give a number of tokens, or token ids")
    if isinstance(wanted, int):
        stored = head_tokens or calibrated
        if not stored:
            raise ValueError(
                f"exit_shortlist={wanted}: no shortlist stored; give token ids, or run `ee-scale calibrate`"
            )
        return tuple(stored[:wanted])
    ids = tuple(int(token) for token in wanted)
    wrong = [token for token in ids if token < 0 or (vocab_size is not None and token >= vocab_size)]
    if not ids or wrong or len(set(ids)) != len(ids):
        raise ValueError(
            f"exit_shortlist: {f'token {wrong[0]} is not in 0..{vocab_size - 1}' if wrong else 'empty or repeated ids'}"
        )
    if head_tokens and (strange := sorted(set(ids) - set(head_tokens))):
        raise ValueError(
            f"exit_shortlist: token {strange[0]} is not among the {len(head_tokens)} that the exits' heads score"
        )
    return ids
