"""Take a model with exits to EE-LLM's format and back, then bound its threshold exits.

python convert_calibrate.py <model with exits> <held-out text> <output folder>   # tune_exits.py makes the first
"""

import sys

import ee_scale
from ee_scale.config.convert import ConvertConfig
from ee_scale.config.schema import CalibrateConfig, EvaluateConfig


def main(
    model: str = "runs/example/model", held_out: str = "python:valid", out: str = "runs/example_converted"
) -> None:
    there = ConvertConfig(src=model, out=f"{out}/ee-llm", to="megatron_legacy", pp=2, verify=True)
    agreement = ee_scale.convert(there, tell=print).agreement
    print(f"largest difference of the logits, relative: {agreement.logits:.1g}")
    back = ee_scale.convert(ConvertConfig(src=there.out, out=f"{out}/model", to="hf")).folder

    text = {"data": held_out, "seq_length": 16, "max_tokens": 4096}
    bound = CalibrateConfig(str(back), agreement=0.5, confidence=0.95, **text)
    found = ee_scale.calibrate(bound).found  # stored in generation_config.json, where generate finds it
    print(f"limits {found.limits}: {found.match_rate:.1%} of the tokens unchanged, mean depth {found.mean_depth:.2f}")

    for row in ee_scale.evaluate(EvaluateConfig(str(back), **text)).exits:
        agreed = "" if row.agreement is None else f", agreement {row.agreement:.1%}"
        print(f"layer {row.layer}: loss {row.loss:.3f}{agreed}")


if __name__ == "__main__":
    main(*sys.argv[1:])
