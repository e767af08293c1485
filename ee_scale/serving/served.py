"""The model that is served, and what becomes of a request: prompts, settings and exit policy, all of them checked."""

import time
from dataclasses import dataclass
from math import isfinite
from random import SystemRandom

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from ee_scale.backbone.model_folder import ModelFolder
from ee_scale.backbone.proof import check_decoding_proof
from ee_scale.config.serve import ServeConfig
from ee_scale.data.encode import token_with_row, without_row
from ee_scale.data.inputs import load_tokenizer
from ee_scale.errors import one_line
from ee_scale.exits.placement import exit_spec
from ee_scale.inference.model import open_model, untrained_exits
from ee_scale.inference.number_type import fastest_dtype
from ee_scale.inference.pipeline_rows import row_seed
from ee_scale.inference.request import plain_words, policy_options
from ee_scale.inference.run import DTYPES
from ee_scale.inference.settings import check_settings, end_marks
from ee_scale.modeling.heads import ExitSpec, ModelWithExits
from ee_scale.modeling.layer_runner import check_model
from ee_scale.modeling.policies import NEVER, SCORES, ExitPolicy, resolve_policy
from ee_scale.modeling.policy_names import SCORED
from ee_scale.serving.bodies import COLDEST, Body, ChatBody, CompletionBody
from ee_scale.serving.call import Call, Row
from ee_scale.serving.deferral import Deferral
from ee_scale.serving.errors import ApiError

SAME_TEXT = ("off", "lossless")  # policies that change no token
# Of the operator's options, those that hold whatever policy a request names.
GENERAL = ("min_layer", "max_pending")
LOSSLESS = ("shortlist", "draft_weights", "draft_sources")


