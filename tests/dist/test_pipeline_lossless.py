"""Lossless decoding over stages and tensor ranks says what transformers' own loop says, whatever exits propose."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import nan
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from helpers.models import VOCAB, load_whole
from helpers.pipeline import export_noisy_exits, prompts
from helpers.spawn import spawn
from torch import nn

from ee_scale.backbone.model_folder import ModelFolder
from ee_scale.errors import UserError
from ee_scale.grid import Layout, join_grid, leave_grid
from ee_scale.inference.model import EarlyExitForCausalLM
from ee_scale.inference.pipeline import Decoded, PipelineDecoder
from ee_scale.inference.pipeline_messages import Decision
from ee_scale.inference.pipeline_model import load_decoding_stage, plan_decoding
from ee_scale.inference.pipeline_rows import Draft, Row, RowMaker, row_seed
from ee_scale.modeling.policies import resolve_policy

LAYERS = 5
EXITS = (1, 2, 4)
NEW = 12  # more than the sliding window of 8
SEED = 7
MODELS = {  # family -> kind, head
    "llama": ("mlp", "low_rank"),
    "mistral": ("layer", "full"),
    "gemma2": ("mlp", "full"),
    "qwen2": ("norm", "shortlist"),
}
GRIDS = {2: (Layout(pp=2),), 4: (Layout(pp=4), Layout(tp=2, pp=2))}
CUTS = {2: [3, 2], 4: [1, 2, 1, 1]}
DRAFTS_FROM = {2: 2, 4: 1}  # the deepest exit of the first stage, by the number of stages
SAMPLING = {"do_sample": True, "temperature": 0.8, "top_k": 20}


@dataclass(frozen=True)
class Case:
    """One batch: the first `rows` prompts, the policy's arguments, settings of `generate`, and what the exit proposes.

    drafts: `natural`; or scripted: `none` is right, `mixed`, `all`.
    """

    family: str = "llama"
    rows: int = 3
    policy: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    drafts: str = "natural"


CASES = {
    "alone": Case(rows=1),
    "alone-mistral": Case("mistral", rows=1, policy={"draft_length": 2}),
    "batch": Case(),
    "none": Case(policy={"draft_length": 3}, drafts="none"),
    "mixed": Case(policy={"draft_length": 3}, drafts="mixed"),
    "mixed-mistral": Case("mistral", policy={"draft_length": 3}, drafts="mixed"),
    "mixed-gemma2": Case("gemma2", rows=1, policy={"draft_length": 3}, drafts="mixed"),
    "mixed-qwen2": Case("qwen2", rows=1, policy={"draft_length": 3}, drafts="mixed"),
    "all": Case(policy={"draft_length": 3}, drafts="all"),
    "all-mistral": Case("mistral", rows=1, drafts="all"),
    "no drafts": Case(rows=1, policy={"draft_length": 0}),
    "deeper exit": Case("mistral", rows=2, policy={"layer": 2, "draft_length": 2}, drafts="mixed"),
    "one token": Case(settings={"max_new_tokens": 1}),
    "eos": Case(rows=2, policy={"draft_length": 3}, settings={"eos_token_id": None}, drafts="mixed"),
    "processors": Case(
        rows=2, policy={"draft_length": 2}, settings={"repetition_penalty": 1.8, "no_repeat_ngram_size": 2}
    ),
    "sampled": Case(rows=2, policy={"draft_length": 2}, settings=SAMPLING),
    "sampled-alone": Case(rows=1, settings=SAMPLING),
    "sampled-deeper": Case("mistral", rows=2, policy={"layer": 2, "draft_length": 2}, settings=SAMPLING),
}
TOLD: dict[tuple[str, str, str], list[list[int]]] = {}  # by transformers, once for each setting
# All cases run where layers are cut both ways. Four stages have exits at every cut and more tokens in flight; of two
# stages without tensor ranks only the missing group is new.
ALONE = {
    Layout(pp=4): ("alone", "alone-mistral", "mixed", "all", "deeper exit", "eos", "sampled", "sampled-deeper"),
    Layout(pp=2): ("alone", "mixed-gemma2", "sampled-alone"),
}
GREEDY = [name for name, case in CASES.items() if not case.settings.get("do_sample")]


def runs_on(layout: Layout) -> tuple[str, ...]:
    """The cases of a grid."""
    return ALONE.get(layout, tuple(CASES))


def settings(case: Case, root: Path) -> dict[str, Any]:
    """The end mark of a case is a token that the second row would say in the middle."""
    given = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": -1, **case.settings}
    if given["eos_token_id"] is None:
        given["eos_token_id"] = truth(root, case.family)[1][NEW // 2]
    return given


def truth(root: Path, family: str) -> list[list[int]]:
    return torch.load(root / family / "truth.pt")


def greedy(root: Path, family: str, **given: Any) -> list[list[int]]:
    """transformers' own loop, row by row."""
    key = str(root), family, repr(given)
    if key in TOLD:
        return TOLD[key]
    model, texts = load_whole(root / "base" / family), TOLD.setdefault(key, [])
    for prompt in prompts():
        ids = torch.tensor([prompt])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), **{"do_sample": False, **given})
        texts.append(out[0, len(prompt) :].tolist())
    return texts


