"""Decoding over stages and tensor ranks says what a slow single process without any cache says, token by token."""

from dataclasses import dataclass, field
from math import nan
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers.models import load_whole
from helpers.pipeline import export_noisy_exits, prompts
from helpers.spawn import spawn
from torch import nn
from torch.nn import functional

from ee_scale.backbone.model_folder import ModelFolder
from ee_scale.errors import UserError
from ee_scale.grid import Layout, join_grid, leave_grid
from ee_scale.inference.model import EarlyExitForCausalLM
from ee_scale.inference.pipeline import Decoded, PipelineDecoder, check_pipeline
from ee_scale.inference.pipeline_model import load_decoding_stage, plan_decoding
from ee_scale.inference.pipeline_rows import row_seed
from ee_scale.modeling.policies import resolve_policy

LAYERS = 5
EXITS = (1, 2, 4)
NEW = 12  # more than the sliding window of 8
MODELS = {  # family -> kind, head
    "llama": ("mlp", "low_rank"),
    "qwen3": ("norm", "tied"),
    "mistral": ("layer", "full"),
    "gemma2": ("mlp", "full"),
    "qwen2": ("norm", "shortlist"),
    "qwen2_moe": ("mlp", "full"),
    # Gathered projections, a rotary table per type of layer, layers without one, attention and MLP side by side.
    "olmo2": ("mlp", "full"),
    "gemma3_text": ("mlp", "full"),
    "smollm3": ("mlp", "full"),
    "cohere2": ("norm", "full"),
}
OTHERS = ("olmo2", "gemma3_text", "smollm3", "cohere2")
GRIDS = {2: (Layout(pp=2), Layout(tp=2)), 4: (Layout(pp=4), Layout(tp=2, pp=2))}
SAMPLING = {"do_sample": True, "temperature": 0.9, "top_k": 20}
SEED = 7
HEAD_SCALE, EMBEDDING_SCALE = 12, 20  # exits of random models are never sure and never agree otherwise


@dataclass(frozen=True)
class Case:
    """One batch: the policy's arguments and the settings of `generate` (None: see `settings`)."""

    family: str
    policy: str
    arguments: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)


CASES = {
    "off": Case("llama", "off"),
    "threshold": Case("llama", "threshold", {"threshold": [0.8, 0.7, 0.4]}),
    "threshold-by-row": Case("llama", "threshold", {"threshold": [[0.0] * 3, [0.7] * 3, [2.0, 2.0, 0.5]]}),
    "entropy": Case("llama", "entropy", {"threshold": 0.8}),
    "margin": Case("llama", "margin", {"threshold": 0.5}),
    "patience": Case("llama", "patience", {"patience": 2}),
    "fixed": Case("llama", "fixed", {"layer": 2}),
    "eos": Case("llama", "threshold", {"threshold": [0.8, 0.7, 0.4]}, {"eos_token_id": None}),
    "processors": Case("llama", "threshold", {"threshold": [0.8, 0.7, 0.4]}, {"suppress_tokens": None}),
    "sampling": Case("llama", "off", settings=SAMPLING),
    "qwen3": Case("qwen3", "threshold", {"threshold": 0.6}),
    "mistral": Case("mistral", "threshold", {"threshold": 0.7}),
    "mistral-off": Case("mistral", "off"),
    "gemma2": Case("gemma2", "threshold", {"threshold": 0.032}),
    "gemma2-off": Case("gemma2", "off"),
    "qwen2": Case("qwen2", "entropy", {"threshold": 1.2}),
    "qwen2_moe": Case("qwen2_moe", "threshold", {"threshold": 0.7}),
    **{family: Case(family, "patience", {"patience": 2}) for family in OTHERS},
    **{f"{family}-off": Case(family, "off") for family in OTHERS},
}
# All cases run where layers are cut both ways. The others have what that grid has not: stages of one layer, whose exits
# are all at a cut; a stage that is first and last; and stages without a tensor group, where the overlap is looked at.
ALONE = {
    Layout(pp=4): tuple(name for name, case in CASES.items() if case.family in ("llama", "mistral")),
    Layout(tp=2): ("off", "threshold", "patience", "eos", "sampling", "qwen2_moe"),
    Layout(pp=2): ("off", "threshold", "sampling"),
}


def runs_on(layout: Layout) -> tuple[str, ...]:
    """The cases of a grid."""
    return ALONE.get(layout, tuple(CASES))


