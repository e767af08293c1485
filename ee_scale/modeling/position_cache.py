"""A key/value cache whose columns are positions.

Row b of every layer holds the key of position p in column p, so rows of a batch may have different lengths, tokens
may be taken back without cropping (columns at and after a row's length are never read, and overwritten later), and
layers may lag behind one another. The masks that make this safe are those of `layer_runner`. For the same reason a row
may take the place of another: what that one left lies behind its length.
B rows of the cache, R of a pass, which are the first ones; H key/value heads, C columns, D head size, q columns of one
pass.
"""

import torch
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin

GROWTH = 256  # columns


class PositionLayer(CacheLayerMixin):
    """Keys and values [B, H, C, D] of one layer. Zeros at first: even a masked NaN would poison the values."""

    def __init__(self, cache: "PositionCache"):
        super().__init__()
        self.cache = cache

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.keys = _zeros_like(key_states, self.cache)
        self.values = _zeros_like(value_states, self.cache)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write [R, H, q, D] at the place of this pass; return all columns that it may look at."""
        self.make_room(key_states, value_states)
        return self._write(self.keys, key_states), self._write(self.values, value_states)

    def make_room(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """For all columns of the cache, of keys and values like these."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        elif self.keys.shape[2] < self.cache.capacity:
            self.keys, self.values = (_grown(old, self.cache.capacity) for old in (self.keys, self.values))

    def _write(self, store: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        (start, columns, end), store = self.cache.place, store[: len(new)]
        if start is None:
            store[self.cache.numbers[: len(new), None], :, columns] = new.transpose(1, 2)
        else:
            store[:, :, start : start + new.shape[2]] = new
        return store[:, :, :end]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.place[2], 0

    def get_seq_length(self) -> int:
        return self.cache.place[2]

    def get_max_length(self) -> int:
        return -1


class PositionCache(Cache):
    """The layers' keys and values; `focus` says where the next pass writes and how far it looks."""

    def __init__(self, num_layers: int, batch_size: int, capacity: int, device: torch.device | str):
        super().__init__(layers=[PositionLayer(self) for _ in range(num_layers)])
        self.num_rows, self.capacity = batch_size, capacity
        self.numbers = torch.arange(batch_size, device=device)
        self.place: tuple[int | None, torch.Tensor | None, int] = (0, None, 0)

    def focus(self, start: int | None, columns: torch.Tensor | None, end: int) -> None:
        """columns [R, q], or one `start` for all rows; `end`: columns to look at."""
        if end > self.capacity:
            self.capacity = end + GROWTH
        self.place = (start, columns, end)

    def stores(self) -> list[torch.Tensor]:
        """What holds a number of every row: keys and values of all layers."""
        return [store for layer in self.layers if layer.is_initialized for store in (layer.keys, layer.values)]

    def take_in(self, first: int, other: "PositionCache", rows: list[int], length: int) -> None:
        """Copy the first `length` columns of some rows of another cache into the rows from `first` on."""
        if length > self.capacity:
            self.capacity = length + GROWTH
        for layer, theirs in zip(self.layers, other.layers, strict=True):
            if theirs.is_initialized:
                layer.make_room(theirs.keys, theirs.values)
                for slot, row in enumerate(rows, first):
                    layer.keys[slot, :, :length] = theirs.keys[row, :, :length]
                    layer.values[slot, :, :length] = theirs.values[row, :, :length]

    def row(self, row: int, length: int, num_layers: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Copies of the first `length` columns of one row, [H, length, D] per layer."""
        return [
            (layer.keys[row, :, :length].clone(), layer.values[row, :, :length].clone())
            for layer in self.layers[:num_layers]
        ]


def fill_dynamic_cache(
    target: DynamicCache,
    config: PreTrainedConfig,
    rows: list[list[tuple[torch.Tensor, torch.Tensor]]],
    offsets: list[int],
) -> None:
    """Give `target` the keys and values of left-padded rows, as transformers' own loop would have left them.

    rows[b][layer] = (keys, values), each [H, length, D]; offsets[b]: padding columns in front of row b.
    """
    total = max(offset + row[0][0].shape[1] for offset, row in zip(offsets, rows, strict=True))
    fresh = DynamicCache(config=config)
    for index in range(len(rows[0])):
        both = []
        for part in (0, 1):
            like = rows[0][index][part]
            whole = like.new_zeros(len(rows), like.shape[0], total, like.shape[2])
            for b, row in enumerate(rows):
                state = row[index][part]
                whole[b, :, offsets[b] : offsets[b] + state.shape[1]] = state
            both.append(whole)
        fresh.update(both[0], both[1], index)
    target.layers = fresh.layers


def _zeros_like(states: torch.Tensor, cache: PositionCache) -> torch.Tensor:
    return states.new_zeros(cache.num_rows, states.shape[1], cache.capacity, states.shape[3])


def _grown(store: torch.Tensor, capacity: int) -> torch.Tensor:
    new = store.new_zeros(*store.shape[:2], capacity, store.shape[3])
    new[:, :, : store.shape[2]] = store
    return new
