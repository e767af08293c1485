"""The first stage of lossless decoding over a pipeline that is played: what sets out, what is kept, how long it takes.

The played stages keep the tokens of each text as caches keep keys and values, and answer from those: a position that is
off, or a rejected token that is left behind, changes what they say. Nobody waits for what was not sent.
"""

from collections import Counter, deque
from collections.abc import Callable, Sequence
from functools import cache
from itertools import product
from math import nan, sqrt

import pytest
import torch
from transformers import GenerationConfig, LogitsProcessorList, RepetitionPenaltyLogitsProcessor

from ee_scale.backbone.digest import named_generator, named_seed
from ee_scale.inference.pipeline_lossless import PipelineSpeculation, reach, speedup
from ee_scale.inference.pipeline_messages import Decision, Token
from ee_scale.inference.pipeline_rows import Row, row_seed

VOCAB, LAYERS, EXIT = 50, 8, 2
PROMPTS = ([4, 3, 1], [2], [3, 3, 1, 2], [4, 0], [0, 1])
Says = Callable[[Sequence[int]], Decision]


def final(text: Sequence[int]) -> Decision:
    """The last stage about what follows a text: any rule would do that looks at all of it."""
    return Decision(named_seed(f"{list(text)}", 0) % VOCAB, LAYERS)


def drafter(share: float, propose: int | None = None) -> Says:
    """An exit that agrees with `final` behind so many of the texts, and else says something else (or `propose`)."""

    def says(text: Sequence[int]) -> Decision:
        token, chance = final(text).token, named_seed(f"{list(text)}", 1) % 1000 / 1000
        other = (token + 1) % VOCAB if propose is None else propose
        return Decision(token if chance < share else other, EXIT, 0.5)

    return says


class Pipe:
    """Stages that are played, and their clock: each takes its time for a position, the first one the caller's."""

    def __init__(self, times: Sequence[float], drafts_in: int, says: Says, answers: Says, rows: int, most: int):
        self.times, self.stages, self.drafts_in, self.most = times, len(times), drafts_in, most
        self.says, self.answers = says, answers
        self.texts: list[list[int]] = [[] for _ in range(rows)]
        self.free = [0.0] * self.stages
        self.now, self.launches = 0.0, 0
        self.queues: dict[int, deque] = {stage: deque() for stage in {drafts_in, self.stages - 1} - {0}}

    def launch(self, row: int, ids: torch.Tensor, start: int) -> tuple[Token, Decision | None]:
        text = self.texts[row]
        assert start <= len(text), "a hole in the cache"
        text[start:] = ids[0].tolist()
        token, word = Token(row, start, ids.shape[1]), self.says(text)
        self.launches += 1
        arrives = self.now = self.now + self.times[0]
        for stage in range(1, self.stages):
            self.free[stage] = arrives = max(self.free[stage], arrives) + self.times[stage]
            if stage == self.drafts_in:
                self.queues[stage].append((arrives, word))
        self.queues[self.stages - 1].append((arrives, self.answers(text)))
        assert max(map(len, self.queues.values())) <= self.most, "more in flight than sends may wait"
        return token, word if self.drafts_in == 0 else None

    def hear(self, stage: int) -> Decision:
        assert self.queues[stage], "waits for ever"
        ready, decision = self.queues[stage].popleft()
        self.now = max(self.now, ready)
        return decision


def make_rows(prompts: Sequence[Sequence[int]], new: int, eos: int = -1, **settings: object) -> list[Row]:
    rows = []
    for number, prompt in enumerate(prompts):
        config = GenerationConfig(max_new_tokens=new, eos_token_id=eos, **settings)
        seed = row_seed(0, number)
        rows.append(
            Row(torch.tensor([prompt]), LogitsProcessorList(), None, config, seed, torch.Generator().manual_seed(seed))
        )
    return rows


def play(
    rows: list[Row],
    says: Says,
    answers: Says = final,
    stages: int = 2,
    drafts_in: int = 0,
    length: int | None = None,
    times: Sequence[float] | None = None,
) -> tuple[Pipe, int, int]:
    """Decode the rows: (the stages, drafts that set out, those accepted). `times`: of the stages, if not all 1."""
    times = times or [1.0] * stages
    far = reach(drafts_in, times, len(rows), length)
    pipe = Pipe(times, drafts_in, says, answers, len(rows), far.in_flight)
    heard: Counter[int] = Counter()
    speculation = PipelineSpeculation(
        rows, EXIT, LAYERS, far, pipe.launch, pipe.hear, lambda row: heard.update([id(row)])
    )
    drafted, accepted = speculation.run()
    assert not any(pipe.queues.values()), "answers that nobody read"
    assert [heard[id(row)] for row in rows] == [len(row.tokens) for row in rows]
    return pipe, drafted, accepted


def reference(prompt: Sequence[int], new: int, eos: int = -1) -> list[int]:
    tokens: list[int] = []
    while len(tokens) < new and eos not in tokens:
        tokens.append(final([*prompt, *tokens]).token)
    return tokens


