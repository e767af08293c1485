"""`--help`: what each command does and every setting, from the schema's own help lines."""

import sys
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any

from rich.table import Table
from rich.text import Text

from ee_scale.cli.console import console
from ee_scale.config.compose import group_options, has_groups
from ee_scale.config.schema import PREFIXES, VERBS

EXAMPLES = {
    "tune": (
        "ee-scale tune model=<HF dir> data=<.txt | .jsonl | folder> exits.layers=[3,6,9] out=runs/a",
        "ee-scale tune exits=drafter model=<HF dir> data=corpus.txt data.cache_taps=true data.sequences=4000",
        "ee-scale tune +debug=cpu",
        "torchrun --nproc-per-node 4 -m ee_scale tune model=<HF dir> data=corpus.txt parallel.tp=2 parallel.pp=2",
    ),
    "supernet": (
        "ee-scale supernet model=<BERT dir> data=train.jsonl data.valid=valid.jsonl space=bert_small out=runs/s",
        "ee-scale supernet model=<Llama dir> data=corpus.txt space=decoder recipe=pretrained parallel.pp=2 out=runs/s",
        "ee-scale supernet +debug=supernet_cpu",
    ),
    "palette": (
        "ee-scale palette src=runs/s count=6 out=palette",
        "ee-scale palette src=runs/s objective=latency_ms max_latency_ms=5 max_memory_mb=60 onnx=true out=palette",
        "ee-scale palette src=runs/d drafts=true out=palette",
    ),
    "export": (
        "ee-scale export src=runs/a kind=early_exit out=my-model",
        "ee-scale export src=runs/a kind=submodel exit=6 out=my-6-layers",
        "ee-scale export src=my-6-layers format=onnx int8=true out=my-6-layers-onnx",
        "ee-scale export src=my-6-layers format=gguf type=q8_0 out=my-6-layers.gguf",
        "ee-scale export src=runs/a kind=drafter exit=6 out=my-drafter data=held-out.txt",
    ),
    "convert": (
        "ee-scale convert src=path/to/llama to=megatron_core tp=2 pp=4 out=llama-megatron",
        "ee-scale convert src=llama-megatron to=hf verify=true out=llama-again",
        "ee-scale convert src=ee-llm-checkpoint to=hf model=<HF dir with tokenizer> out=my-model",
    ),
    "evaluate": (
        "ee-scale evaluate model=my-model data=heldout.txt",
        "ee-scale evaluate model=my-model data=heldout.jsonl tag_key=task sweep=true out=report",
    ),
    "calibrate": ("ee-scale calibrate model=my-model data=heldout.txt agreement=0.98 confidence=0.95",),
    "defer": (
        "ee-scale defer small=my-model large=big-model data=questions.jsonl loss=0.02 out=deferral",
        "ee-scale defer task=classify small=palette/s large=palette/l data=test.jsonl link.ms=80 out=deferral",
    ),
    "probe": ("ee-scale probe model=<HF dir>", "ee-scale probe model=my-model data=heldout.txt out=probe"),
    "report": (
        "ee-scale report log=decisions.jsonl every=day",
        "ee-scale report log='logs/*.jsonl' tag=sql out=report",
    ),
    "generate": (
        'ee-scale generate model=my-model policy=lossless prompt="def main():"',
        'ee-scale generate model=my-model policy=threshold threshold=0.8 prompt="def main():" --show-exits',
        "ee-scale generate model=my-model policy=threshold prompts=prompts.jsonl out=answers.jsonl batch_size=8",
        "ee-scale generate model=my-model policy=threshold parallel.pp=2 prompt=- < prompt.txt",
    ),
    "serve": (
        "ee-scale serve model=my-model policy=lossless",
        "EE_SCALE_API_KEY=... ee-scale serve model=my-model policy=threshold policies=[threshold] host=0.0.0.0",
        "ee-scale serve model=my-model deferral=deferral/deferral.json upstream=http://gpu:8000/v1 upstream_model=big",
    ),
    "demo": ("ee-scale demo",),
}


