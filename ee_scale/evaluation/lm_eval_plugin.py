"""lm-eval's `--model ee-scale`: benchmark scores of one exit, or of an exit policy.

python -m ee_scale.evaluation.lm_eval_plugin --model ee-scale --model_args pretrained=my-model,exit_layer=6 --tasks ...

lm-eval has no entry point for models of other packages, so this module registers the model and hands over to lm-eval's
own command line; a program imports it and calls `lm_eval.simple_evaluate(model="ee-scale", ...)`.
"""

from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from ee_scale.backbone.model_folder import ModelFolder
from ee_scale.data.encode import token_with_row
from ee_scale.errors import UserError
from ee_scale.inference.model import open_model
from ee_scale.modeling.calibration import CALIBRATION_KEY
from ee_scale.modeling.policies import ExitPolicy, choose_layers, resolve_policy

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.utils_hf import get_dtype
except ImportError as error:
    raise ImportError(f"lm-eval is not installed: pip install 'ee-scale[eval]' ({error})") from error

OPTIONS = "exit_"  # prefix of what `generate` takes, too
POSITION_OPTIONS = ("threshold", "patience", "layer", "min_layer")
ELSEWHERE = ("parallelize", "tp_plan", "peft", "delta", "autogptq", "gptqmodel", "gguf_file")


@register_model("ee-scale")
class EarlyExitLM(HFLM):
    """A model with exits (an exported folder or a sidecar); everything but `exit_...` is HFLM's.

    exit_layer=6 alone is exit_policy=fixed. Log-likelihoods: the logits of each position are those of the layer at
    which the policy leaves there; `lossless` and no policy are the final layer's. Generation: `generate` with the same
    options. Limits that differ by exit are joined by colons: exit_threshold=0.9:0.8.
    """

    def __init__(self, pretrained: str, tokenizer: PreTrainedTokenizerBase | None = None, **kwargs: object):
        """Raises ValueError (`UserError`) for a folder or options that do not fit."""
        self.exit_options = {key: _value(kwargs.pop(key)) for key in list(kwargs) if key.startswith(OPTIONS)}
        if "exit_layer" in self.exit_options:
            self.exit_options.setdefault("exit_policy", "fixed")
        tokenizer = tokenizer or str(ModelFolder.named(pretrained, "pretrained").base)
        super().__init__(pretrained, tokenizer=tokenizer, **kwargs)
        rows, pad = self.model.config.vocab_size, self.tokenizer.pad_token_id
        if pad is not None and pad >= rows:
            self.tokenizer.pad_token_id = token_with_row(rows, self.tokenizer.eos_token_id)
        self.policy = self._policy()

    def _get_config(self, pretrained: str, **kwargs: object) -> None:
        super()._get_config(str(ModelFolder.named(pretrained, "pretrained").base), **kwargs)

    def _create_model(self, pretrained: str, dtype: str | torch.dtype = "auto", **kwargs: object) -> None:
        for name in ELSEWHERE:
            if kwargs.get(name):
                raise UserError(f"{name}={kwargs[name]}: not supported by --model ee-scale")
        folder = ModelFolder.named(pretrained, "pretrained").path
        self._model = open_model(folder, dtype=get_dtype(dtype)).to(self.device)

    def _policy(self) -> ExitPolicy:
        layers = self.model.exit_spec.layers if hasattr(self.model, "exit_spec") else ()
        if self.exit_options and not layers:
            raise UserError(f"{next(iter(self.exit_options))}: {self.pretrained} has no exits")
        given = {key.removeprefix(OPTIONS): value for key, value in self.exit_options.items()}
        name = given.get("policy")
        if name is None and given:
            raise UserError(f"exit_{next(iter(given))}: give exit_policy as well")
        chosen = {key: given[key] for key in POSITION_OPTIONS if key in given}
        calibration = getattr(self.model.generation_config, CALIBRATION_KEY, None)
        return resolve_policy(name, layers, calibration=calibration, **chosen)

    def _model_call(
        self, inps: torch.Tensor, attn_mask: torch.Tensor | None = None, labels: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Token ids [B, S] -> logits [B, S, V]."""
        mixed = self.mixed_precision_dtype
        with torch.no_grad(), torch.autocast(self.device.type, dtype=mixed, enabled=mixed is not None):
            if self.policy.name in ("off", "lossless"):
                given = {"output_exit_logits": False} if hasattr(self.model, "exit_spec") else {}
                return self.model(inps, use_cache=False, **given).logits
            output = self.model(inps, use_cache=False)
        logits = output.logits
        exits = {k: output.exit_logits[k] for k in self.policy.layers}
        if exits:
            flat = {k: values.flatten(0, 1) for k, values in exits.items()}
            chosen = choose_layers(self.policy, flat, self.model.config.num_hidden_layers).view(inps.shape)
            for k, values in exits.items():
                logits = torch.where((chosen == k)[..., None], values, logits)
        return logits

    def _model_generate(
        self, context: torch.Tensor, max_length: int, stop: list[str], **kwargs: object
    ) -> torch.Tensor:
        """Token ids [B, P] -> [B, P + new]. kwargs come from the task's file, which names no file to write."""
        if own := [key for key in kwargs if key.startswith(OPTIONS)]:
            raise UserError(f"{own[0]}: in generation_kwargs of the task; give it in --model_args")
        kwargs["tokenizer"] = self.tokenizer  # for stop strings of the model's own generation config
        if self.policy.name == "off":
            return super()._model_generate(context, max_length, stop, **kwargs)
        if not kwargs.get("temperature"):  # 0 means greedy, as in HFLM
            kwargs = {**kwargs, "do_sample": kwargs.get("do_sample") or False, "temperature": None}
        return self.model.generate(
            context,
            max_length=max_length,
            stopping_criteria=StoppingCriteriaList([StopTexts(self.tokenizer, stop, context.shape[1])]),
            pad_token_id=self.tokenizer.pad_token_id,
            **kwargs,
            **self.exit_options,
        )


class StopTexts(StoppingCriteria):
    """Ends a row whose new text contains a stop text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: list[str], prompt_length: int):
        self.tokenizer, self.stop, self.prompt_length = tokenizer, stop, prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: object) -> torch.Tensor:
        """[R, S] -> bool [R]."""
        texts = self.tokenizer.batch_decode(input_ids[:, self.prompt_length :])
        return torch.tensor([any(end in text for end in self.stop) for text in texts], device=input_ids.device)


def _value(value: object) -> Any:
    """lm-eval splits its arguments at commas; a list comes with colons."""
    return [float(part) for part in value.split(":")] if isinstance(value, str) and ":" in value else value


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
