"""Settings that several commands share."""

from collections.abc import Callable, Collection
from copy import copy
from dataclasses import dataclass, field
from math import inf
from typing import Any, ClassVar, Protocol, TypeVar

from omegaconf import MISSING

T = TypeVar("T")
# Help lines of settings that several commands have.
TEXT_KEY = "field of a record that holds the text, or the conversation; without it: messages, or prompt and completion"
LIGER = "liger"
CHUNK = (
    "tokens whose logits exist at the same time; null: 1024 on a CPU, on a GPU as many as have 2^28 logits (at least "
    "1024)"
)
ERRORS = "bytes that are no UTF-8 text, and NUL: strict refuses them by file, line and byte; replace puts U+FFFD there"


class Settings(Protocol):
    """A dataclass: the config of a command, or a group in it."""

    __dataclass_fields__: ClassVar[dict[str, Any]]


@dataclass(frozen=True)
class Rule:
    """What a value of a field must be (null is always allowed where it is the default): in words, and as a test."""

    words: str
    holds: Callable[[Any], bool]


def at_least(least: float) -> Rule:
    """A number from there on."""
    return Rule(f"must be at least {least}", lambda value: value >= least)


def above(bound: float) -> Rule:
    """A greater number."""
    return Rule(f"must be above {bound}", lambda value: value > bound)


SHARE = Rule("must be between 0 and 1", lambda value: 0 < value < 1)
PART = Rule("give a share between 0 and 1", lambda value: 0 <= value <= 1)
AMOUNT = Rule("must be 0 or above", lambda value: 0 <= value < inf)


@dataclass(frozen=True)
class Choices:
    """One of these words; what is added to them later counts too."""

    choices: Collection[str]

    @property
    def words(self) -> str:
        return f"choose one of {', '.join(self.choices)}"

    def holds(self, value: object) -> bool:
        return value in self.choices


def one_of(*choices: str) -> Choices:
    """One of these words."""
    return Choices(choices)


