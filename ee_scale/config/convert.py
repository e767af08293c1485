"""Settings of `ee-scale convert`."""

from dataclasses import dataclass
from pathlib import Path

from omegaconf import MISSING

from ee_scale.config.groups import above, at_least, one_of, setting


@dataclass
class ConvertConfig:
    """Turn checkpoints of Hugging Face, Megatron-Core, Megatron-LM, EE-LLM and DeepSpeed into one another."""

    src: str = setting(MISSING, "folder or GGUF file to read; it is never changed")
    out: str = setting(MISSING, "folder to write; must not exist")
    to: str = setting(
        MISSING,
        "hf: safetensors (with exits, if src has them); megatron_core: torch_dist; megatron_legacy: mp_rank_* files; "
        "sidecar: exits alone, for the base model in model=",
        rule=one_of("hf", "megatron_core", "megatron_legacy", "sidecar"),
    )
    source: str = setting(
        "auto",
        "format of src",
        rule=one_of("auto", "hf", "sidecar", "megatron_core", "megatron_legacy", "deepspeed"),
        written="from",
    )
    tp: int = setting(1, "tensor ranks to write for", rule=at_least(1))
    pp: int = setting(1, "pipeline stages to write for", rule=at_least(1))
    ep: int = setting(1, "megatron_legacy: expert ranks to write for (torch_dist serves any number)", rule=at_least(1))
    first_stage_layers: int | None = setting(
        None, "layers of the first stage, if not as many as of the others (--decoder-first-pipeline-num-layers)"
    )
    last_stage_layers: int | None = setting(
        None, "layers of the last stage, if not as many as of the others (--decoder-last-pipeline-num-layers)"
    )
    dtype: str = setting("auto", "number type to write; auto: as in src", rule=one_of("auto", "fp32", "fp16", "bf16"))
    classes: str = setting(
        "auto",
        "megatron_legacy: state dict of Megatron-Core's GPTModel (core), or of the old language_model classes, which "
        "EE-LLM uses (legacy); auto: legacy for a model with exits",
        rule=one_of("auto", "core", "legacy"),
    )
    spec: str = setting(
        "te",
        "megatron_legacy, core: layers of Transformer Engine or Megatron's own (local)",
        rule=one_of("te", "local"),
    )
    model: str | None = setting(
        None, "Hugging Face folder of the same model: config and tokenizer that a checkpoint does not have itself"
    )
    adapter: str | None = setting(None, "folder of peft with LoRA weights, which are merged on the way")
    iteration: int | None = setting(None, "iteration to read; null: the latest")
    shard_gb: float = setting(5.0, "hf: largest file, in GB", rule=above(0))
    vocab_divisor: int = setting(128, "Megatron's --make-vocab-size-divisible-by", rule=at_least(1))
    workers: int = setting(4, "files written at the same time", rule=at_least(1))
    plan: bool = setting(False, "print which tensors would be made of what, and stop")
    verify: bool = setting(False, "afterwards run random tokens through source and result, layer by layer, and compare")
    trust: bool = setting(False, "run code that pickled files of src name; only for files of people you trust")

    @property
    def src_folder(self) -> Path:
        return Path(self.src).expanduser()

    @property
    def out_folder(self) -> Path:
        return Path(self.out).expanduser()

    @property
    def model_folder(self) -> Path | None:
        return None if self.model is None else Path(self.model).expanduser()

    @property
    def adapter_folder(self) -> Path | None:
        return None if self.adapter is None else Path(self.adapter).expanduser()

    @property
    def uneven(self) -> tuple[int | None, int | None]:
        """Layers of the first and of the last stage where these were chosen."""
        return self.first_stage_layers, self.last_stage_layers