def _calm(whole: nn.Module) -> None:
    for layer in whole.model.layers[1:]:
        layer.self_attn.o_proj.weight.mul_(0.35)
        layer.mlp.down_proj.weight.mul_(0.35)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models whose late layers add little, so that exits agree with the final layer now and then."""
    root = tmp_path_factory.mktemp("models")
    for family, (kind, head) in MODELS.items():
        export_noisy_exits(root, family, EXITS, kind, head, 0.02, _calm)
        torch.save(greedy(root, family, max_new_tokens=NEW, eos_token_id=-1), root / family / "truth.pt")
    return root


@contextmanager
def scripted(case: Case, root: Path) -> Iterator[None]:
    """Drafts that are right where the case says so."""
    if case.drafts == "natural":
        yield
        return
    texts = {row_seed(SEED, row): tokens for row, tokens in enumerate(truth(root, case.family))}
    right = {"none": lambda place: False, "mixed": lambda place: place % 4 != 2, "all": lambda place: True}[case.drafts]

    def draft(row: Row, decision: Decision, before: list[int]) -> Draft:
        place = len(row.tokens) + len(before)
        token = texts[row.seed][place] if place < NEW else 0
        return Draft(token if right(place) else (token + 1) % VOCAB, decision.score)

    with mock.patch.object(Row, "draft", draft):
        yield


class Heard:
    """A streamer that writes down what it is told."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.layers: list[int] = []

    def put_exits(self, tokens: list[int], layers: list[int]) -> None:
        self.layers += layers

    def put(self, tokens: torch.Tensor) -> None:
        self.tokens += tokens.flatten().tolist()

    def end(self) -> None:
        self.tokens.append(-1)


def decode_cases(rank: int, world_size: int, root: Path) -> dict[tuple[Layout, str], Any]:
    """Every case on every grid of this size."""
    found = {}
    for layout in GRIDS[world_size]:
        grid = join_grid(layout, torch.device("cpu"))
        for family in dict.fromkeys(CASES[name].family for name in runs_on(layout)):
            model_folder = ModelFolder(root / family)
            plan = plan_decoding(model_folder, layout.tp, layout.pp, EXITS, CUTS[layout.pp])
            stage = load_decoding_stage(model_folder, plan, grid, torch.float32)
            decoder = PipelineDecoder(stage, plan, grid, model_folder.generation_config())
            for name in runs_on(layout):
                if (case := CASES[name]).family == family:
                    policy = resolve_policy("lossless", EXITS, **case.policy)
                    with scripted(case, root):
                        found[layout, name] = decoder.generate(
                            prompts(case.rows), policy, seed=SEED, **settings(case, root)
                        )
            if family == "llama":
                found[layout, "bf16"] = in_bf16(model_folder, plan, grid)
                heard = Heard()
                policy = resolve_policy("lossless", EXITS)
                said = decoder.generate(prompts(1), policy, streamer=heard, **settings(Case(), root))
                found[layout, "streamed"] = said, heard.tokens, heard.layers
        leave_grid()
    return found


def in_bf16(folder: ModelFolder, plan: Any, grid: Any) -> list[Decoded | None]:
    """Plainly and losslessly."""
    stage = load_decoding_stage(folder, plan, grid, torch.bfloat16)
    decoder = PipelineDecoder(stage, plan, grid, folder.generation_config())
    policies = [resolve_policy("off", EXITS), resolve_policy("lossless", EXITS, draft_length=2)]
    return [decoder.generate(prompts(), policy, max_new_tokens=16, eos_token_id=-1) for policy in policies]


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[int, list[dict]]:
    return {size: spawn(decode_cases, size, size, folder) for size in GRIDS}


LAYOUTS = [layout for layouts in GRIDS.values() for layout in layouts]


def grid_name(value: Layout | str) -> str:
    """Of a parameter, for the name of its test; a case has one."""
    return value if isinstance(value, str) else f"tp{value.tp}-pp{value.pp}"


on_every_grid = pytest.mark.parametrize("layout", LAYOUTS, ids=grid_name)


def on_its_grids(greedy: bool) -> Any:
    """A test of greedy or of sampled cases, each on the grids that it runs on."""
    pairs = [(case, layout) for layout in LAYOUTS for case in runs_on(layout) if (case in GREEDY) == greedy]
    return pytest.mark.parametrize(("case", "layout"), pairs, ids=grid_name)


