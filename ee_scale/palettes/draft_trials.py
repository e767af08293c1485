"""Every pair of a palette's sizes tried as target and drafter, on texts that the target writes itself."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, PreTrainedModel

from ee_scale.modeling.costs import Costs
from ee_scale.palettes.drafts import DraftedText, DraftPair, Drafts, foretold, whole_costs
from ee_scale.palettes.manifest import Member
from ee_scale.palettes.writing import End, write_on
from ee_scale.progress import shares

PROMPT, NEW = 32, 64  # tokens, where the model and the held-out texts are that long
ROWS = 4  # texts whose logits exist at the same time


@dataclass(frozen=True)
class Timed:
    """A model folder: what it is called, and the times of a token and of forwards over more, in ms."""

    name: str
    folder: Path
    costs: Costs


@dataclass(frozen=True)
class Written:
    """Token ids [T] behind a prompt, an end token included; `ended`: there is one."""

    ids: torch.Tensor
    ended: bool


class DraftTrials:
    """Beginnings of held-out texts, which targets go on from."""

    def __init__(
        self, batches: Sequence[Mapping[str, torch.Tensor]], count: int, longest: int, seed: int, device: torch.device
    ):
        """count: texts, spread over the held-out ones; longest: tokens that the models read."""
        texts = torch.cat([batch["tokens"] for batch in batches])
        places = torch.linspace(0, len(texts) - 1, min(count, len(texts))).long()
        self.prompts = texts[places, : min(PROMPT, longest // 2)].to(device)
        self.new, self.seed = min(NEW, longest - self.prompts.shape[1]), seed

    def drafts(self, folder: Path, members: Sequence[Member], full: str) -> Drafts:
        """All pairs of members (folders in `folder`) of which one is smaller. full: folder of the full model."""
        pairs: list[DraftPair] = []
        timed = [Timed(member.folder, folder / member.folder, _costs(member)) for member in members]
        with shares("trying drafters") as progress:
            for done, target in enumerate(members):
                smaller = [one for one, member in zip(timed, members, strict=True) if member.params < target.params]
                pairs += self.pairs(timed[done], smaller)
                progress((done + 1) / len(members))
        pairs.sort(key=lambda pair: -pair.greedy.speedup)
        return Drafts(len(self.prompts), self.new, full, pairs)

    def pairs(self, target: Timed, smaller: Sequence[Timed]) -> Iterator[DraftPair]:
        """Each of the smaller ones with a target, as a model of its own: with its own layers and cache."""
        if not smaller:
            return
        model = self._open(target.folder)
        end, texts = model.generation_config.eos_token_id, {}
        for sampled in (False, True):
            texts[sampled] = self.written(model, end, sampled=sampled)
        for one in smaller:
            drafter, token_ms = self._open(one.folder), one.costs.step
            greedy, sampled = (
                foretold(self.drafted(model, drafter, texts[sampled], sampled=sampled), target.costs, token_ms)
                for sampled in (False, True)
            )
            yield DraftPair(target.name, one.name, token_ms / target.costs.step, greedy, sampled)

    def written(self, model: PreTrainedModel, end: End, *, sampled: bool) -> list[Written]:
        """What a model writes behind each prompt."""
        chunks = write_on(model, self.prompts, self.new, end, sampled=sampled, seed=self.seed)
        ends = torch.tensor([] if end is None else end, device=self.prompts.device).flatten()
        return [_until_end(row, ends) for rows in chunks for row in rows]

    @torch.no_grad()
    def drafted(
        self, target: PreTrainedModel, drafter: PreTrainedModel, texts: Sequence[Written], *, sampled: bool
    ) -> list[DraftedText]:
        """How a drafter would have done on the target's texts, one of each prompt."""
        first, found = self.prompts.shape[1] - 1, list[DraftedText]()
        for start in range(0, len(texts), ROWS):
            rows = texts[start : start + ROWS]
            new = pad_sequence([text.ids for text in rows], batch_first=True)
            ids = torch.cat([self.prompts[start : start + ROWS], new], 1)
            q = drafter(ids).logits[:, first:-1].float().log_softmax(-1)
            if sampled:
                p = target(ids).logits[:, first:-1].float().log_softmax(-1)
                chances = (q - p).gather(-1, new[..., None])[..., 0].clamp(max=0).exp()
                expected = torch.minimum(p, q).exp().sum(-1)
            else:
                chances = expected = (q.argmax(-1) == new).float()
            for text, chance, mean in zip(rows, chances.tolist(), expected.tolist(), strict=True):
                count = len(text.ids)
                found.append(DraftedText(chance[:count], mean[:count], text.ended))
        return found

    def _open(self, folder: Path) -> PreTrainedModel:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", trust_remote_code=False)
        return model.to(self.prompts.device).eval()


def _until_end(row: torch.Tensor, ends: torch.Tensor) -> Written:
    places = torch.isin(row, ends).nonzero()
    return Written(row[: int(places[0]) + 1], ended=True) if len(places) else Written(row, ended=False)


def _costs(member: Member) -> Costs:
    if member.token_ms is None:
        raise ValueError(f"{member.folder}: decoding was not measured")
    return whole_costs(member.token_ms, member.verify_ms)