def settings(case: str, folder: Path) -> dict[str, Any]:
    """The settings of a case; end marks and suppressed tokens are such that the rows would have said them."""
    given = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": -1, **CASES[case].settings}
    if case == "eos":
        given["eos_token_id"] = torch.load(folder / "said.pt")[1][NEW // 2]
    if case == "processors":
        given["suppress_tokens"] = torch.load(folder / "said.pt")[0][2:5]
    return given


def _spread(whole: nn.Module) -> None:
    whole.lm_head.weight.mul_(HEAD_SCALE)
    whole.model.embed_tokens.weight.mul_(EMBEDDING_SCALE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models with exits that are not copies, as exported folders."""
    root = tmp_path_factory.mktemp("models")
    for family, (kind, head) in MODELS.items():
        export_noisy_exits(root, family, EXITS, kind, head, 0.1, _spread)
    torch.save(reference(root, "threshold").tokens, root / "said.pt")
    return root


@torch.no_grad()
def reference(root: Path, case: str) -> Decoded:
    """No cache and no batch: all logits of the whole text again for every token."""
    work, rows = CASES[case], []
    model = EarlyExitForCausalLM.from_pretrained(root / work.family)
    given = settings(case, root)
    suppressed = given.get("suppress_tokens", [])
    for row, prompt in enumerate(prompts()):
        tokens, layers, scores = [], [], []
        while len(tokens) < NEW and given["eos_token_id"] not in tokens:
            output = model(torch.tensor([prompt + tokens]), use_cache=False)
            logits = {k: values[0, -1] for k, values in output.exit_logits.items()} | {LAYERS: output.logits[0, -1]}
            k, value = chosen_layer(work, row, logits) if tokens else (LAYERS, nan)  # a prompt never exits
            tokens.append(int(logits[k].index_fill(0, torch.tensor(suppressed).long(), -torch.inf).argmax()))
            layers.append(k)
            scores.append(value)
        rows.append((tokens, layers, scores))
    return Decoded(*(list(column) for column in zip(*rows, strict=True)))


def measure(policy: str, logits: torch.Tensor) -> float:
    p = functional.softmax(logits, -1)
    top = p.sort(descending=True).values
    return {"margin": top[0] - top[1], "entropy": torch.special.entr(p).sum()}.get(policy, top[0]).item()


def chosen_layer(case: Case, row: int, logits: dict[int, torch.Tensor]) -> tuple[int, float]:
    """The rule, exit by exit: (layer, value at the deepest exit that was looked at)."""
    said, value = [], nan
    for place, k in enumerate(EXITS):
        if case.policy == "off" or (case.policy == "fixed" and k != case.arguments["layer"]):
            continue
        said.append(int(logits[k].argmax()))
        value = measure(case.policy, logits[k])
        if case.policy == "fixed":
            leaves = True
        elif case.policy == "patience":
            leaves = len(said) >= 2 and said[-1] == said[-2]
        else:
            limits = case.arguments["threshold"]
            limits = limits[row] if isinstance(limits, list) and isinstance(limits[0], list) else limits
            limit = limits[place] if isinstance(limits, list) else limits
            assert abs(value - limit) > 1e-4, "the case is too close to call for another order of additions"
            leaves = value <= limit if case.policy == "entropy" else value >= limit
        if leaves:
            return k, value
    return LAYERS, value


def decode_cases(rank: int, world_size: int, folder: Path) -> dict[tuple[Layout, str], Any]:
    """Every case on every grid of this size."""
    found = {}
    for layout in GRIDS[world_size]:
        grid = join_grid(layout, torch.device("cpu"))
        for family in dict.fromkeys(CASES[name].family for name in runs_on(layout)):
            model_folder = ModelFolder(folder / family)
            plan = plan_decoding(model_folder, layout.tp, layout.pp, EXITS)
            stage = load_decoding_stage(model_folder, plan, grid, torch.float32)
            decoder = PipelineDecoder(stage, plan, grid, model_folder.generation_config())
            for name in runs_on(layout):
                if (case := CASES[name]).family == family:
                    policy = resolve_policy(case.policy, EXITS, batch_size=3, **case.arguments)
                    found[layout, name] = decoder.generate(prompts(), policy, seed=SEED, **settings(name, folder))
        if layout == Layout(pp=2):
            found["overlap"] = {layer: overlap(grid, folder, layer) for layer in (1, 4)}
        leave_grid()
    return found


def overlap(grid: Any, folder: Path, layer: int) -> list[int]:
    """The last stage enters its last layer with a token only when the first stage has begun the next one.

    If the first stage waited for the last one, both would wait for ever. Returns the tokens.
    """
    model_folder = ModelFolder(folder / "llama")
    plan = plan_decoding(model_folder, 1, 2, EXITS, stages=[2, 3])
    stage = load_decoding_stage(model_folder, plan, grid, torch.float32)
    decoder = PipelineDecoder(stage, plan, grid, model_folder.generation_config())
    calls, sent = [], []

    def begun(*_: Any) -> None:
        if len(calls) >= 2:
            sent.append(dist.isend(torch.tensor([len(calls)]), 1, group=grid.metrics_group, tag=99))
        calls.append(None)

    def wait_for_next(*_: Any) -> None:
        if 1 <= len(calls) <= NEW - 2:
            number = torch.empty(1, dtype=torch.long)
            dist.recv(number, 0, group=grid.metrics_group, tag=99)
            assert number.item() == len(calls) + 1
        calls.append(None)

    if grid.stage == 0:
        stage.backbone.base.layers[0].register_forward_pre_hook(begun)
    else:
        stage.backbone.base.layers[-1].register_forward_pre_hook(wait_for_next)
    policy = resolve_policy("fixed", EXITS, layer=layer)
    decoded = decoder.generate(prompts()[:1], policy, max_new_tokens=NEW, do_sample=False, eos_token_id=-1)
    assert len(calls) == NEW
    for work in sent:
        work.wait()
    return decoded.exit_layers[0] if decoded else []


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[int, list[dict]]:
    return {size: spawn(decode_cases, size, size, folder) for size in GRIDS}


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, Decoded]:
    return {case: reference(folder, case) for case in CASES if case != "sampling"}


LAYOUTS = [layout for layouts in GRIDS.values() for layout in layouts]


@pytest.mark.parametrize(
    ("case", "layout"),
    [(case, layout) for layout in LAYOUTS for case in runs_on(layout) if case != "sampling"],
    ids=lambda value: value if isinstance(value, str) else f"tp{value.tp}-pp{value.pp}",
)
def test_equal_to_the_reference(case: str, layout: Layout, found: dict, expected: dict) -> None:
    for rank, results in enumerate(found[layout.world_size]):
        decoded = results[layout, case]
        if rank >= layout.tp:
            assert decoded is None  # only the first stage has the text
            continue
        assert decoded.tokens == expected[case].tokens
        assert decoded.exit_layers == expected[case].exit_layers
        for values, others in zip(decoded.exit_confidences, expected[case].exit_confidences, strict=True):
            assert values == pytest.approx(others, abs=1e-4, nan_ok=True)


def test_the_cases_leave_at_every_exit_and_end_early(expected: dict) -> None:
    """Otherwise the comparison would prove little."""
    for case in ("threshold", "threshold-by-row", "entropy", "margin", "patience", "processors"):
        layers = {k for row in expected[case].exit_layers for k in row[1:]}
        assert len(layers) >= 3, (case, layers)
    for case in ("qwen3", "mistral", "gemma2", "qwen2", "qwen2_moe", *OTHERS):
        assert len({k for row in expected[case].exit_layers for k in row[1:]}) >= 2, case
    assert [len(row) < NEW for row in expected["eos"].tokens].count(True) >= 1
    assert expected["processors"].tokens != expected["threshold"].tokens
    assert len({tuple(row) for row in expected["threshold"].tokens}) == 3  # rows mixed up would show


@pytest.mark.parametrize("case", [case for case in CASES if case.endswith("off")] + ["sampling"])
def test_off_is_transformers_generate(case: str, folder: Path, found: dict) -> None:
    model = load_whole(folder / "base" / CASES[case].family)
    for row, prompt in enumerate(prompts()):
        torch.manual_seed(row_seed(SEED, row))
        ids = torch.tensor([prompt])
        whole = model.generate(ids, attention_mask=torch.ones_like(ids), **settings(case, folder))
        for layout in (layout for layout in LAYOUTS if case in runs_on(layout)):
            assert found[layout.world_size][0][layout, case].tokens[row] == whole[0, len(prompt) :].tolist()


def test_the_first_stage_starts_the_next_token_before_the_last_stage_has_finished_this_one(found: dict) -> None:
    """Also when the exit is inside the last stage: it answers before its own later layers run."""
    assert found[2][0]["overlap"] == {k: [LAYERS] + [k] * (NEW - 1) for k in (1, 4)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (2, 1, "lossless"),
            "one stage drafts while later ones verify, but parallel.pp=1 with parallel.tp=2; use pp=2",
        ),
        ((1, 2, "threshold", 2), "parallel.dp=2: decoding has no replicas"),
    ],
)
def test_what_several_devices_cannot_do(arguments: tuple, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_pipeline(*arguments)


def test_texts_of_other_seeds_share_no_random_numbers():
    seeds = [row_seed(seed, row) for seed in range(20) for row in range(50)]
    assert len(set(seeds)) == len(seeds)
    draws = {torch.rand(4, generator=torch.Generator().manual_seed(seed)).numpy().tobytes() for seed in seeds}
    assert len(draws) == len(seeds)