def setting(default: T, text: str, **metadata: object) -> T:
    """A dataclass field with a help line; lists and dicts become default factories.

    metadata: `rule` of its value; `written`: its name on the command line where that is a word of Python; `texts`:
    True for one text or a list of them, "prose" for texts in which quotes and `null` are words like others.
    """
    metadata["help"] = text
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: copy(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def followed_share() -> float | None:
    """The setting `follow` of what decodes."""
    return setting(
        None,
        "smallest share of tokens that are the full model's: audited tokens raise the limits of their tag where exits "
        "no longer agree, down to no exit at all (needs audit; threshold, entropy, margin); null: limits stay",
        rule=SHARE,
    )


def number_type() -> str:
    """The setting `dtype` of what decodes."""
    return setting(
        "auto",
        "number type; auto: as stored, or fp32 where a CPU is measured to be faster in it",
        rule=one_of("auto", "fp32", "bf16", "fp16"),
    )


@dataclass
class ModelConfig:
    path: str = setting(
        MISSING, "Hugging Face folder, GGUF file, or 'tiny' for a random 4-layer model built on the spot"
    )
    attn_implementation: str | None = setting(
        None, "attention kernel: eager, sdpa, flash_attention_2, ...; null takes the default of transformers"
    )


@dataclass
class ParallelConfig:
    tp: int = setting(1, "tensor-parallel size", rule=at_least(1))
    pp: int = setting(
        1, "pipeline stages of the whole model; stages after the deepest exit are never launched", rule=at_least(1)
    )
    dp: int = setting(1, "data-parallel size (replicas)", rule=at_least(1))
    stages: list[int] | None = setting(None, "layers per stage, e.g. [4,4,2,2]; null balances stages by cost")
    device: str = setting("auto", "where to run", rule=one_of("auto", "cpu", "cuda"))
    timeout_minutes: float = setting(30.0, "how long a rank waits for the others before it gives up", rule=above(0))
    device_memory_gb: float | None = setting(
        None,
        "memory of one device, for ee-scale check on a machine without it; null: this machine's",
        rule=above(0),
    )


@dataclass
class DataConfig:
    path: Any = setting(
        MISSING,
        "text or conversations: .txt, .jsonl, .csv, .parquet (also .gz, .zst), folder, Megatron prefix (without "
        ".bin/.idx), a list of those, or 'python'",
        texts=True,
    )
    weights: list[float] | None = setting(None, "sampling weight of each path of a list; null: by size")
    seq_length: int = setting(512, "tokens per training sequence", rule=at_least(1))
    text_key: str = setting("text", TEXT_KEY)
    errors: str = setting("strict", ERRORS, rule=one_of("strict", "replace"))
    cache_dir: str | None = setting(None, "tokenised data; null: ~/.cache/ee_scale/data")
    seed: int = setting(1234, "order of the training sequences")
    sequences: int | None = setting(
        None,
        "distinct training sequences; when they are through they come again, in another order (epochs); null: as many "
        "as the run reads",
        rule=at_least(1),
    )
    own_text: float = setting(
        0.0,
        "tune: share of the training sequences that the model has written itself: continuations of the corpus, half "
        "greedy and half sampled, written once and kept in cache_dir",
        rule=Rule("must be at least 0 and below 1", lambda share: 0 <= share < 1),
    )
    own_text_tokens: int | None = setting(
        None, "tune: tokens that the model writes; null: as many as the run reads of them", rule=at_least(1)
    )
    own_text_prompt: int = setting(32, "tune: tokens of the corpus in front of each continuation", rule=at_least(1))
    cache_taps: bool = setting(
        False,
        "tune: keep on disk, in cache_dir, what exits read of the frozen backbone; later epochs and other runs read it "
        "and do not compute the backbone again",
    )
    num_workers: int = setting(0, "loader processes per rank", rule=at_least(0))


@dataclass
class OptimConfig:
    lr: float = setting(1e-4, "peak learning rate", rule=at_least(0))
    min_lr: float = setting(1e-5, "learning rate at the last step", rule=at_least(0))
    betas: list[float] = setting(
        [0.9, 0.95],
        "AdamW betas",
        rule=Rule("two numbers in [0, 1)", lambda betas: len(betas) == 2 and all(0 <= beta < 1 for beta in betas)),
    )
    eps: float = setting(1e-5, "AdamW epsilon")
    weight_decay: float = setting(0.01, "AdamW weight decay (not on norms and biases)", rule=at_least(0))
    clip_grad: float = setting(1.0, "largest gradient norm of one exit; 0: no clipping", rule=at_least(0))
    warmup_fraction: float = setting(
        0.01,
        "share of the steps that warms the learning rate up",
        rule=Rule("must be in [0, 1)", lambda share: 0 <= share < 1),
    )
    decay: str = setting(
        "linear", "shape of the decay after warm-up", rule=one_of("linear", "cosine", "constant", "inverse-square-root")
    )


@dataclass
class LoggingConfig:
    every: int = setting(10, "steps between progress lines (metrics.jsonl has every step)", rule=at_least(1))
    progress: bool = setting(True, "progress bar on a terminal")
    level: str = setting("info", "log level", rule=one_of("debug", "info", "warning", "error"))
    wandb: str = setting("disabled", "Weights & Biases mode", rule=one_of("disabled", "offline", "online"))
    wandb_project: str = setting("ee_scale", "wandb project")
    wandb_name: str | None = setting(None, "wandb run name; null: name of the output folder")
    wandb_group: str | None = setting(None, "wandb group that the runs of a sweep share; null: none")
    peak_tflops: float | None = setting(
        None,
        "peak of one device for MFU; null: the data sheet's for known GPUs, measured once on a CPU",
        rule=above(0),
    )
    trace_after: int = setting(3, "ee-scale trace: steps before the window that is recorded", rule=at_least(0))
    trace_steps: int = setting(2, "ee-scale trace: steps that are recorded", rule=at_least(1))


@dataclass
class LauncherConfig:
    kind: str = setting(
        "local",
        "how `ee-scale launch` starts the ranks: on this machine, by torchrun on several, or as a SLURM job",
        rule=one_of("local", "torchrun", "slurm"),
    )
    nodes: int = setting(1, "machines", rule=at_least(1))
    processes_per_node: int | None = setting(None, "ranks (GPUs) per machine; null: the grid's size / nodes")
    head: str | None = setting(None, "torchrun: host name of the first machine; slurm finds it itself")
    port: int | None = setting(
        None,
        "rendezvous port; null: derived from the job id, or free on one machine",
        rule=Rule("give one of 1024 to 65535", lambda port: 1024 <= port <= 65535),
    )
    max_restarts: int = setting(0, "times that torchrun starts all ranks again after one died", rule=at_least(0))
    partition: str | None = setting(None, "slurm: partition")
    account: str | None = setting(None, "slurm: account")
    time: str = setting("24:00:00", "slurm: time limit of one attempt")
    signal_seconds: int = setting(
        180, "slurm: seconds before the limit at which ranks are told to save and leave", rule=at_least(1)
    )
    setup: list[str] = setting([], "slurm, torchrun: shell lines before the start (modules, environment)")
    sbatch: list[str] = setting([], "slurm: more #SBATCH options, without the leading --")
    dry_run: bool = setting(False, "print the exact script and stop (--dry-run)")


@dataclass
class BatchConfig:
    micro_batch_size: int = setting(4, "sequences per rank and micro-batch", rule=at_least(1))
    global_batch_size: int = setting(
        16, "sequences per optimizer step, over all replicas and micro-batches", rule=at_least(1)
    )
    loss_kernel: str = setting(
        "torch",
        "what computes cross entropies: torch, or the kernel of liger-kernel (GPUs, parallel.tp=1; reported losses of "
        "tokens are rounded to bf16)",
        rule=one_of("torch", LIGER),
    )
    precision: str = setting("auto", "auto: bf16 on GPU, fp32 on CPU", rule=one_of("auto", "fp32", "bf16"))
    save_every: int = setting(
        500, "steps between checkpoints; the last step (of every stage) is always saved", rule=at_least(1)
    )
    keep: int = setting(2, "checkpoints to keep", rule=at_least(1))
    resume: str = setting(
        "auto", "continue the run found in out, or refuse a folder that has one", rule=one_of("auto", "never")
    )
    seed: int = setting(1234, "random start of what is trained, and which subnets are drawn")
    verify_frozen: bool = setting(True, "check that what is frozen has the same digest before and after")
    async_save: bool = setting(True, "write checkpoints in the background while training goes on")
    spike_factor: float = setting(
        10.0,
        "leave out an update whose loss is above this many times its running mean; 0: only non-finite ones",
        rule=at_least(0),
    )
    max_skipped: int = setting(10, "stop after this many updates in a row that were left out", rule=at_least(1))
