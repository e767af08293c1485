"""What small sizes bring as draft models: counted on texts, against the algorithm itself and its formula."""

import ast
import json
import random
import re
import shlex
from dataclasses import replace
from io import StringIO
from itertools import product
from pathlib import Path

import pytest
import torch
from helpers.assisted import Cycles
from rich.console import Console
from test_palette_report import cells, member, palette
from transformers import LlamaConfig, LlamaForCausalLM

from ee_scale.modeling.costs import MAX_DRAFT, expected_tokens
from ee_scale.palettes.draft_commands import Drafted, engine_sections, sglang_command, vllm_command
from ee_scale.palettes.draft_report import add_to_cards, draft_command, draft_sentences, draft_table
from ee_scale.palettes.draft_trials import DraftTrials
from ee_scale.palettes.drafts import DraftedText, Drafting, DraftPair, Drafts, cycles, foretold, whole_costs
from ee_scale.palettes.manifest import Manifest, read_manifest, write_manifest
from ee_scale.palettes.recommend import palette_markdown

RANDOM = random.Random(5)


def text(*chances: float, ended: bool = False) -> DraftedText:
    return DraftedText(list(chances), list(chances), ended)


def walked(accepted: tuple[bool, ...], drafts: int, ended: bool) -> tuple[int, int]:
    """(tokens, cycles) of one course of events: the algorithm, step by step."""
    length, start, tokens, count = len(accepted), 0, 0, 0
    while start < (length if ended else length - drafts):
        kept = 0
        while kept < drafts and start + kept < length and accepted[start + kept]:
            kept += 1
        brought = min(kept + 1, length - start)  # nothing comes behind the end token
        start, tokens, count = start + brought, tokens + brought, count + 1
    return tokens, count


# -- counting ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ended", [False, True])
@pytest.mark.parametrize("drafts", [1, 2, 3, 7])
def test_greedy_texts_are_walked_through(drafts, ended):
    for accepted in product((False, True), repeat=7):
        assert cycles(text(*map(float, accepted), ended=ended), drafts) == walked(accepted, drafts, ended)


@pytest.mark.parametrize("ended", [False, True])
def test_sampled_texts_are_the_mean_of_all_courses(ended):
    chances, tokens, count = [RANDOM.random() for _ in range(8)], 0.0, 0.0
    for accepted in product((False, True), repeat=8):
        weight = 1.0
        for chance, taken in zip(chances, accepted, strict=True):
            weight *= chance if taken else 1 - chance
        found = walked(accepted, 3, ended)
        tokens, count = tokens + weight * found[0], count + weight * found[1]
    assert cycles(text(*chances, ended=ended), 3) == pytest.approx((tokens, count))


@pytest.mark.parametrize("drafts", [1, 4, MAX_DRAFT])
def test_independent_drafts_bring_what_the_paper_says(drafts):
    tokens, count = cycles(text(*[0.7] * 90), drafts)
    assert tokens / count == pytest.approx(expected_tokens(0.7, drafts))


def test_the_best_number_of_drafts():
    costs = whole_costs(10.0, [(2, 11.0), (4, 13.0), (13, 40.0)])
    found = foretold([text(*[0.8] * 60), text(*[0.8] * 30)], costs, 1.5)
    times = [1.5 * g + (11.0 + (g - 1) if g < 4 else 13 + 3 * (g - 3)) for g in range(1, MAX_DRAFT + 1)]
    speeds = [expected_tokens(0.8, g) * 10 / time for g, time in enumerate(times, 1)]
    assert found.speedup == pytest.approx(max(speeds))
    assert found.drafts == 1 + speeds.index(max(speeds))
    assert found.tokens == pytest.approx(expected_tokens(0.8, found.drafts))
    assert found.acceptance == pytest.approx(0.8)
    assert found.speedup_interval == pytest.approx((found.speedup, found.speedup))  # the texts do not differ
    assert found.pays
    assert not foretold([text(*[0.8] * 60)], costs, 20.0).pays


def test_noise_makes_no_speed():
    costs = whole_costs(10.0, [(2, 4.0), (4, 9.0), (8, 5.0), (13, 6.0)])
    assert [costs.layers(1, rows) for rows in (1, 2, 4, 8, 13)] == [4.0, 4.0, 5.0, 5.0, 6.0]
    assert foretold([text(*[1.0] * 60)], costs, 0.0).speedup <= MAX_DRAFT + 1