def results(found: dict, layout: Layout, case: str) -> Decoded:
    """What the first stage has; all its ranks have the same, and no other stage has anything."""
    every = [ranks[layout, case] for ranks in found[layout.world_size]]
    assert all(one.tokens == every[0].tokens and one.stats == every[0].stats for one in every[: layout.tp])
    assert not any(every[layout.tp :])
    return every[0]


@on_its_grids(greedy=True)
def test_greedy_texts_are_transformers_own(case: str, layout: Layout, found: dict, folder: Path) -> None:
    work, decoded = CASES[case], results(found, layout, case)
    assert decoded.tokens == greedy(folder, work.family, **settings(work, folder))[: work.rows]
    k = work.policy.get("layer", DRAFTS_FROM[layout.pp])
    drafted, accepted = decoded.stats["drafted"], decoded.stats["accepted"]
    assert accepted == sum(layers.count(k) for layers in decoded.exit_layers)
    assert {layer for layers in decoded.exit_layers for layer in layers} <= {k, LAYERS}
    for layers, scores in zip(decoded.exit_layers, decoded.exit_confidences, strict=True):
        assert [0 < score <= 1 if layer == k else score != score for layer, score in zip(layers, scores, strict=True)]
    if work.drafts == "none":
        assert drafted > accepted == 0
    elif work.drafts == "mixed":
        assert drafted > accepted > 0
    elif work.drafts == "all":
        most = work.rows * (NEW - 1)
        assert (drafted, accepted) == (most, most)
    elif case in ("no drafts", "one token"):
        assert drafted == accepted == 0


@pytest.mark.parametrize("layout", GRIDS[4], ids=grid_name)
def test_the_exits_of_these_models_are_right_now_and_then(layout: Layout, found: dict) -> None:
    """Otherwise the comparison of natural drafts would prove little."""
    for case in ("alone", "alone-mistral"):
        stats = results(found, layout, case).stats
        assert 0 < stats["accepted"] < stats["drafted"], (case, stats)
    assert any(len(tokens) < NEW for tokens in results(found, layout, "eos").tokens)


@torch.no_grad()
def sampled_slowly(root: Path, case: Case, k: int) -> list[list[int]]:
    """No cache, no stages and nothing in flight: one draft, judged by the final layer, for every token."""
    model = EarlyExitForCausalLM.from_pretrained(root / case.family)
    make = RowMaker(model.config, ModelFolder(root / case.family).generation_config(), torch.device("cpu"))
    rows, _ = make(prompts(case.rows), SEED, 0, settings(case, root))
    for row in rows:
        while not row.ended:
            output = model(row.ids, use_cache=False)
            draft = row.draft(Decision(0, k, nan, output.exit_logits[k][:, -1]), [])
            row.keep(row.judge(Decision(0, LAYERS, nan, output.logits[:, -1]), draft), LAYERS, nan)
    return [row.tokens for row in rows]


@on_its_grids(greedy=False)
def test_sampled_texts_are_those_of_one_draft_after_the_other(
    case: str, layout: Layout, found: dict, folder: Path
) -> None:
    work, decoded = CASES[case], results(found, layout, case)
    k = work.policy.get("layer", DRAFTS_FROM[layout.pp])
    assert decoded.tokens == sampled_slowly(folder, work, k)
    assert decoded.tokens != truth(folder, work.family)[: work.rows]


@on_every_grid
def test_a_streamer_hears_of_verified_tokens_alone(layout: Layout, found: dict, folder: Path) -> None:
    said, tokens, layers = found[layout.world_size][0][layout, "streamed"]
    assert tokens == [*prompts(1)[0], *truth(folder, "llama")[0], -1]
    assert layers == said.exit_layers[0]


@on_every_grid
def test_bf16_rounds_as_without_drafts(layout: Layout, found: dict) -> None:
    """Every position has a pass of its own in both."""
    plain, lossless = found[layout.world_size][0][layout, "bf16"]
    assert lossless.tokens == plain.tokens
    assert 0 < lossless.stats["accepted"] < lossless.stats["drafted"]


@pytest.mark.parametrize(
    ("pp", "exits", "stages", "chosen"),
    [
        (2, (1, 2, 4), [3, 2], 2),  # the deepest of the first stage
        (2, (1, 2, 4), [1, 4], 1),
        (4, (2, 4), [1, 2, 1, 1], 2),  # the first stage has none
        (4, (1, 4), None, 1),
    ],
)
def test_which_exit_drafts(pp: int, exits: tuple, stages: list | None, chosen: int, folder: Path) -> None:
    plan = plan_decoding(ModelFolder(folder / "llama"), 1, pp, exits, stages, drafts=True)
    assert plan.exit_layers == (chosen,)


def test_an_exit_of_the_last_stage_cannot_draft(folder: Path) -> None:
    message = r"no exit stands before the last of 2 stages \(layers 1-3, 4-5\), only at 4; set parallel.stages"
    with pytest.raises(UserError, match=message):
        plan_decoding(ModelFolder(folder / "llama"), 1, 2, (4,), [3, 2], drafts=True)
