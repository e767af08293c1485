"""Runs parts of a model's depth at chosen positions.

A `Block` is q consecutive positions of each of B rows; position and cache column are the same number. The
modules are transformers' own, called as its `forward` calls them. S columns, D hidden size, V vocabulary.
"""

import copy
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from threading import get_ident

import torch
from torch import nn

from .heads import ExitTaps, ModelWithExits, Tap, embed, rotary_by_type
from .position_cache import GROWTH, PositionCache
from .short_head import ShortHead
from .transfers import send
from .versions import CACHE

ATTENTION = ("sdpa", "eager")  # kernels that take a mask of our own
LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")


@dataclass
class Block:
    """Where a pass works.

    Attributes:
        starts: first position of each row.
        length: q.
        start: the first position where all rows have the same one, else None.
        columns: [B, q] positions ([1, q] where all rows have the same).
        end: columns that are looked at.
        rotary: cosines and sines [B or 1, q, D]; [T, B or 1, q, D] where T types of layers have their own.
    """

    starts: list[int]
    length: int
    start: int | None
    columns: torch.Tensor
    end: int
    rotary: tuple[torch.Tensor, torch.Tensor]
    masks: dict[str, torch.Tensor | None] = field(default_factory=dict)


class LayerRunner:
    """One generation's view of a model: cache, rotary table, what exits remember; `close` takes its hooks off."""

    def __init__(self, model: ModelWithExits, exit_layers: tuple[int, ...], batch_size: int, capacity: int):
        check_model(model)
        self.model, self.base, self.spec = model, model.base_model, model.exit_spec
        self.layers, self.num_layers = self.base.layers, len(self.base.layers)
        self.exit_layers = exit_layers
        self.device, self.dtype = self.base.embed_tokens.weight.device, self.base.embed_tokens.weight.dtype
        self.eager = model.config._attn_implementation == "eager"
        self.window = getattr(model.config, "sliding_window", None)
        # Families that mix attention types list them; the others have one for all layers.
        everywhere = "full_attention" if self.window is None else "sliding_attention"
        self.types = getattr(model.config, "layer_types", None) or [everywhere] * self.num_layers
        self.cache = PositionCache(self.num_layers + len(self.spec.layers), batch_size, capacity, self.device)
        # Hidden states after k layers, [B, C, D]: what deeper layers, or an exit's own layer, still have to read.
        self.states = dict.fromkeys(exit_layers)
        self.exit_lengths = {k: [0] * batch_size for k in exit_layers}
        self.taps = None
        if self.spec.exit_kind.tapped and exit_layers:
            # Other threads may decode with the same model.
            self.taps = ExitTaps(self.spec, {k: self.layers[k - 1] for k in exit_layers}, get_ident())
        self.calls: Counter[tuple[int, int]] = Counter()
        self.positions: Counter[tuple[int, int]] = Counter()
        self.checks: Counter[int] = Counter()
        # Place of a layer's type in tables that differ by type.
        by_type = sorted(set(self.types)) if rotary_by_type(self.base.rotary_emb) else []
        self.tables = {kind: place for place, kind in enumerate(by_type)}
        self._rotary_table(capacity)

    def freeze(self) -> None:
        """The prompt is over."""

    def close(self) -> None:
        """Take the hooks off."""
        if self.taps is not None:
            self.taps.remove()

    # -- rows that come and go; those in use are the first of the cache --

    def keep_rows(self, rows: list[int]) -> None:
        """Row i is what row `rows[i]` was, which is i or higher; the others are forgotten."""
        for store in (*self.cache.stores(), *(state for state in self.states.values() if state is not None)):
            for new, old in enumerate(rows):
                if new != old:
                    store[new] = store[old]
        self.exit_lengths = {k: [lengths[row] for row in rows] for k, lengths in self.exit_lengths.items()}

    def clear(self) -> None:
        """No row is in use."""
        self.exit_lengths = {k: [] for k in self.exit_layers}

    def apart(self, rows: int, capacity: int) -> "LayerRunner":
        """A runner of other rows, which counts its passes here; `take_in` takes its rows over."""
        other = copy.copy(self)
        other.cache = PositionCache(len(self.cache.layers), rows, capacity, self.device)
        other.states = dict.fromkeys(self.exit_layers)
        other.exit_lengths = {k: [0] * rows for k in self.exit_layers}
        return other

    def take_in(self, first: int, other: "LayerRunner", rows: list[int], length: int) -> None:
        """Rows of a runner `apart`, of at most `length` positions, become those from `first` on."""
        self.cache.take_in(first, other.cache, rows, length)
        for k in self.exit_layers:
            self._state(k, length)[first : first + len(rows), :length] = other.states[k][rows, :length]
            self.exit_lengths[k] += [other.exit_lengths[k][row] for row in rows]

    # -- passes ----------------------------------------------------------------------------------------------------

    def block(self, starts: list[int], length: int) -> Block:
        """The block of `length` positions from `starts` on."""
        first = starts[0]
        uniform = all(start == first for start in starts)
        end = max(starts) + length
        if end > self.cos.shape[1]:
            self._rotary_table(end + GROWTH)
        if uniform:
            columns = self.numbers[None, first : first + length]
            rotary = self._rotary(slice(first, first + length))
        else:
            columns = send(starts, self.device)[:, None] + self.numbers[:length]
            rotary = self._rotary(columns)
        return Block(starts, length, first if uniform else None, columns, end, rotary)

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """[B, q] -> [B, q, D]."""
        return embed(self.base, tokens)

    def run(self, hidden: torch.Tensor, block: Block, first: int, last: int) -> torch.Tensor:
        """Layers first+1..last on hidden states [B, q, D] of a block; states at exits on the way are remembered."""
        done = first
        for k in self.exit_layers:
            if done < k <= last:
                hidden = self._run(hidden, block, done, k)
                self._remember(k, hidden, block)
                done = k
        return self._run(hidden, block, done, last) if done < last else hidden

    def _run(self, hidden: torch.Tensor, block: Block, first: int, last: int) -> torch.Tensor:
        self.cache.focus(block.start, block.columns, block.end)
        for index in range(first, last):
            hidden = self._layer(self.layers[index], self.types[index], hidden, block)
        self.calls[first, last] += 1
        self.positions[first, last] += hidden.shape[0] * hidden.shape[1]
        return hidden

    def run_copies(self, layers: Sequence[nn.Module], hidden: torch.Tensor, block: Block) -> torch.Tensor:
        """The first layers, in the place of which these modules stand, on hidden states [B, q, D] of a block."""
        self.cache.focus(block.start, block.columns, block.end)
        for layer, kind in zip(layers, self.types, strict=False):
            hidden = self._layer(layer, kind, hidden, block)
        self._remember(len(layers), hidden, block)  # an exit's own layer may look back at it
        return hidden

    def _layer(self, layer: nn.Module, kind: str, hidden: torch.Tensor, block: Block) -> torch.Tensor:
        return layer(
            hidden,
            attention_mask=self._mask(block, kind),
            position_ids=block.columns,
            use_cache=True,
            position_embeddings=tuple(part[self.tables[kind]] for part in block.rotary)
            if self.tables
            else block.rotary,
            **{CACHE: self.cache},
        )

    def _remember(self, k: int, hidden: torch.Tensor, block: Block) -> None:
        state = self._state(k, block.end)[: len(hidden)]
        if block.start is None:
            state[self.cache.numbers[: len(hidden), None], block.columns] = hidden
        else:
            state[:, block.start : block.start + block.length] = hidden

    def recall(self, k: int, block: Block) -> torch.Tensor:
        """The remembered hidden states after k layers at a block, [B, q, D]."""
        state = self._state(k, block.end)
        if block.start is None:
            return state[self.cache.numbers[: len(block.columns), None], block.columns]
        return state[: len(block.starts), block.start : block.start + block.length]

    def _state(self, k: int, end: int) -> torch.Tensor:
        """The store of states after k layers, with room for positions before `end`."""
        old = self.states[k]
        if old is not None and old.shape[1] >= end:
            return old
        size = (self.cache.num_rows, max(self.cache.capacity, end + GROWTH), self.model.config.hidden_size)
        new = torch.zeros(size, dtype=self.dtype, device=self.device)
        if old is not None:
            new[:, : old.shape[1]] = old
        self.states[k] = new
        return new

    # -- heads -----------------------------------------------------------------------------------------------------

    def final_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., D] after the last layer -> [..., V]."""
        return self.spec.capped(self.model.get_output_embeddings()(self.base.norm(hidden)))

    def exit_logits(
        self,
        k: int,
        hidden: torch.Tensor,
        block: Block,
        at: int | slice,
        shortlist: ShortHead | None = None,
    ) -> torch.Tensor:
        """Logits of exit k right after `run` brought `hidden` [B, q, D] to layer k, of the tokens that its head scores.

        at: which of the q positions: -1, the last -> [B, N], or a slice -> [B, q', N].
        """
        self.checks[k] += 1
        if self.spec.exit_kind.attends:
            states = self._exit_layer(k, self.model.exit_heads[str(k)].body, hidden, block)
            tap = Tap(states[:, at])
        elif self.taps is not None:
            tap = self.taps.taps.pop(k).at(at)
        else:
            tap = Tap(hidden[:, at])
        return self._head_logits(k, tap, shortlist)

    def _head_logits(self, k: int, tap: Tap, shortlist: ShortHead | None) -> torch.Tensor:
        """What exit k reads at some positions -> its logits there."""
        head, output_norm = self.model.exit_heads[str(k)], self.spec.output_norm(self.layers[k - 1])
        ready = head.hidden(tap, output_norm, lambda layer, states: states)
        if shortlist is not None:
            return shortlist(ready)
        return head.scored_logits(ready, self.model.get_output_embeddings())

    def read_exit(self, k: int, block: Block) -> None:
        """Bring the own layer of exit k, where it has one, up to a block that has been run."""
        if self.spec.exit_kind.attends:
            self._exit_layer(k, self.model.exit_heads[str(k)].body, self.recall(k, block), block)

    def _exit_layer(self, k: int, layer: nn.Module, hidden: torch.Tensor, block: Block) -> torch.Tensor:
        """The exit's own decoder layer on the block, and on positions before it that it has not seen yet: its states at
        the block [B, q, D].
        """
        wanted = block.length
        lengths = self.exit_lengths[k]
        starts = [min(length, start) for length, start in zip(lengths, block.starts, strict=True)]
        lacks = {start - own for own, start in zip(starts, block.starts, strict=True)}
        if lacks != {0}:
            behind = max(lacks)
            # Where all rows lack as many positions, one pass takes them along; else they have a pass of their own, in
            # which rows that lack fewer write past them: into columns that the block itself fills next.
            missing = self.block(starts, behind + block.length if len(lacks) == 1 else behind)
            if len(lacks) == 1:
                hidden, block = self.recall(k, missing), missing
            else:
                self._exit_layer_pass(layer, self.recall(k, missing), missing)
        lengths[:] = [start + block.length for start in block.starts]
        return self._exit_layer_pass(layer, hidden, block)[:, -wanted:]

    def _exit_layer_pass(self, layer: nn.Module, hidden: torch.Tensor, block: Block) -> torch.Tensor:
        self.cache.focus(block.start, block.columns, block.end)
        return self._layer(layer, self.types[-1], hidden, block)  # it is a copy of the last layer

    # -- masks and rotary embeddings -------------------------------------------------------------------------------

    def _mask(self, block: Block, kind: str) -> torch.Tensor | None:
        """[B or 1, 1, q, S]: column c is seen from position p if c <= p (and c > p - window); None: sees all."""
        window = self.window if kind == "sliding_attention" else None
        if window is not None and block.end <= window:
            window = None
        name = "sliding" if window is not None else "full"
        if name not in block.masks:
            block.masks[name] = self._new_mask(block, window)
        return block.masks[name]

    def _new_mask(self, block: Block, window: int | None) -> torch.Tensor | None:
        if window is None and block.start is not None:
            if block.length == 1:
                return None
            if block.start == 0 and not self.eager:
                return None  # sdpa's own causal mask
        columns, seen_from = self.numbers[: block.end], block.columns[:, None, :, None]
        mask = columns <= seen_from
        if window is not None:
            mask = mask & (columns > seen_from - window)
        if not self.eager:
            return mask
        return torch.zeros(mask.shape, dtype=self.dtype, device=self.device).masked_fill(
            ~mask, torch.finfo(self.dtype).min
        )

    def _rotary_table(self, length: int) -> None:
        self.numbers = torch.arange(max(length, self.cache.num_rows), device=self.device)
        like = torch.empty(0, device=self.device, dtype=self.dtype)
        calls: list[dict[str, str]] = [{"layer_type": kind} for kind in self.tables] or [{}]
        tables = [self.base.rotary_emb(like, position_ids=self.numbers[None, :length], **call) for call in calls]
        self.cos, self.sin = (torch.cat(parts) for parts in zip(*tables, strict=True))

    def _rotary(self, at: slice | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of consecutive positions, the same in all rows, or of columns [B, q]."""
        if self.tables:
            at = (slice(None), None, at) if isinstance(at, slice) else (slice(None), at)
            return self.cos[at], self.sin[at]
        return (self.cos[:, at], self.sin[:, at]) if isinstance(at, slice) else (self.cos[0][at], self.sin[0][at])

    # -- counters --------------------------------------------------------------------------------------------------

    def clip(self, lengths: list[int]) -> None:
        """Take back what the exits' own layers saw at and behind these positions (one per row): rejected drafts, and
        padding behind prompts.
        """
        for own in self.exit_lengths.values():
            own[:] = [min(old, end) for old, end in zip(own, lengths, strict=True)]

    def layer_calls(self) -> list[int]:
        """How often each decoder layer ran."""
        return self._per_layer(self.calls)

    def layer_positions(self) -> list[int]:
        """How many positions each decoder layer worked on (rows times columns, padding of ragged blocks included)."""
        return self._per_layer(self.positions)

    def _per_layer(self, counts: Counter[tuple[int, int]]) -> list[int]:
        totals = [0] * self.num_layers
        for (first, last), count in counts.items():
            for index in range(first, last):
                totals[index] += count
        return totals


def check_model(model: ModelWithExits) -> None:
    """Raise ValueError for a model that cannot be driven layer by layer."""
    attention = model.config._attn_implementation
    if attention not in ATTENTION:
        raise ValueError(
            f"exit_policy: attention '{attention}' takes no mask of ours; open the model with "
            "attn_implementation='sdpa'"
        )
    kinds = set(getattr(model.config, "layer_types", None) or [])
    if strange := sorted(kinds - {"full_attention", "sliding_attention"}):
        raise ValueError(f"exit_policy: layers of type '{strange[0]}' take no mask of ours")
    if len(set((getattr(model, "hf_device_map", None) or {"": 0}).values())) > 1:
        raise ValueError("exit_policy: the model is spread over several devices; use ee-scale generate parallel.pp=...")
    rope = getattr(model.config, "rope_parameters", None) or {}
    if rope.get("rope_type") in LENGTH_DEPENDENT_ROPE:
        raise ValueError(f"exit_policy: rope_type={rope['rope_type']!r} turns positions by the text's length")
