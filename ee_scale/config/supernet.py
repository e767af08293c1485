"""Settings of `ee-scale supernet` and `ee-scale palette`."""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from ee_scale.config.groups import (
    CHUNK,
    BatchConfig,
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


@dataclass
class SizeConfig:
    hidden: Any = setting(1.0, "width, one of space.hidden")
    heads: Any = setting(None, "query heads, one of space.heads; null: all, or what the width gives")
    ffn: Any = setting(1.0, "MLP units, one of space.ffn")
    depth: Any = setting(1.0, "layers, one of space.depth")


@dataclass
class SpaceConfig:
    hidden: list[Any] = setting(
        [1.0], "widths of the residual stream, which shrinks last: fractions of the model's (0.5), or whole numbers"
    )
    heads: list[Any] | None = setting(
        None, "query heads per layer, as fractions or numbers (whole KV groups); null: all, or what the width gives"
    )
    ffn: list[Any] = setting([1.0, 0.75, 0.5], "MLP units per layer, as fractions or numbers")
    depth: list[Any] = setting([1.0, 0.75, 0.5], "layers, as fractions or numbers; the least important are dropped")
    palette: list[SizeConfig] = setting(
        [],
        "sizes that will be shipped: [{ffn: 0.5, depth: 0.67}, ...]; the rest is whole (sampling.palette_share)",
    )
    exits: list[int] = setting([], "layers k whose first k layers at full width are members as well: early exits")
    depth_parts: int | None = setting(
        None, "equal runs of layers that lose layers in turn, so that stages stay equally deep; null: parallel.pp"
    )


@dataclass
class PhaseConfig:
    name: str = setting(MISSING, "name of the stage")
    axes: list[str] = setting([], "what may shrink: hidden, heads, ffn, depth; none: the full model alone (teacher)")
    steps: int = setting(MISSING, "optimizer steps", rule=at_least(1))
    lr: float | None = setting(None, "peak learning rate; null: optim.lr", rule=at_least(0))
    rank: int = setting(8, "rank r of the stage's low-rank factors; 0: whole matrices", rule=at_least(0))


@dataclass
class FactorsConfig:
    targets: list[str] = setting(
        ["attention", "mlp", "head"],
        "matrices that get factors: attention, mlp, embeddings, head (lm_head; behind an encoder)",
    )
    vectors: bool = setting(True, "train norms and biases as well")


@dataclass
class SamplingConfig:
    smallest: bool = setting(
        True,
        "the smallest subnet (of space.palette, where sizes are drawn from it) trains in every step, beside the full",
    )
    randoms: int = setting(2, "random subnets per step", rule=at_least(0))
    gamma: float = setting(
        0.5, "exponent of the gradient scaling (n_full / n_sub)^gamma; 0: plain mean; may be negative"
    )
    full_every: int = setting(
        1,
        "the full net trains in every N-th step only; 0: never, then the full model of a palette is the frozen teacher",
        rule=at_least(0),
    )
    palette_share: float = setting(
        0.8,
        "share of the random subnets that are sizes of space.palette, each as often as the others; the rest are any of "
        "the space",
        rule=Rule("must be in [0, 1]", lambda share: 0 <= share <= 1),
    )


@dataclass
class DistillConfig:
    teacher: str = setting(
        "frozen",
        "who teaches: the full model after the stages without axes, or the full model of the same step",
        rule=one_of("frozen", "live"),
    )
    kl_weight: float = setting(
        0.9,
        "weight of KL(teacher || subnet)",
        rule=Rule("must be in [0, 1]; the task's loss has the rest", lambda share: 0 <= share <= 1),
    )
    feature_weight: float = setting(
        0.1, "weight of the distance to the teacher's projected hidden states", rule=at_least(0)
    )
    feature_dim: int = setting(128, "dimension that hidden states are projected to", rule=at_least(1))
    temperature: float = setting(1.0, "temperature of both distributions in the KL term", rule=above(0))
    loss_chunk_tokens: int | None = setting(None, CHUNK, rule=at_least(1))
    cache: bool | None = setting(
        None,
        "compute the frozen teacher once per text and keep it in memory: its projected hidden states, logits of "
        "classes, and of a causal LM cache_samples random tokens per position (unbiased); null: for classes",
    )
    cache_gb: float = setting(
        4.0, "cache: memory of one rank for it; texts beyond that are computed each time", rule=above(0)
    )
    cache_samples: int = setting(
        64, "cache: tokens drawn of the teacher's distribution at each position (causal_lm)", rule=at_least(1)
    )


@dataclass
class ImportanceConfig:
    samples: int = setting(256, "sequences that the order of units is measured on", rule=at_least(1))
    batch_size: int = setting(8, "sequences per forward pass", rule=at_least(1))
    layers: str | None = setting(
        None,
        "what a layer is worth: divergence (causal_lm): KL from the full net's distribution to that without it, "
        "measured again after each drop; influence: how far it turns the residual stream; null: by task, classify: "
        "influence",
        rule=one_of("divergence", "influence"),
    )
    layer_samples: int = setting(
        8, "sequences of them that divergence is measured on: some hundred forwards", rule=at_least(1)
    )


@dataclass
class SupernetDataConfig(DataConfig):
    path: Any = setting(
        MISSING,
        "causal_lm: text, as for tune; classify: labelled .jsonl, .csv, .tsv or .parquet with the fields below",
        texts=True,
    )
    valid: Any = setting(None, "held-out data of the same form, for ee-scale palette", texts=True)
    licenses: list[str] = setting([], "licence of each path, for the model cards; []: not said")
    label_key: str = setting("label", "classify: field with the class")
    pair_key: str | None = setting(None, "classify: field with a second text (sentence pairs)")


@dataclass
class SupernetConfig:
    """Train a weight-sharing supernet on a frozen model in low-rank stages (MLFS): a palette of sizes."""

    out: str = setting("runs/supernet", "output folder of the run")
    task: str | None = setting(
        None, "null: by architecture, encoders: classify, the others: causal_lm", rule=one_of("causal_lm", "classify")
    )
    model: ModelConfig = field(default_factory=ModelConfig)
    space: SpaceConfig = field(default_factory=SpaceConfig)
    stages: list[PhaseConfig] = setting(
        [], "the recipe, stage after stage: [{name: , axes: [], steps: , lr: , rank: }, ...]; configs/recipe has some"
    )
    factors: FactorsConfig = field(default_factory=FactorsConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    importance: ImportanceConfig = field(default_factory=ImportanceConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: SupernetDataConfig = field(default_factory=SupernetDataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: BatchConfig = field(default_factory=BatchConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    launcher: LauncherConfig = field(default_factory=LauncherConfig)


@dataclass
class PaletteConfig:
    """Search a trained supernet for sizes that meet limits, cut them out, measure them, and recommend."""

    src: str = setting(MISSING, "output folder of a supernet run")
    out: str = setting(MISSING, "folder to write; must not exist")
    data: Any = setting(None, "held-out data; null: data.valid of the run", texts=True)
    count: int = setting(6, "sizes to cut out", rule=at_least(1))
    objective: str = setting(
        "params",
        "the cost that the sizes are spread over and must not dominate each other in",
        rule=one_of("params", "flops", "latency_ms", "memory_mb"),
    )
    max_params: float | None = setting(None, "largest number of parameters, embeddings included")
    max_flops: float | None = setting(None, "largest number of floating-point operations of one forward")
    max_latency_ms: float | None = setting(None, "longest forward of `tokens` tokens at batch 1, measured")
    max_memory_mb: float | None = setting(None, "largest peak memory that the model adds to a process, measured")
    method: str = setting(
        "auto",
        "how to search; auto: the sizes of space.palette where the run has them, else all members if few, else nsga2",
        rule=one_of("auto", "palette", "grid", "random", "nsga2"),
    )
    trials: int = setting(64, "subnets whose quality is evaluated", rule=at_least(1))
    samples: int = setting(512, "held-out sequences that quality is searched on; 0: all")
    batch_size: int = setting(16, "sequences per forward pass", rule=at_least(1))
    tokens: int = setting(128, "tokens of the measured forward", rule=at_least(1))
    new_tokens: int = setting(32, "tokens of the measured decoding (causal_lm)", rule=at_least(1))
    seconds: float = setting(2.0, "time for measuring each cut-out size")
    threads: int | None = setting(None, "CPU threads while measuring; null: torch's default")
    onnx: bool = setting(False, "write each size as ONNX as well, fp32 and int8, and measure it in onnxruntime")
    polish: int = setting(
        0,
        "steps of training for each size alone, with a low-rank pair of its own that is then merged",
        rule=at_least(0),
    )
    audit: bool = setting(
        False, "let each size and the teacher go on from training text, and count what comes back verbatim (causal_lm)"
    )
    audit_samples: int = setting(64, "audit: texts that each of them writes", rule=at_least(1))
    drafts: bool = setting(
        False,
        "try each size as draft model of the larger ones: acceptance, number of drafts, speed-up, command (causal_lm)",
    )
    drafts_samples: int = setting(32, "drafts: texts that each larger size writes", rule=at_least(1))
    step: int | None = setting(None, "checkpoint to cut from; null: the last one")
    seed: int = setting(0, "search, and which held-out text is read")
    cache_dir: str | None = setting(None, "tokenised data; null: ~/.cache/ee_scale/data")
    device: str = setting("auto", "where to evaluate and measure", rule=one_of("auto", "cpu", "cuda"))
