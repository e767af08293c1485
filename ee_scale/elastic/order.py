"""The order of units by importance, and how sorted units are dealt to tensor ranks.

Unit u lives on rank u mod tp at slot u div tp: the first k/tp slots of every rank are together exactly the k most
important units, whatever tp is, and the load is even.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ee_scale.elastic.subnet import ElasticShape
from ee_scale.errors import UserError

DIVERGENCE, INFLUENCE = "divergence", "influence"  # of `importance.layers`


@dataclass(frozen=True)
class UnitOrder:
    """Units of the base model, the most important first.

    Attributes:
        hidden: [D] int64, one order for the whole residual stream.
        groups: [L, G] int64, head groups of each layer.
        ffn: [L, F] int64, MLP units of each layer.
        drop: [L] int64, layers in the order in which they are dropped.
    """

    hidden: torch.Tensor
    groups: torch.Tensor
    ffn: torch.Tensor
    drop: torch.Tensor

    @classmethod
    def identity(cls, shape: ElasticShape) -> "UnitOrder":
        """The base model's own order; layers are dropped from the last."""
        layers = shape.num_layers
        return cls(
            hidden=torch.arange(shape.hidden),
            groups=torch.arange(shape.groups).repeat(layers, 1),
            ffn=torch.arange(shape.ffn).repeat(layers, 1),
            drop=torch.arange(layers).flip(0),
        )

    def rows(self, axis: str, layer: int | None, shape: ElasticShape) -> torch.Tensor | None:
        """[length] rows of the base tensor along `axis`, sorted; None for an axis that is not elastic."""
        if axis == "hidden":
            return self.hidden
        if axis == "ffn":
            return self.ffn[layer]
        if axis in ("heads", "kv"):
            block = shape.block(axis)
            return (self.groups[layer][:, None] * block + torch.arange(block)).flatten()
        return None

    def save(self, path: Path) -> None:
        """As safetensors."""
        save_file({name: getattr(self, name).contiguous() for name in FIELDS}, path)

    @classmethod
    def load(cls, path: Path, shape: ElasticShape) -> "UnitOrder":
        """Raises `UserError` if the file is damaged or of another model."""
        try:
            with safe_open(path, framework="pt") as file:
                order = cls(*(file.get_tensor(name) for name in FIELDS))
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: not a whole file of unit orders ({error})") from error
        wanted = cls.identity(shape)
        for name in FIELDS:
            mine, theirs = getattr(order, name), getattr(wanted, name)
            same = (mine.shape, mine.dtype) == (theirs.shape, theirs.dtype)
            if not same or not torch.equal(mine.sort(-1).values, theirs.sort(-1).values):
                raise UserError(f"{path}: '{name}' is no order of this model's units {list(theirs.shape)}")
        if shape.first_layer_stays and order.drop[-1] != 0:
            raise UserError(f"{path}: 'drop' ends with layer {int(order.drop[-1])}; this model cannot lose layer 0")
        return order


FIELDS = ("hidden", "groups", "ffn", "drop")


def deal(whole: torch.Tensor, dim: int, block: int, rank: int, tp: int) -> torch.Tensor:
    """This rank's part of a tensor whose `dim` holds sorted units of `block` rows each."""
    units = whole.unflatten(dim, (-1, block))
    taken = units[(slice(None),) * dim + (slice(rank, None, tp),)]
    return taken.flatten(dim, dim + 1).contiguous()


def undeal(parts: list[torch.Tensor], dim: int, block: int) -> torch.Tensor:
    """The whole tensor from the parts of all ranks."""
    units = [part.unflatten(dim, (-1, block)) for part in parts]
    return torch.stack(units, dim + 1).flatten(dim, dim + 2)