PREFIX_EXAMPLES = {
    "check": (
        "ee-scale check tune model=<HF dir> data=corpus.txt parallel.tp=2 parallel.pp=4 backbone=full",
        "ee-scale check supernet +debug=supernet_cpu",
        "ee-scale check model=<HF dir>   (whether exits can be added to it, and what else it can do)",
    ),
    "trace": ("ee-scale trace tune +debug=cpu logging.trace_steps=2",),
    "launch": (
        "ee-scale launch tune model=<HF dir> data=corpus.txt parallel.pp=4 launcher=slurm launcher.nodes=2 --dry-run",
        "ee-scale launch tune model=<HF dir> data=corpus.txt launcher=torchrun launcher.nodes=2 launcher.head=node0",
    ),
}


# One screen of 24 x 80.
GUIDE = """\
ee-scale gives a frozen Hugging Face model early exits, to decode faster, or
cuts smaller models from it. It trains a few percent of the weights, on one CPU,
one GPU or a grid of them (tensor x pipeline x data).

Try first:
  ee-scale demo                        the whole path, in a few minutes
  ee-scale tune +debug=cpu             the smallest complete run, under a minute
  ee-scale probe model=path/to/model   what exits would bring on your model

By use:
  train exits                tune, then export
  decode with exits          generate, serve; bounds on quality: calibrate
  ask a larger model         defer: only where a small one is unsure
  measure exits              probe, evaluate; logs from production: report
  cut smaller models         supernet, then palette
  other formats              convert; ONNX: export format=onnx
  around a training run      check, trace or launch, in front of the command

Help:
  ee-scale <command> --help   its settings; --cfg prints the config and stops
  ee-scale --help             all commands, one line each
  ee-scale --models           what each family of models can do
"""


def guide() -> None:
    """What there is and where to begin."""
    sys.stdout.write(GUIDE)


def overview() -> None:
    """The commands, one line each."""
    out = console()
    out.print(
        "[bold]ee-scale[/] <command> key=value ...   early exits and smaller sizes of frozen HF models\n", markup=True
    )
    table = Table.grid(padding=(0, 3))
    for verb, schema in VERBS.items():
        table.add_row(Text(f"  {verb}", style="bold"), schema.__doc__)
    out.print(table)
    out.print("\nIn front of tune and supernet:\n")
    table = Table.grid(padding=(0, 3))
    for prefix, text in PREFIXES.items():
        table.add_row(Text(f"  {prefix}", style="bold"), text)
    out.print(table)
    out.print("\nee-scale <command> --help lists its settings; --cfg prints the resolved config and stops.")
    out.print("ee-scale --models lists the families of models and what each can do.")


def prefix_help(prefix: str) -> None:
    """What a word in front of a training command does."""
    out = console()
    out.print(f"[bold]ee-scale {prefix}[/] tune|supernet key=value ...: {PREFIXES[prefix]}\n", markup=True)
    for example in PREFIX_EXAMPLES[prefix]:
        out.print(f"  {example}", highlight=False)
    out.print("\nIts settings are those of the command: ee-scale tune --help, ee-scale supernet --help.")


def verb_help(verb: str) -> None:
    """Every setting of a command with its default."""
    out, schema = console(), VERBS[verb]
    out.print(f"[bold]ee-scale {verb}[/]: {schema.__doc__}\n", markup=True)
    for example in EXAMPLES.get(verb, ()):
        out.print(f"  {example}", highlight=False)
    out.print(f"\n--config FILE in place of all settings: a run's config.yaml, or what ee-scale {verb} --cfg printed.")
    if has_groups(verb):
        out.print("\nReady-made groups (choose with group=option):")
        for group, options in group_options(verb).items():
            plus = "+" if group == "debug" else ""
            out.print(f"  {plus}{group}={' '.join(options)}", highlight=False)
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("setting", no_wrap=True)
    table.add_column("default", overflow="fold")
    table.add_column("meaning", overflow="fold")
    for key, default, text in _settings(schema):
        table.add_row(key, default, text)
    out.print()
    out.print(table)


def _settings(schema: type, prefix: str = "") -> list[tuple[str, str, str]]:
    rows = []
    for field in fields(schema):
        if is_dataclass(field.default_factory):
            rows += _settings(field.default_factory, f"{prefix}{field.name}.")
            continue
        text = field.metadata["help"]
        if rule := field.metadata.get("rule"):
            text += f" ({rule.words.removeprefix('must be ').removeprefix('choose one of ')})"
        name = field.metadata.get("written", field.name)
        rows.append((prefix + name, _default(field), text))
    return rows


def _default(field: Field[Any]) -> str:
    value = field.default if field.default_factory is MISSING else field.default_factory()
    return {"???": "required", "None": "null"}.get(str(value), str(value))
