"""`ee-scale evaluate`: loss, perplexity and agreement with the final layer, per exit."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.progress import track

from ee_scale.backbone.loading import load_config
from ee_scale.cli.console import console
from ee_scale.cli.inputs import load_tokenizer, sources
from ee_scale.data.dataset import check_tokens
from ee_scale.data.loader import num_windows, windows
from ee_scale.data.text import prepare_text
from ee_scale.errors import UserError
from ee_scale.evaluation.per_exit import ExitQuality, evaluate_exits
from ee_scale.evaluation.report import quality_table, write_report
from ee_scale.exits.placement import exit_spec, resolve_exit_layers
from ee_scale.grid import pick_device
from ee_scale.inference.model import open_model, untrained_exits
from ee_scale.log import configure_logging


def run(config: Any, overrides: Sequence[str]) -> int:
    """Measure and print the table; with `out`, write JSON, CSV and a plot too."""
    configure_logging()
    model = open_for_measuring(config)
    folder = Path(model.config.name_or_path)
    tokenizer = load_tokenizer(folder, "model")
    rows, tokens = measure(config, model, tokenizer, folder)
    console().print(quality_table(rows, f"{config.model} on {config.data}, {tokens:,} tokens"))
    if config.out:
        facts = {"model": str(config.model), "data": sources(config.data), "tokens": tokens}
        write_report(Path(config.out).expanduser(), rows, facts)
    return 0


def open_for_measuring(config: Any) -> Any:
    """The model of an evaluate config, on its device. Raises `UserError`."""
    path = Path(config.model).expanduser()
    if not path.is_dir():
        raise UserError(f"model={config.model}: no such folder")
    device = pick_device(config.device)
    if config.exits is None:
        return open_model(path).to(device).eval()
    model_config = load_config(path)
    if getattr(model_config, "early_exit", None) is not None:
        raise UserError(f"exits={config.exits}: {path} has exits already; leave exits out")
    layers = resolve_exit_layers(config.exits, model_config.num_hidden_layers)
    head = "full" if config.kind == "embedding" else "tied"
    return untrained_exits(path, exit_spec(model_config, layers, config.kind, head, 1)).to(device)


def measure(config: Any, model: Any, tokenizer: Any, tokenizer_dir: Path) -> tuple[list[ExitQuality], int]:
    """Tokenise the data of an evaluate config and run the model over it. Raises `UserError`."""
    if config.seq_length > model.config.max_position_embeddings:
        raise UserError(
            f"seq_length={config.seq_length} is above the model's max_position_embeddings="
            f"{model.config.max_position_embeddings}"
        )
    names = sources(config.data)
    prefixes = prepare_text(names, tokenizer, tokenizer_dir, config.cache_dir, config.text_key, True, fields="")
    check_tokens(prefixes, model.config.vocab_size, 1, names=names, fields="")
    rows = windows(prefixes, config.seq_length, config.batch_size, config.max_tokens)
    total = -(-num_windows(prefixes, config.seq_length, config.max_tokens) // config.batch_size)
    return evaluate_exits(model, _with_progress(rows, total))


def _with_progress(batches: Iterable[Any], total: int) -> Iterator[Any]:
    err = console(stderr=True)
    yield from track(batches, "measuring", total=total, console=err, transient=True, disable=not err.is_terminal)
