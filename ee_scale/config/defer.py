"""Settings of `ee-scale defer`."""

from dataclasses import dataclass, field

from omegaconf import MISSING

from ee_scale.config.groups import AMOUNT, ERRORS, SHARE, Choices, at_least, number_type, one_of, setting

AGREEMENT = "agreement"  # of a model's exits with its final layer
SEQUENCE_SCORES = ("margin", "min_margin", "probability", "min_probability", AGREEMENT)
QUALITIES = ("exact", "contains", "agreement")


@dataclass
class LinkConfig:
    ms: float = setting(50.0, "time that a call of the large model spends on the way, ms", rule=AMOUNT)
    cost: float = setting(0.0, "price of a call of the large model, in any currency", rule=AMOUNT)


@dataclass
class DeferConfig:
    """When a small model's answer is kept, and when a larger model is asked: a limit that holds a bound on the loss."""

    small: str = setting(MISSING, "model that answers first: a folder, with exits or without")
    data: str = setting(
        MISSING, "records (.jsonl, .csv, .parquet): a prompt with its reference answer, or a text with its label"
    )
    large: str | None = setting(None, "model that is asked where the small one is unsure: a folder")
    large_key: str | None = setting(None, "instead of large: field of a record that holds the large model's answer")
    task: str = setting(
        "generate", "what both do: continue prompts, or name the class of texts", rule=one_of("generate", "classify")
    )
    quality: str = setting(
        "exact",
        "what a good answer is: the reference, one that contains it, or (agreement) the large model's own; case and "
        "white space do not count",
        rule=Choices(QUALITIES),
    )
    loss: float = setting(0.02, "how much quality may be lost against always asking the large model", rule=SHARE)
    confidence: float = setting(0.95, "chance, over the choice of the records, that the bound holds", rule=SHARE)
    score: str = setting(
        "margin",
        "what tells how sure the small model is: mean or smallest distance between the two highest probabilities, mean "
        "or smallest highest probability of its tokens, or how often its exits say the same",
        rule=Choices(SEQUENCE_SCORES),
    )
    prompt_key: str | None = setting(None, "field of the prompt; null: 'prompt' ('text' of task=classify)")
    reference_key: str | None = setting(
        None, "field of the reference, a text or a list of right ones; null: 'reference' ('label' of task=classify)"
    )
    pair_key: str | None = setting(None, "classify: field of the second text of tasks on two")
    tag_key: str | None = setting(None, "field that names the group of a record (task, customer): limits per group too")
    chat: bool = setting(False, "put prompts into the tokenizers' chat templates, as a user's message")
    max_new_tokens: int = setting(64, "tokens of an answer at most", rule=at_least(1))
    seq_length: int = setting(128, "classify: tokens that are read of a text", rule=at_least(1))
    batch_size: int = setting(8, "records that are answered together", rule=at_least(1))
    link: LinkConfig = field(default_factory=LinkConfig)
    small_ms: float | None = setting(None, "time of a small model's answer, ms; null: as measured here", rule=AMOUNT)
    large_ms: float | None = setting(
        None, "time of a large model's answer without the link, ms; null: as measured here", rule=AMOUNT
    )
    out: str = setting(MISSING, "folder for deferral.json and deferral.png; must not exist")
    seed: int = setting(0, "which records fit the map, which test the limit and which check it")
    errors: str = setting("strict", ERRORS, rule=one_of("strict", "replace"))
    device: str = setting("auto", "where to run", rule=one_of("auto", "cpu", "cuda"))
    dtype: str = number_type()
