"""A base model's tensors with what a run trained of them: whole weights, or adapters that are merged."""

from pathlib import Path

import torch

from ee_scale.backbone.adapters import DOWN, UP, merged
from ee_scale.backbone.loading import TensorFolder
from ee_scale.backbone.model_folder import ModelFolder
from ee_scale.backbone.model_tensors import ModelTensors
from ee_scale.backbone.narrowing import narrowed
from ee_scale.families.build import meta_model

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


class TrainedBase(ModelTensors):
    """Reads like the base folder. A trained tensor has the base tensor's number type, rounded once from fp32."""

    def __init__(self, base: Path, checkpoint: Path, files: list[str]):
        """`files`: of the checkpoint, with what was trained of the backbone; none: the base model as it is."""
        self.config = config = ModelFolder(base).decoder_config
        super().__init__(base, meta_model(config, torch.float32))
        self._trained = TensorFolder(checkpoint, [checkpoint / name for name in files])
        self._tied = config.tie_word_embeddings

    def is_trained(self, name: str) -> bool:
        """Whether the tensor differs from the base folder's."""
        return self._key(name) in self._trained or name.removesuffix(".weight") + UP in self._trained

    def read(self, name: str, dim: int | None = None, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """As `TensorFolder.read`."""
        if not self.is_trained(name):
            return super().read(name, dim, start, stop)
        if self._key(name) in self._trained:
            whole = narrowed(self._trained.read(self._key(name)), super().read(name, 0, 0, 1).dtype, name)
        else:
            down, up = (self._trained.read(name.removesuffix(".weight") + part) for part in (DOWN, UP))
            whole = merged(super().read(name), down, up, name)
        return whole if dim is None else whole[(slice(None),) * dim + (slice(start, stop),)]

    def _key(self, name: str) -> str:
        # A folder of a tied model may hold its one matrix under both names.
        return EMBEDDING if name == HEAD and self._tied else name
