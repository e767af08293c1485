"""One answer decoded in turn plainly, losslessly and by a threshold."""

import time
from dataclasses import dataclass

import torch
from rich.table import Table
from transformers import PreTrainedModel

from ee_scale.evaluation.cost_model import needed_acceptance
from ee_scale.log import titled_table
from ee_scale.modeling.attention import without_cudnn
from ee_scale.modeling.costs import Costs, best_draft_length

THRESHOLD, TURNS = 0.9, 2
GOAL = 1.2  # a speed that would be worth it
PLAIN = "all layers"
WAYS: dict[str, dict[str, str | float]] = {
    PLAIN: {"exit_policy": "off"},
    "lossless": {"exit_policy": "lossless"},
    "threshold": {"exit_policy": "threshold", "exit_threshold": THRESHOLD},
}


@dataclass(frozen=True)
class Decoded:
    """One way of decoding; the faster of its turns.

    Attributes:
        ratio: speed over that of all layers; same: tokens that are those of all layers, up to the first that is not.
        depth: mean layer of the tokens.
    """

    tokens: int
    seconds: float
    ratio: float
    same: int
    depth: float
    stats: dict[str, float]


@torch.no_grad()
@without_cudnn()
def decode_by_turns(model: PreTrainedModel, prompt: torch.Tensor, new_tokens: int) -> dict[str, Decoded]:
    """Greedy answers to a prompt [1, S], the ways of `WAYS` in turn: what the machine does meanwhile hits all alike."""
    seconds: dict[str, float] = {}
    outputs = {}
    for _ in range(TURNS):
        for name, settings in WAYS.items():
            start = time.perf_counter()
            outputs[name] = model.generate(
                prompt, max_new_tokens=new_tokens, do_sample=False, return_dict_in_generate=True, **settings
            )
            seconds[name] = min(seconds.get(name, float("inf")), time.perf_counter() - start)
    answers = {name: output.sequences[0, prompt.shape[1] :].tolist() for name, output in outputs.items()}
    plain = answers[PLAIN]
    speed = {name: len(tokens) / seconds[name] for name, tokens in answers.items()}
    return {
        name: Decoded(
            len(tokens),
            seconds[name],
            speed[name] / speed[PLAIN],
            next((i for i, (a, b) in enumerate(zip(tokens, plain, strict=False)) if a != b), len(tokens)),
            _depth(outputs[name], len(tokens), model.config.num_hidden_layers),
            getattr(outputs[name], "exit_stats", None) or {},
        )
        for name, tokens in answers.items()
    }


def _depth(output: object, count: int, num_layers: int) -> float:
    layers = getattr(output, "exit_layers", None)
    return float(num_layers) if layers is None else float(layers[0, :count].float().mean())


def decoding_table(ways: dict[str, Decoded]) -> Table:
    """Speed, and whether the tokens are the same."""
    table = titled_table("the same answer, decoded in turn", ("tokens/s", "ratio", "same tokens"), left=("", "how"))
    for name, way in ways.items():
        how = ""
        if name == "lossless":
            how = f"{way.stats['accepted']} of {way.stats['drafted']} drafts accepted"
        elif name == "threshold":
            how = f"a token leaves at {THRESHOLD:.0%} probability; mean layer {way.depth:.1f}"
        same = "yes" if way.same == way.tokens == ways[PLAIN].tokens else f"the first {way.same} of {way.tokens}"
        table.add_row(name, how, f"{way.tokens / way.seconds:.1f}", f"{way.ratio:.2f}x", same)
    return table


def prediction(model: PreTrainedModel, acceptance: dict[int, float], ratio: float) -> str:
    """What the cost model says of lossless decoding on a device that waits for weights, in one sentence.

    There a pass over a few rows costs what one over a single row costs, and a part's time is its share of the weights.
    acceptance: exit -> share of its tokens that are the final layer's.
    """
    sizes = {name: p.numel() for name, p in model.named_parameters()}

    def size(part: str) -> int:
        return sum(count for name, count in sizes.items() if f".{part}." in f".{name}")

    layer, spec = size("layers.0"), model.exit_spec
    head = model.config.vocab_size * model.config.hidden_size / layer
    checks = {k: size(f"exit_heads.{k}") / layer + (0 if spec.owns_matrix else head) for k in acceptance}
    costs = Costs(model.config.num_hidden_layers, {1: 1.0}, {1: head}, checks)
    speed, k = max((best_draft_length(costs, k, accepted)[1], k) for k, accepted in acceptance.items())
    faster = "hardly" if ratio > 1 else "not"
    words = (
        f"Lossless decoding is {faster} faster here ({ratio:.2f}x): a CPU pays for every drafted token, and a device "
        f"that waits for weights does not. For a GPU at batch 1 the cost model gives {speed:.2f}x with layer {k}, "
        f"{acceptance[k]:.0%} of whose tokens are right"
    )
    if (needed := needed_acceptance(costs, k, GOAL)) is not None and needed > acceptance[k]:
        words += f"; {GOAL:g}x would need {needed:.0%}, which takes longer training"
    return f"{words}."
