"""Settings of `ee-scale tune`."""

from dataclasses import dataclass, field
from typing import Any

from ee_scale.config.groups import (
    CHUNK,
    BatchConfig,
    Choices,
    DataConfig,
    LauncherConfig,
    LoggingConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    Rule,
    above,
    at_least,
    one_of,
    setting,
)
from ee_scale.modeling.kinds import KINDS


def _is_size(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return 0 < value < 1 or (value >= 2 and value == int(value))


@dataclass
class ExitsConfig:
    layers: Any = setting(
        [0.25, 0.5, 0.75],
        "where exits sit: layer numbers [3,6,9] (an exit at k reads the hidden state after k layers), "
        "fractions of the depth [0.25,0.5], or 'stages' for every stage boundary",
    )
    kind: str = setting("mlp", "what an exit trains before its head", rule=Choices(KINDS))
    head: str = setting(
        "low_rank",
        "output head: the frozen lm_head (tied), lm_head plus a low-rank update, an own copy (full), or an own copy "
        "for the most frequent tokens only (shortlist)",
        rule=one_of("tied", "low_rank", "full", "shortlist"),
    )
    rank: int = setting(64, "rank r of the low-rank head", rule=at_least(1))
    shortlist: Any = setting(
        8192,
        "tokens that a shortlist head scores, a number or a share of the vocabulary (0.125): the most frequent ones of "
        "the training data, and all special ones; labels outside are left out of the exits' loss",
        rule=Rule("give a number of tokens, at least 2, or a share of the vocabulary, above 0 and below 1", _is_size),
    )
    init: str = setting("copy", "start from the backbone's own modules, or random", rule=one_of("copy", "random"))
    loss_weights: Any = setting(1.0, "weight of the exits' losses: one number, or one per exit")
    loss_weight_init: float = setting(0.0, "loss weight at step 0 of the weight warm-up")
    loss_weight_warmup_steps: int = setting(
        0, "steps until the loss weights reach their value; 0: from the start", rule=at_least(0)
    )
    loss_weight_warmup_style: str = setting("linear", "shape of the weight warm-up", rule=one_of("linear", "cosine"))
    confidence_weighting: bool = setting(
        False, "weight each token's loss by the exit's own confidence (costs one more head pass)"
    )
    kl_weight: float = setting(
        0.0,
        "weight of KL(final layer || exit); needs every stage, and stages wait for the final layer",
        rule=at_least(0),
    )
    kl_temperature: float = setting(1.0, "temperature of both distributions in the KL term", rule=above(0))
    loss_chunk_tokens: int | None = setting(None, CHUNK, rule=at_least(1))


@dataclass
class BackboneConfig:
    mode: str = setting(
        "frozen",
        "what trains beside the exits: nothing, low-rank adapters on the backbone, or all of it (EE-LLM); "
        "choose with backbone=",
        rule=one_of("frozen", "low_rank", "full"),
    )
    rank: int = setting(8, "rank r of the adapters", rule=at_least(1))
    targets: list[str] = setting(["attention", "mlp"], "projections that get an adapter, of attention and mlp")
    final_weight: float = setting(1.0, "weight of the model's own loss beside those of the exits", rule=at_least(0))
    activation_checkpointing: bool = setting(
        False, "keep only each layer's input for the backward pass and compute the rest again"
    )

    @property
    def trains(self) -> bool:
        """Whether gradients cross stages; then all stages run, and the model's own loss counts."""
        return self.mode != "frozen"


@dataclass
class TrainConfig(BatchConfig):
    steps: int = setting(1000, "optimizer steps", rule=at_least(1))
    held_out: Any = setting(
        None,
        "text that is not trained on: at every checkpoint the exits' loss on it is measured, and the checkpoint with "
        "the lowest one is kept and is what export takes",
        texts=True,
    )
    held_out_tokens: int = setting(20_000, "tokens of held_out to measure on; 0: all", rule=at_least(0))
    early_stop: int = setting(
        0,
        "with held_out: end the run after this many checkpoints in a row without a lower loss; 0: never",
        rule=at_least(0),
    )


@dataclass
class TuneConfig:
    """Train early exits on a frozen Hugging Face model, or together with it."""

    out: str = setting("runs/tune", "output folder of the run")
    model: ModelConfig = field(default_factory=ModelConfig)
    exits: ExitsConfig = field(default_factory=ExitsConfig)
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    launcher: LauncherConfig = field(default_factory=LauncherConfig)
