"""How good a subnet is, asked inside the supernet; and what its parts cost on this machine."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import exp

import torch
import torch.nn.functional as F

from ee_scale.elastic.architecture import ElasticMap
from ee_scale.elastic.extract import subnet_config
from ee_scale.elastic.stage import ElasticStage
from ee_scale.elastic.subnet import SubnetSpec
from ee_scale.families.build import AUTO_CLASS
from ee_scale.palettes.edge import time_forward
from ee_scale.palettes.intervals import Scores

CHUNK = 1024  # tokens whose logits exist at the same time


@dataclass(frozen=True)
class Judged:
    """A subnet on held-out texts.

    Attributes:
        figures: mean loss in nats, and accuracy (classes) or perplexity (text).
        scores: text by text, of the figure that decides.
    """

    figures: dict[str, float]
    scores: Scores


@dataclass(frozen=True)
class Judge:
    """Quality of subnets on held-out batches (as for training), in one process."""

    stage: ElasticStage
    batches: Sequence[dict[str, torch.Tensor]]

    @property
    def metric(self) -> str:
        """The figure that decides."""
        return "accuracy" if self.stage.map.family.task == "classify" else "loss"

    @torch.no_grad()
    def judge(self, spec: SubnetSpec) -> Judged:
        """All texts through a subnet."""
        self.stage.select(spec)
        loss, right, counts = torch.cat([self._of_batch(batch) for batch in self.batches], 1).cpu()
        mean = float(loss.sum() / counts.sum())
        if self.metric == "accuracy":
            scores = Scores(right, counts)
            return Judged({"accuracy": scores.mean, "loss": mean}, scores)
        return Judged({"loss": mean, "perplexity": exp(min(mean, 700.0))}, Scores(loss, counts))

    def _of_batch(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """fp64 [3, B]: nats, right answers and answers of each text."""
        batch = {name: tensor.to(self.stage.grid.device) for name, tensor in batch.items()}
        final, _ = self.stage(batch["tokens"], batch)
        states, labels = final.flatten(0, -2), batch["labels"].flatten()
        texts = torch.arange(len(batch["labels"]), device=labels.device)
        found = torch.zeros(3, len(texts), dtype=torch.float64, device=labels.device)
        texts = texts.repeat_interleave(len(labels) // len(texts))
        if "loss_mask" in batch:
            kept = batch["loss_mask"].flatten().bool()
            states, labels, texts = states[kept], labels[kept], texts[kept]
        for piece, wanted, rows in zip(states.split(CHUNK), labels.split(CHUNK), texts.split(CHUNK), strict=True):
            logits = self.stage.head(piece).float()
            nats = F.cross_entropy(logits, wanted, reduction="none")
            told = torch.stack([nats, logits.argmax(-1) == wanted, torch.ones_like(nats)])
            found.index_add_(1, rows, told.double())
        return found

    def lower_is_better(self, figures: dict[str, float]) -> float:
        """For the search."""
        return 1 - figures["accuracy"] if self.metric == "accuracy" else figures["loss"]


class PartTimes:
    """Latency by look-up: one layer of each shape is timed once, on stock modules with random weights."""

    def __init__(self, elastic_map: ElasticMap, tokens: int, seconds: float, device: torch.device, dtype: torch.dtype):
        self.map, self.tokens, self.seconds, self.device, self.dtype = elastic_map, tokens, seconds, device, dtype
        self._parts = lru_cache(maxsize=None)(self._measure)

    def milliseconds(self, spec: SubnetSpec) -> float:
        """Of one forward over `tokens` tokens at batch 1: everything outside the layers, plus depth x one layer."""
        outside, layer = self._parts(spec.hidden, spec.groups, spec.ffn)
        return outside + spec.depth * layer

    def _measure(self, hidden: int, groups: int, ffn: int) -> tuple[float, float]:
        few, many = 1, max(2, min(4, self.map.shape.num_layers))
        times = [self._time(SubnetSpec(hidden, groups, ffn, tuple(range(depth)))) for depth in (few, many)]
        layer = max((times[1] - times[0]) / (many - few), 0.0)
        return max(times[0] - few * layer, 0.0), layer

    def _time(self, spec: SubnetSpec) -> float:
        config = subnet_config(self.map, spec, tied=False)
        with torch.device(self.device):
            model = AUTO_CLASS[self.map.family.task].from_config(config, dtype=self.dtype).eval()
            ids = torch.randint(config.vocab_size, (1, self.tokens))
        with torch.no_grad():
            return time_forward(lambda: model(input_ids=ids), self.seconds)