PIPES = [(2, 0), (3, 0), (3, 1), (4, 0), (4, 2), (5, 1)]


@pytest.mark.parametrize("share", [0.0, 0.7, 1.0])
@pytest.mark.parametrize(("stages", "drafts_in"), PIPES)
def test_texts_are_those_of_the_last_stage(stages: int, drafts_in: int, share: float) -> None:
    for count, length, new in product((1, 2, 5), (None, 1, 3), (1, 2, 3, 17)):
        rows = make_rows(PROMPTS[:count], new)
        pipe, drafted, accepted = play(rows, drafter(share), final, stages, drafts_in, length)
        assert [row.tokens for row in rows] == [reference(prompt, new) for prompt in PROMPTS[:count]]
        assert accepted == sum(row.layers.count(EXIT) for row in rows)
        for row in rows:
            assert row.scores == pytest.approx([0.5 if layer == EXIT else nan for layer in row.layers], nan_ok=True)
        tokens = count * new
        # A position sets out for each token, and for drafts that were not accepted.
        assert pipe.launches == tokens + drafted - accepted
        if share == 1 and length is not None:
            assert accepted == drafted == count * max(0, new - 1)
        if share == 1 and count == 1:
            assert accepted == max(0, new - 1)
        assert accepted <= (drafted if share else 0)
        assert all(len(text) < len(prompt) + new for text, prompt in zip(pipe.texts, PROMPTS, strict=False))


@pytest.mark.parametrize("place", range(8))
def test_ends_at_an_end_mark_and_only_at_a_verified_one(place: int) -> None:
    truth = reference(PROMPTS[0], 8)
    eos = truth[place]
    wanted = truth[: truth.index(eos) + 1]
    for (stages, drafts_in), share, others in product(PIPES, (0.0, 0.7, 1.0), (1, 3)):
        for says in (drafter(share), drafter(share, propose=eos)):
            rows = make_rows(PROMPTS[:others], 8, eos)
            play(rows, says, final, stages, drafts_in)
            assert rows[0].tokens == wanted
            assert [row.tokens for row in rows] == [reference(prompt, 8, eos) for prompt in PROMPTS[:others]]


def test_stop_criteria_are_asked_behind_every_token_and_what_is_in_flight_then_is_not_kept() -> None:
    truth = reference(PROMPTS[0], 12)
    for (stages, drafts_in), share, place in product(PIPES, (0.0, 0.7, 1.0), (0, 3, 7)):
        rows = make_rows(PROMPTS[:2], 12)
        stop = len(PROMPTS[0]) + place + 1
        rows[0].stop = lambda ids, _, stop=stop: torch.tensor([ids.shape[1] == stop])
        play(rows, drafter(share), final, stages, drafts_in, 3)
        assert [row.tokens for row in rows] == [truth[: place + 1], reference(PROMPTS[1], 12)]


def test_drafts_of_end_marks_do_not_set_out() -> None:
    rows = make_rows(PROMPTS[:1], 20, eos=-2)
    _, drafted, _ = play(rows, lambda text: Decision(-2, EXIT), stages=3)
    assert drafted == 0
    assert len(rows[0].tokens) == 20


@pytest.mark.parametrize("share", [0.0, 0.5, 0.8, 1.0])
@pytest.mark.parametrize(("stages", "drafts_in"), [(2, 0), (3, 0), (4, 0), (4, 1), (8, 0), (8, 2)])
def test_speed_is_what_the_model_of_costs_says(stages: int, drafts_in: int, share: float) -> None:
    new = 600
    rows = make_rows(PROMPTS[:1], new)
    pipe, _, accepted = play(rows, drafter(share), final, stages, drafts_in)
    a = accepted / new
    assert abs(a - share) < 0.06
    assert stages * new / pipe.now == pytest.approx(speedup(stages, drafts_in, a), rel=0.02)
    assert speedup(2, 0, 0.8) == pytest.approx(5 / 3)
    assert speedup(4, 0, 0.8) == 2.5
    assert speedup(4, 1, 1.0) == 2.0


@pytest.mark.parametrize(
    "times", [(2, 1), (1, 2), (3, 2), (2, 3), (3, 1, 1), (2, 1, 2), (2, 1, 1, 1), (1, 1, 1, 3), (4, 1)]
)
def test_stages_that_take_unlike_times_lose_little_to_drafts_and_win_what_they_can(times: tuple[float, ...]) -> None:
    new, ratios = 400, []
    for share in (0.0, 0.3, 0.6, 0.95):
        pipe, *_ = play(make_rows(PROMPTS[:1], new), drafter(share), times=times)
        ratios.append(sum(times) * new / pipe.now)
    assert min(ratios) > 0.95
    best = sum(times) / max(times)
    assert ratios[-1] > 1 + 0.6 * (best - 1)


