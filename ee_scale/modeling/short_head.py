"""An exit's head for a part of the tokens that it could score. A full head costs several layers of a small model.

N tokens of the list, D hidden size.
"""

from torch import Tensor

from .heads import LowRankHead, ModelWithExits
from .packing import PackedLinear, plain_weight, product
from .shortlist import Shortlist


class ShortHead:
    """Rows of a head's matrix, packed where the model's own are."""

    def __init__(self, model: ModelWithExits, k: int, shortlist: Shortlist):
        """shortlist: the tokens, in the order of the logits; those of a shortlist head, or some of them."""
        head, lm_head = model.exit_heads[str(k)], model.get_output_embeddings()
        self.shortlist = shortlist
        matrix = head.head if head.spec.owns_matrix else lm_head
        packs = type(matrix) is PackedLinear
        self.capped, self.down = head.spec.capped, None
        if head.shortlist is not None and head.shortlist.tokens == shortlist.tokens:
            self.rows = matrix
            return
        weight = plain_weight(matrix)
        ids = shortlist.ids(weight.device)
        self.rows = product(weight[ids if head.shortlist is None else head.shortlist.places(ids)], packs)
        if isinstance(head.head, LowRankHead):
            self.down, self.up = head.head.down, product(plain_weight(head.head.up)[ids], packs)

    def __call__(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., N]."""
        logits = self.rows(hidden)
        if self.down is not None:
            logits = logits + self.up(self.down(hidden))
        return self.capped(logits)
