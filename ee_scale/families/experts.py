"""Experts: what they, and settings of theirs, are called in folders on the hub.

There each expert has three matrices of its own; modules of transformers hold those of a layer in two stacks
(`mlp.experts.gate_up_proj`, `mlp.experts.down_proj`), and older spellings of the router are renamed.
"""

import re
from dataclasses import dataclass

STACK = re.compile(r"(model\.layers\.\d+\.)mlp\.experts\.(gate_up_proj|down_proj)")
ROUTER = re.compile(r"^(model\.layers\.\d+\.)mlp\.gate\.weight$")


@dataclass(frozen=True)
class ExpertNames:
    """The experts of a family, by their names in folders on the hub.

    Attributes:
        block: module of a layer that holds router and experts; matrices: gate, up and down of one expert.
        width: config attribute of their inner width; normalised: of whether the weights of a token's experts sum to 1
            (None: they always do), or else are those of a softmax over all experts.
    """

    block: str = "mlp"
    matrices: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    width: str = "intermediate_size"
    normalised: str | None = "norm_topk_prob"

    @property
    def router(self) -> str:
        """Name of the router's matrix [experts, hidden] inside a layer."""
        return f"{self.block}.gate.weight"

    def names(self, number: int) -> tuple[str, str, str]:
        """Names of gate, up and down of an expert inside a layer."""
        gate, up, down = (f"{self.block}.experts.{number}.{name}.weight" for name in self.matrices)
        return gate, up, down

    def is_one(self, name: str) -> bool:
        """Whether a name is that of a matrix of one expert, in any layer."""
        matrices = "|".join(self.matrices)
        return re.fullmatch(rf"model\.layers\.\d+\.{self.block}\.experts\.\d+\.({matrices})\.weight", name) is not None

    def renamed(self, name: str) -> str:
        """The hub's name of a tensor, but for stacks, by transformers' own."""
        return ROUTER.sub(rf"\1{self.router}", name)