@dataclass
class Served:
    """A model folder that was checked, and the operator's settings.

    Attributes:
        spec: its exits; of a model without any, of no layers.
        ends: tokens that end a text.
        deferral: what settles answers, where a larger model may be asked.
    """

    config: ServeConfig
    folder: ModelFolder
    tokenizer: PreTrainedTokenizerBase
    spec: ExitSpec
    generation_config: GenerationConfig
    calibration: dict[str, object] | None
    ends: frozenset[int]
    name: str
    started: int
    deferral: Deferral | None = None

    @classmethod
    def find(cls, config: ServeConfig) -> "Served":
        """Everything that can be known without the weights' numbers. Raises `UserError`."""
        folder = ModelFolder.named(config.model).checked()
        check_decoding_proof(folder.config)
        settings = folder.generation_config()
        check_settings(settings, own_loop=True)
        spec = folder.exits or exit_spec(folder.config, (), "norm", "full", 1)
        name = config.name or folder.path.resolve().name
        ends, tokenizer = frozenset(end_marks(settings)), load_tokenizer(folder.base, "model")
        found = cls(config, folder, tokenizer, spec, settings, folder.calibration(), ends, name, int(time.time()))
        with plain_words():
            found.policy(config.policy, found.operator_options(config.policy), None)
        found.deferral = Deferral.find(config, folder)
        return found

    def open(self, device: torch.device) -> ModelWithExits:
        """The model, ready to decode. Raises `UserError`."""
        config, folder = self.config, self.folder
        dtype = DTYPES.get(config.dtype) or fastest_dtype(folder.config, device, config.pack_weights)
        if folder.exits is None:
            model = untrained_exits(folder.base, self.spec, dtype=dtype)
        else:
            model = open_model(folder.path, dtype=dtype)
        model = model.to(device).eval()
        with plain_words():
            check_model(model)
        if self.deferral is not None:
            self.deferral.check_dtype(model)
        return model

    @property
    def context(self) -> int:
        """Most tokens of a prompt and its answer."""
        return self.folder.config.max_position_embeddings

    @property
    def policies(self) -> tuple[str, ...]:
        """What requests may name."""
        asked = self.config.policies
        return tuple(dict.fromkeys((self.config.policy, *(SAME_TEXT if asked is None else asked))))

    @property
    def settings(self) -> dict[str, object]:
        """Of `generate`, for all rows."""
        words = self.folder.config.vocab_size
        return {
            "tokenizer": self.tokenizer,
            "pad_token_id": token_with_row(words, self.tokenizer.pad_token_id, *sorted(self.ends)),
        }

    def card(self) -> dict[str, object]:
        """The model as /v1/models tells of it."""
        return {
            "id": self.name,
            "object": "model",
            "created": self.started,
            "owned_by": "ee-scale",
            "deferral": None if self.deferral is None else self.deferral.card(),
            "max_model_len": self.context,
            "num_layers": self.folder.config.num_hidden_layers,
            "exit_layers": list(self.spec.layers),
            "exit_policy": self.config.policy,
            "exit_policies": list(self.policies),
            "calibration": self._evidence(),
            "follow": self.config.follow,
        }

    def _evidence(self) -> dict[str, object] | None:
        """Calibrated limits, and what was promised of them."""
        if self.calibration is None:
            return None
        promised = {name: self.calibration.get(name) for name in ("agreement", "confidence")}
        numbers = {name: value for name, value in promised.items() if isinstance(value, float) and isfinite(value)}
        return {"policy": self.calibration["policy"], "thresholds": self.calibration["thresholds"], **numbers}

    # -- requests --------------------------------------------------------------------------------------------------

    def call(self, body: CompletionBody | ChatBody) -> Call:
        """A checked request. Raises `ApiError`."""
        if body.model != self.name:
            raise ApiError(404, f"model={body.model!r}: this server has {self.name!r}", "model", "model_not_found")
        prompts = [self._chat(body)] if isinstance(body, ChatBody) else [self._ids(item) for item in body.prompts]
        if len(prompts) * body.n > max(self.config.rows, 1) + self.config.max_waiting:
            raise ApiError(400, f"n={body.n}: {len(prompts)} x {body.n} answers are more than fit into the queue", "n")
        if 0 < body.temperature < COLDEST:
            raise ApiError(400, f"temperature={body.temperature}: give 0, or {COLDEST} to 2", "temperature")
        options, threshold = self.exit_options(body)
        samples = body.temperature > 0
        if samples and body.seed is not None and options["exit_policy"] == "lossless":
            raise ApiError(400, f"seed={body.seed}: lossless draws for all rows together; leave one out", "seed")
        seed = SystemRandom().getrandbits(63) if body.seed is None else body.seed
        rows: list[Row] = []
        for prompt in prompts:
            settings = self._sampling(body) | {"max_new_tokens": self._room(body, len(prompt))}
            for _ in range(body.n):
                row = Row(len(rows), prompt, settings, self.tokenizer, body.stops, self.ends)
                row.queued.seed = row_seed(seed, len(rows))
                row.queued.threshold, row.queued.tag, row.queued.best = threshold, body.exit_tag, body.ranked
                rows.append(row)
        # Lossless rows of one queue are all sampled, or none is.
        kind = f"{options} {samples if options['exit_policy'] == 'lossless' else ''}"
        call = Call(rows, options, kind, sum(map(len, prompts)), time.monotonic() + self.config.max_seconds)
        call.scored = None if self.deferral is None else self.deferral.rule.score
        return call

    def _sampling(self, body: Body) -> dict[str, object]:
        """Settings of `generate`. What the request leaves out is as the model's generation config says; where that is
        silent too, transformers would take the 50 most likely tokens: here all are drawn from."""
        if body.temperature == 0:
            return {"do_sample": False}
        top_k = body.top_k or self.generation_config.top_k or 0
        chosen: dict[str, object] = {"do_sample": True, "temperature": body.temperature, "top_k": top_k}
        return chosen if body.top_p is None else chosen | {"top_p": body.top_p}

    def _room(self, body: Body, prompt: int) -> int:
        """New tokens that an answer may have."""
        config, asked = self.config, body.most_tokens
        if prompt > (most := min(config.max_prompt_tokens or self.context, self.context - 1)):
            raise ApiError(400, f"the prompt has {prompt} tokens, of at most {most}", None, "context_length_exceeded")
        if asked is None:
            return min(config.max_new_tokens, self.context - prompt)
        if asked > config.max_new_tokens:
            raise ApiError(400, f"max_tokens={asked}: at most {config.max_new_tokens}", "max_tokens")
        if prompt + asked > self.context:
            words = f"with the {prompt} tokens of the prompt above the model's context of {self.context}"
            raise ApiError(400, f"max_tokens={asked}: {words}", "max_tokens", "context_length_exceeded")
        return asked

    def _ids(self, prompt: str | list[int]) -> list[int]:
        ids = self.tokenizer(prompt, verbose=False)["input_ids"] if isinstance(prompt, str) else prompt
        return self._checked(ids, "prompt")

    def _chat(self, body: ChatBody) -> list[int]:
        if not getattr(self.tokenizer, "chat_template", None):
            raise ApiError(400, f"messages: {self.name} has no chat template; use /v1/completions", "messages")
        try:
            found = self.tokenizer.apply_chat_template(body.turns, add_generation_prompt=True, return_dict=True)
        except Exception as error:  # whatever a template says of the roles
            raise ApiError(400, f"messages: the chat template refuses them ({one_line(error)})", "messages") from error
        return self._checked(found["input_ids"], "messages")  # type: ignore[arg-type,call-overload,index]

    def _checked(self, ids: list[int], field: str) -> list[int]:
        words = self.folder.config.vocab_size
        if not ids:
            raise ApiError(400, f"{field}: the tokenizer makes no token of it", field)
        if max(ids) >= words:
            raise ApiError(400, f"{field}: {without_row(self.tokenizer, max(ids), words)}", field)
        return ids

    # -- exits -----------------------------------------------------------------------------------------------------

    def operator_options(self, policy: str) -> dict[str, object]:
        """What the operator set that holds for a policy."""
        given, drafts = policy_options(self.config), policy == "lossless"
        if policy != self.config.policy:
            given = {name: given[name] for name in (*GENERAL, *(LOSSLESS if drafts else ())) if name in given}
        elif not drafts and "lossless" in self.policies:  # for requests that name it
            given = {name: value for name, value in given.items() if name not in LOSSLESS}
        return {"draft_sources": "prompt"} | given if drafts and not self.spec.layers else given

    def policy(self, name: str, options: dict[str, object], tag: str | None) -> ExitPolicy:
        """Checked. Raises ValueError."""
        return resolve_policy(
            name,
            self.spec.layers,
            calibration=self.calibration,
            tags=None if tag is None else [tag],
            batch_size=1,
            vocab_size=self.folder.config.vocab_size,
            head_tokens=self.spec.shortlist_ids,
            **options,  # type: ignore[arg-type]
        )

    def exit_options(self, body: Body) -> tuple[dict[str, object], dict[int | str, float] | None]:
        """(the `exit_*` options of the queue that a request's rows go to, their own limits by layer).

        Raises `ApiError` for what does not fit the model, and what the operator does not allow.
        """
        name = body.exit_policy or self.config.policy
        if name not in self.policies:
            raise ApiError(400, f"exit_policy={name}: this server allows {', '.join(self.policies)}", "exit_policy")
        fields = ("threshold", "layer", "min_layer", "patience", "draft_length")
        asked = {field: value for field in fields if (value := getattr(body, f"exit_{field}")) is not None}
        options = self.operator_options(name)
        if name == "patience":
            options |= {"patience": self.config.patience or 2}
        for field in ("min_layer", "patience"):
            value, bound = asked.get(field), options.get(field)
            if isinstance(value, int) and isinstance(bound, int) and value < bound:
                raise ApiError(400, f"exit_{field}={value}: this server's least is {bound}", f"exit_{field}")
        options |= asked
        try:
            policy = self.policy(name, options, body.exit_tag)
        except ValueError as error:
            raise ApiError(400, one_line(error)) from error
        self._check_bounds(policy, asked)
        queue = {f"exit_{key}": value for key, value in options.items()} | {"exit_policy": name}
        if name not in NEVER:
            return queue, None
        # The queue asks the exits that these rows may leave at; each row brings its limits.
        queue |= {"exit_threshold": {k: _loosest(name) for k in policy.layers}}
        limits: dict[int | str, float] = dict(zip(policy.layers, policy.limits[0], strict=True))
        return queue, limits

    def _check_bounds(self, policy: ExitPolicy, asked: dict[str, object]) -> None:
        loosest = self.config.loosest
        if "threshold" not in asked or loosest is None:
            return
        for limit in policy.limits[0]:
            if limit > loosest if SCORES[policy.name].low else limit < loosest:
                raise ApiError(400, f"exit_threshold={limit}: looser than this server's {loosest}", "exit_threshold")


def _loosest(policy: str) -> float:
    """A limit that every score passes."""
    assert policy in SCORED
    return 1e30 if SCORES[policy].low else 0.0