def test_rows_that_ended_leave_their_place_to_drafts_but_no_queue() -> None:
    """Five texts on two stages, of which four end at once: two positions are in flight from then on."""
    rows = make_rows(PROMPTS, 40)
    for row in rows[1:]:
        row.settings.max_new_tokens = 2
    pipe, drafted, _ = play(rows, drafter(0.0), stages=2)
    assert 0 < drafted < 45
    assert pipe.now < 2 * 40 + 12


def test_texts_that_fill_the_pipeline_draft_nothing_and_others_share_what_is_idle() -> None:
    for count, stages in ((4, 4), (5, 4), (5, 2)):
        rows = make_rows(PROMPTS[:count], 30)
        pipe, drafted, _ = play(rows, drafter(0.0), final, stages)
        assert drafted == 0 or count < stages
        assert pipe.now <= 30 * count + stages
    rows = make_rows(PROMPTS[:2], 100)
    pipe, *_ = play(rows, drafter(1.0), final, 4)
    assert pipe.now <= 2 * 100 + 4  # a position every moment
    assert {row.layers.count(EXIT) for row in rows} <= {*range(90, 100)}


# -- sampling ----------------------------------------------------------------------------------------------------------

SMALL = 5


def table(name: str, sharpness: float) -> Callable[[Sequence[int]], torch.Tensor]:
    """Logits [1, SMALL] behind a text, by its last two tokens."""

    @cache
    def logits(last: tuple[int, ...]) -> torch.Tensor:
        return sharpness * torch.randn(1, SMALL, generator=named_generator(f"{name} {last}", 0))

    return lambda text: logits(tuple(text[-2:])).clone()


P, Q = table("p", 1.0), table("q", 1.5)


def logits_of(layer: int, rule: Callable[[Sequence[int]], torch.Tensor]) -> Says:
    return lambda text: Decision(int(rule(text).argmax()), layer, nan, rule(text))


def sampled(rows: list[Row], **where: int) -> list[list[int]]:
    play(rows, logits_of(EXIT, Q), logits_of(LAYERS, P), **where)
    return [row.tokens for row in rows]


def test_sampled_texts_have_the_last_stage_s_distribution() -> None:
    texts, prompt, memory = 6_000, [1, 2], {}
    for text in product(range(SMALL), repeat=2):
        memory[text] = P(text).softmax(-1)[0].double()
    law = torch.stack([memory[1, 2][a] * memory[2, a] for a in range(SMALL)])
    expected = texts * torch.stack([law[a, b] * memory[a, b] for a in range(SMALL) for b in range(SMALL)]).flatten()
    counts = torch.zeros(SMALL**3, dtype=torch.float64)
    for start in range(0, texts, 20):
        rows = make_rows([prompt] * 20, 3, do_sample=True)
        for number, row in enumerate(rows):
            row.seed = row_seed(0, start + number)
        for a, b, c in sampled(rows, stages=3, length=2):
            counts[(a * SMALL + b) * SMALL + c] += 1
    surprise = (((counts - expected) ** 2 / expected).sum() - (SMALL**3 - 1)) / sqrt(2 * (SMALL**3 - 1))
    assert abs(float(surprise)) < 4


def test_drafts_from_the_last_stage_s_own_distribution_are_all_accepted() -> None:
    _, drafted, accepted = play(
        make_rows(PROMPTS, 20, do_sample=True), logits_of(EXIT, P), logits_of(LAYERS, P), length=2
    )
    assert accepted == drafted == 19 * len(PROMPTS)


def test_a_sampled_text_depends_on_nothing_but_its_seed() -> None:
    """Not on the grid, other texts, or how far drafts run ahead; so what was drawn for rejected drafts is harmless."""
    wanted = sampled(make_rows(PROMPTS, 25, do_sample=True), stages=2, length=1)
    assert len({tuple(tokens) for tokens in wanted}) == len(PROMPTS)
    for (stages, drafts_in), length in product(PIPES, (None, 1, 4)):
        where = {"stages": stages, "drafts_in": drafts_in, "length": length}
        assert sampled(make_rows(PROMPTS, 25, do_sample=True), **where) == wanted
        assert sampled(make_rows(PROMPTS[:1], 25, do_sample=True), **where) == wanted[:1]


def test_processors_see_the_drafts_before_a_draft() -> None:
    """With an exit that is the last stage, every draft is right only if both heard the same text."""
    for new, stages in product((2, 15), (2, 4)):
        rows = make_rows(PROMPTS[:2], new)
        for row in rows:
            row.processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.5)])
        _, drafted, accepted = play(rows, logits_of(EXIT, P), logits_of(LAYERS, P), stages=stages, length=3)
        assert accepted == drafted == 2 * (new - 1)
        tokens = reference_penalty(PROMPTS[0], new)
        assert rows[0].tokens == tokens


def reference_penalty(prompt: Sequence[int], new: int) -> list[int]:
    tokens: list[int] = []
    for _ in range(new):
        logits = P([*prompt, *tokens])[0]
        for token in {*prompt, *tokens} & {*range(SMALL)}:
            logits[token] = logits[token] * 1.5 if logits[token] < 0 else logits[token] / 1.5
        tokens.append(int(logits.argmax()))
    return tokens
