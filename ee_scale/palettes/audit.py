"""Does a size give back what it was trained on? It goes on from training text, and what it writes is looked up there.

Prompts are beginnings of training documents: what an attacker who knows a part of one can do at most (discoverable
memorisation, Carlini et al., arXiv 2202.07646). Only what is written behind the prompt counts.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ee_scale.data.corpora import num_tokens, open_tokens, read_tokens
from ee_scale.data.dataset import check_tokens
from ee_scale.data.inputs import load_tokenizer, run_prefixes
from ee_scale.errors import UserError
from ee_scale.log import log
from ee_scale.palettes.overlap import Overlap, overlaps
from ee_scale.palettes.writing import write_on
from ee_scale.planning.supernet import SupernetPlan

PROMPT, NEW = 16, 128  # tokens
MOST_TOKENS = 20_000_000  # of the corpus that are read


class Audit:
    """Prompts from a run's training text, what models write behind them, and the text to look it up in."""

    def __init__(self, plan: SupernetPlan, digests: list[str], samples: int, seed: int, device: torch.device):
        """digests: of the tokens of each source that the run was trained on. Raises `UserError` where they changed."""
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(plan.model_dir)
        prefixes = run_prefixes(plan.config.data, plan.model_dir)
        if check_tokens(prefixes, plan.map.config.vocab_size, 1, tokenizer=self.tokenizer) != digests:
            raise UserError(f"audit=true: data.path={plan.config.data.path}: the run was trained on other text")
        self.datasets = [open_tokens(prefix) for prefix in prefixes]
        self.seed, self.device, self.written = seed, device, dict[str, Sequence[str]]()
        self.new = min(NEW, plan.map.config.max_position_embeddings - PROMPT)
        self.prompts = self._prompts(samples)

    def _prompts(self, samples: int) -> torch.Tensor:
        """int64 [samples, PROMPT]: beginnings of documents, any as likely as any other that goes on behind them."""
        starts = [bounds[:-1][np.diff(bounds) > PROMPT] for bounds in map(_bounds, self.datasets)]
        ends = np.cumsum([len(places) for places in starts])
        if not ends[-1]:
            raise UserError(f"audit=true: no training document has more than {PROMPT} tokens")
        rows = []
        for n in torch.randint(int(ends[-1]), (samples,), generator=torch.Generator().manual_seed(self.seed)).tolist():
            number = int(np.searchsorted(ends, n, side="right"))
            place = starts[number][n - (int(ends[number - 1]) if number else 0)]
            rows.append(torch.from_numpy(read_tokens(self.datasets[number], int(place), PROMPT)))
        return torch.stack(rows)

    def write(self, name: str, model: PreTrainedModel) -> None:
        """Let a model write, sampled from its whole distribution."""
        torch.nn.Module.to(model, self.device)
        end = self.tokenizer.eos_token_id
        rows = write_on(model, self.prompts, self.new, end, sampled=True, seed=self.seed)
        self.written[name] = [
            text for ids in rows for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        ]

    def corpus(self) -> Iterator[str]:
        """The training documents as the model's tokenizer writes them; at most MOST_TOKENS."""
        left = MOST_TOKENS
        for dataset in self.datasets:
            for start, end in pairwise(_bounds(dataset).tolist()):
                if left <= 0:
                    return
                left -= end - start
                yield self.tokenizer.decode(read_tokens(dataset, start, end - start), skip_special_tokens=True)

    def found(self) -> dict[str, Overlap]:
        """Of all who wrote."""
        if (total := sum(map(num_tokens, self.datasets))) > MOST_TOKENS:
            log.warning("audit: reads the first %d of %d training tokens", MOST_TOKENS, total)
        return overlaps(self.written, self.corpus())


def _bounds(dataset: IndexedDataset) -> np.ndarray:
    """int64 [documents + 1]: where documents begin, in tokens, and the end."""
    lengths = np.concatenate([[0], np.cumsum(dataset.sequence_lengths, dtype=np.int64)])
    return lengths[dataset.document_indices]