def test_intervals_are_of_the_texts():
    costs = whole_costs(10.0, [(2, 10.0)])
    texts = [text(*[float(RANDOM.random() < 0.5) for _ in range(40)]) for _ in range(12)]
    found = foretold(texts, costs, 1.0)
    low, high = found.speedup_interval
    assert low < found.speedup < high
    assert found.acceptance_interval[0] < found.acceptance < found.acceptance_interval[1]
    sure = foretold([text(*[1.0] * 40), text(*[1.0, 0.0] + [1.0] * 38)], costs, 1.0)
    assert sure.acceptance_interval[1] == 1.0
    assert foretold(texts[:1], costs, 1.0).speedup_interval is None
    assert foretold([*texts, text(1.0)], costs, 1.0).drafts >= 1  # one too short for a cycle says little, but harms not
    assert foretold([text(1.0, ended=True)], costs, 1.0).tokens == 1


# -- against stock transformers ----------------------------------------------------------------------------------------


def tiny(seed: int, layers: int) -> LlamaForCausalLM:
    """Its distributions are far from flat."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": 24, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    config = LlamaConfig(**sizes, num_hidden_layers=layers, max_position_embeddings=64, initializer_range=0.3)
    config.bos_token_id = config.eos_token_id = config.pad_token_id = 0
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def models() -> tuple[LlamaForCausalLM, LlamaForCausalLM]:
    """A target, and a drafter that shares its embeddings, its head and one of its two layers."""
    target, drafter = tiny(0, 2), tiny(0, 1)
    drafter.load_state_dict(target.state_dict(), strict=False)
    return target, drafter


@pytest.mark.parametrize("sampled", [False, True])
def test_transformers_counts_what_was_foretold(models, sampled):
    """Greedy: the same tokens and cycles, exactly; sampling: as many as chance allows."""
    target, drafter = models
    prompts = torch.randint(1, 24, (50 if sampled else 8, 6), generator=torch.Generator().manual_seed(1))
    trials, drafts, counted, ends = DraftTrials([{"tokens": prompts}], 999, 46, 0, torch.device("cpu")), 3, [], 0
    written = trials.written(target, 0, sampled=sampled)
    texts = trials.drafted(target, drafter, written, sampled=sampled)
    expected = torch.tensor([cycles(text, drafts) for text in texts]).sum(0)
    drafter.generation_config.update(num_assistant_tokens=drafts, num_assistant_tokens_schedule="constant")
    drafter.generation_config.update(assistant_confidence_threshold=0)
    torch.manual_seed(7)
    for row, told in zip(prompts, written, strict=True):
        streamer = Cycles()
        options = {"max_new_tokens": trials.new, "do_sample": sampled, "attention_mask": torch.ones_like(row[None])}
        options |= {"top_k": 0, "eos_token_id": 0, "pad_token_id": 0}
        ids = target.generate(row[None], assistant_model=drafter, streamer=streamer, **options)[0, 6:]
        assert sampled or torch.equal(ids, told.ids)
        ended = bool(ids[-1] == 0)
        counted, ends = counted + streamer.whole(len(ids), drafts, ended=ended), ends + ended
    assert ends > 0
    if not sampled:
        assert [sum(counted), len(counted)] == expected.tolist()
        return
    sizes = torch.tensor(counted, dtype=torch.float64)
    assert 1.5 < sizes.mean() < 3  # neither all nor none
    assert float(sizes.mean()) == pytest.approx(
        float(expected[0] / expected[1]), abs=6 * float(sizes.std()) / len(sizes) ** 0.5
    )


# -- words -------------------------------------------------------------------------------------------------------------


def drafting(speedup: float, acceptance: float = 0.7, drafts: int = 4) -> Drafting:
    around = (speedup - 0.1, speedup + 0.1)
    return Drafting(acceptance, (acceptance - 0.05, acceptance + 0.05), drafts, 2.5, speedup, around)


def pair(target: str, drafter: str, greedy: float, sampled: float) -> DraftPair:
    return DraftPair(target, drafter, 0.25, drafting(greedy), drafting(sampled, 0.6, 3))


def drafted(*pairs: DraftPair) -> Manifest:
    members = [member("s", 2_000_000, 3.4, 2.0, "loss"), member("m", 6_000_000, 3.1, 5.0, "loss")]
    members = [replace(one, verify_ms=[(2, 1.5), (13, 4.0)]) for one in members]
    return palette(members, "loss", drafts=Drafts(32, 64, "h64", list(pairs)))


PAYS = drafted(pair("m", "s", 1.5, 1.3), pair("h64", "s", 1.4, 1.25), pair("h64", "m", 0.8, 0.7))


def test_round_trip(tmp_path: Path) -> None:
    write_manifest(tmp_path, PAYS)
    assert read_manifest(tmp_path) == PAYS


def test_the_best_pair_in_a_sentence() -> None:
    assert draft_sentences(PAYS) == [
        "**Best drafter:** `s` for `m`: greedy 1.50x the speed (70% accepted, 4 drafts per cycle), sampling 1.30x the "
        "speed (60% accepted, 3 drafts per cycle); 120 MB more.",
        "**Of the full model:** `s` for the full model (`h64`): greedy 1.40x the speed (70% accepted, 4 drafts per "
        "cycle), sampling 1.25x the speed (60% accepted, 3 drafts per cycle); 120 MB more.",
    ]
    only_sampled = draft_sentences(drafted(pair("m", "s", 1.05, 0.9), pair("h64", "s", 0.9, 1.2)))
    assert only_sampled[0].startswith("**Best drafter:** `s` for the full model (`h64`): greedy 0.90x")
    assert len(only_sampled) == 1


def test_where_no_pair_is_worth_it_it_says_so() -> None:
    poor = drafted(pair("m", "s", 1.05, 0.9), pair("h64", "s", 0.9, 0.8))  # 1.05 may be 0.95
    (line,) = draft_sentences(poor)
    assert line.startswith("**Best drafter:** no pair is worth it. `s` for `m` comes nearest: greedy 1.05x the speed")
    assert line.endswith("each draft takes 25% of the target's time for a token.")
    text = palette_markdown(poor)
    assert "no pair is worth it" in text
    assert draft_sentences(drafted()) == ["**Best drafter:** none; no size is smaller than another."]
    half = draft_sentences(drafted(pair("m", "s", 1.5, 1.3), pair("h64", "s", 0.9, 0.8)))
    assert half[1].startswith("**Of the full model:** none. `s` for the full model (`h64`) comes nearest: greedy 0.90x")


def test_the_report_has_a_table() -> None:
    text = palette_markdown(PAYS)
    header, _, *rows = cells(text[text.index("## Small sizes") :])
    assert header[:6] == [
        "target",
        "drafter",
        "a draft's cost",
        *(f"greedy: {x}" for x in ("accepted", "accepted, 95%", "drafts")),
    ]
    assert [row[:2] for row in rows] == [["m", "s"], ["h64 (full)", "s"], ["h64 (full)", "m"]]
    assert rows[0][2:] == [
        *("25%", "70.0%", "65.0 to 75.0", "4", "1.50x", "1.40 to 1.60"),
        *("60.0%", "55.0 to 65.0", "3", "1.30x", "1.20 to 1.40"),
    ]
    assert "32 texts of up to 64 tokens" in text
    assert draft_command(PAYS.drafts.pairs[0], "greedy") in text
    out = StringIO()
    Console(file=out, width=140).print(draft_table(PAYS))
    assert re.search(r"h64 \(full\) +│ s +│ +25% │ +70.0% │ +4 │ +1.40x", out.getvalue())
    assert "Small sizes as draft models" not in palette_markdown(replace(PAYS, drafts=None))


def test_commands() -> None:
    code = draft_command(PAYS.drafts.pairs[0], "greedy")
    ast.parse(code)
    assert "num_assistant_tokens=4" in code
    assert "do_sample=False" in code
    assert "num_assistant_tokens=3" in draft_command(PAYS.drafts.pairs[0], "sampling")
    odd = Drafted("a model/it's", "my drafter", 4)
    words = shlex.split(vllm_command(odd))
    assert words[:4] == ["vllm", "serve", "a model/it's", "--speculative-config"]
    assert json.loads(words[4]) == {"method": "draft_model", "model": "my drafter", "num_speculative_tokens": 4}
    words = shlex.split(sglang_command(odd))
    assert words[words.index("--speculative-draft-model-path") + 1] == "my drafter"
    assert words[-1] == "5"  # the target's own token among them
    for section in engine_sections(odd):
        if section.startswith("```python"):
            ast.parse(section.removeprefix("```python").removesuffix("```"))
        elif section.startswith("```bash"):
            assert shlex.split(section)


def test_model_cards_say_whose_drafter_a_size_may_be(tmp_path: Path) -> None:
    for name in ("s", "m"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "README.md").write_text(f"# {name}\n")
    add_to_cards(tmp_path, replace(PAYS, drafts=None))
    assert (tmp_path / "s" / "README.md").read_text() == "# s\n"
    add_to_cards(tmp_path, PAYS)
    small, middle = ((tmp_path / name / "README.md").read_text() for name in ("s", "m"))
    assert small.startswith("# s\n\n## As a draft model\n\n")
    assert "- for `m`: greedy 1.50x" in small
    assert "- for the full model (`h64`): greedy 1.40x" in small
    assert draft_command(PAYS.drafts.pairs[0], "greedy") in small
    assert "- not for the full model (`h64`): greedy 0.80x" in middle
    assert "python" not in middle
