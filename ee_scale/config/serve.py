"""Settings of `ee-scale serve`: what it answers with, and the bounds that its operator sets to requests."""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from ee_scale.config.groups import (
    AMOUNT,
    PART,
    Choices,
    Rule,
    above,
    at_least,
    followed_share,
    number_type,
    one_of,
    setting,
)
from ee_scale.modeling.policy_names import DRAFT_WEIGHTS, POLICIES

POLICY_NAMES = Rule(
    f"a list of {', '.join(POLICIES)}", lambda names: isinstance(names, list | tuple) and set(names) <= set(POLICIES)
)
PORT = Rule("must be 0 to 65535", lambda port: 0 <= port <= 65535)


@dataclass
class AskingConfig:
    seconds: float = setting(
        30.0, "most seconds that an answer waits for the upstream; then the small one is given", rule=above(0)
    )
    audit: float = setting(
        0.0, "share of the kept greedy answers whose prompt is sent upstream too, to be compared", rule=PART
    )
    redact: str | None = setting(
        None, "package.module:function that gets the messages of a request and returns those that may leave; null: all"
    )
    log_text: bool = setting(False, "put prompts and answers into the decision log")


@dataclass
class ServeConfig:
    """Answer OpenAI's API on one machine, exits per request; for more machines give vLLM or SGLang a drafter."""

    model: str = setting(MISSING, "folder written by export, of either kind, or a model without exits")
    name: str | None = setting(None, "what requests call the model; null: the folder's name")
    host: str = setting("127.0.0.1", "address to listen on; other machines reach 0.0.0.0")
    port: int = setting(8000, "port to listen on; 0: any that is free", rule=PORT)
    api_key: str | None = setting(
        None, "what requests must carry as bearer token; null: that of the variable EE_SCALE_API_KEY, or none"
    )
    rows: int = setting(8, "answers that are written at the same time", rule=at_least(1))
    max_waiting: int = setting(64, "answers that may wait for a row; beyond that requests get 429", rule=at_least(0))
    max_new_tokens: int = setting(
        1024, "most tokens of an answer, and of those whose request names no number", rule=at_least(1)
    )
    max_prompt_tokens: int | None = setting(
        None, "most tokens of a prompt; null: what the model's context holds", rule=at_least(1)
    )
    max_body_bytes: int = setting(2_000_000, "most bytes of a request", rule=at_least(1))
    max_seconds: float = setting(600.0, "most seconds from a request to the end of its answer", rule=above(0))
    policy: str = setting("off", "exit policy of requests that name none, as of generate", rule=Choices(POLICIES))
    policies: Any = setting(
        None,
        "policies that requests may name; null: this one, off and lossless, which change no token",
        rule=POLICY_NAMES,
    )
    threshold: Any = setting(None, "limit of the policy's score: a number, or one per exit; null: as calibrated")
    loosest: float | None = setting(
        None,
        "no request may give a looser limit: a lower one of threshold and margin, a higher one of entropy",
        rule=AMOUNT,
    )
    layer: int | None = setting(None, "the exit of fixed; the drafting exit of lossless (null: by measured cost)")
    min_layer: int | None = setting(None, "no token of any request leaves before this layer")
    patience: int | None = setting(None, "exits in a row that must agree; null: 2. Requests may ask for more")
    max_pending: int | None = setting(None, "tokens whose deeper layers may wait to be computed; null: 8")
    draft_length: int | None = setting(None, "lossless: tokens per draft; null: by measured cost")
    shortlist: Any = setting(None, "lossless: draft among the N most frequent tokens (as calibrated), or token ids")
    draft_weights: str | None = setting(
        None, "lossless: what the early layers are that draft; null: model", rule=Choices(DRAFT_WEIGHTS)
    )
    draft_sources: Any = setting(
        None, "lossless: what drafts: exits, prompt (the text itself), or a list; null: both that the model has"
    )
    deferral: str | None = setting(
        None, "deferral.json that `ee-scale defer` wrote for this model: below its limit the upstream is asked"
    )
    upstream: str | None = setting(
        None,
        "server with OpenAI's API that is asked then (http://host:port/v1); its key is that of the variable "
        "EE_SCALE_UPSTREAM_KEY and no setting, so that nothing shows it",
    )
    upstream_model: str | None = setting(None, "what the upstream calls its model")
    defer: AskingConfig = field(default_factory=AskingConfig)
    log: str | None = setting(None, "decision log to append to (.jsonl), for `ee-scale report`")
    audit: float = setting(
        0.0,
        "share of early tokens that are compared with the full model, for the log and for exit_agreement in /metrics",
        rule=PART,
    )
    follow: float | None = followed_share()
    levels: str | None = setting(
        None, "file (.json) in which the levels of `follow` survive a restart; null: they begin anew"
    )
    device: str = setting("auto", "where to run", rule=one_of("auto", "cpu", "cuda"))
    dtype: str = number_type()
    pack_weights: bool = setting(True, "on a CPU: pack linear layers for oneDNN, where a few rows then cost like one")
