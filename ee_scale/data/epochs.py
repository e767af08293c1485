"""Epochs: the same sequences again, in another order each time."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ee_scale.backbone.digest import named_generator


class Epochs(Dataset):
    """`total` items: the first `count` sequences of a dataset in its own order, then in another one in every epoch.

    The orders depend on `count` and `seed` alone.
    """

    def __init__(self, dataset: Dataset, count: int, total: int, seed: int) -> None:
        self.dataset, self.count, self.total, self.seed = dataset, count, total, seed
        self._epoch, self._order = 0, torch.arange(0)

    @property
    def masked(self) -> bool:
        """Whether items differ in how many of their tokens are learned, as of the dataset."""
        return getattr(self.dataset, "masked", False)

    def __len__(self) -> int:
        return self.total

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        return self.dataset[self.sequence(number)]

    def sequence(self, number: int) -> int:
        """Which of the sequences the item is, from 0."""
        epoch, place = divmod(number, self.count)
        if epoch == 0:
            return place
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = torch.randperm(self.count, generator=named_generator(f"epoch {epoch}", self.seed))
        return int(self._order[place])

    def sequences(self, numbers: Sequence[int]) -> Tensor:
        """The same of several items: int64 [numbers]."""
        return torch.tensor([self.sequence(number) for number in numbers])
