"""`ee-scale generate`: continue prompts on one device, or on a grid of stages and tensor ranks."""

import sys
from collections.abc import Sequence
from pathlib import Path

from ee_scale.cli.console import console
from ee_scale.config.schema import GenerateConfig
from ee_scale.data.inputs import load_tokenizer
from ee_scale.errors import UserError
from ee_scale.evaluation.colours import PieceStreamer, legend, paint
from ee_scale.files import write_text
from ee_scale.grid import Layout, launch_info, pick_device, world_size_message
from ee_scale.inference.request import Request, check_config, check_model, check_prompts
from ee_scale.inference.run import Answers, answer_lines, answer_rows, decode_here, decode_on_grid
from ee_scale.launching.ranks import run_ranks
from ee_scale.log import configure_logging, visible
from ee_scale.planning.out_of_memory import decoding_advice, told_when_full


def run(config: GenerateConfig, overrides: Sequence[str]) -> int:
    """Continue the prompts in this process, or in ranks that it starts; under torchrun this process is one of them."""
    launched, layout = launch_info(), Layout(config.parallel.tp, config.parallel.pp)
    leader = launched is None or launched.rank == 0
    configure_logging(0 if leader else 1)
    check_config(config)
    if launched is not None and launched.world_size != layout.world_size:
        raise UserError(world_size_message(layout, launched.world_size))
    folder = check_model(config)
    device = pick_device(config.device, launched.local_rank if launched else 0)
    if launched is None and layout.world_size > 1:
        tokenizer = load_tokenizer(folder.base, "model")
        if config.prompt != "-":  # that one is for rank 0 to read
            check_prompts(config, folder, tokenizer)
        return run_ranks("generate", overrides, layout.world_size, device)
    request = check_prompts(config, folder, load_tokenizer(folder.base, "model")) if leader else None
    streamer = open_stream(request) if request is not None and request.streams else None
    longest = max(map(len, request.prompts)) if request is not None else 0
    with told_when_full(lambda: decoding_advice(config, folder, longest)):
        if request is not None and layout.world_size == 1:
            answers = decode_here(request, device, streamer)
        else:
            answers = decode_on_grid(config, folder, request, layout, device, streamer)
    if request is not None:
        finish(request, answers)
    return 0


def finish(request: Request, answers: Answers) -> None:
    """Write what was not streamed, then one line of numbers to stderr."""
    if not request.streams:
        lines = answer_lines(answer_rows(request, answers))
        if request.config.out is None:
            sys.stdout.write(_for_stdout(lines))
        else:
            write_text(Path(request.config.out).expanduser(), lines)
    flat, err = [k for layers in answers.layers for k in layers], console(stderr=True)
    if request.config.show_exits:
        shown = [None if k == request.num_layers else k for k in flat]
        err.print(legend(shown, request.exit_layers, request.num_layers, "layer of each token"))
    depth = ""
    if request.config.policy not in ("off", "lossless"):  # in lossless mode every layer has seen every token
        depth = f", mean depth {sum(flat) / len(flat):.1f} of {request.num_layers}"
    err.print(
        f"{len(flat)} tokens in {answers.seconds:.2f} s: {len(flat) / answers.seconds:.1f} tokens/s{depth}"
        + _policy_words(request, flat, answers.stats),
        highlight=False,
    )


def _policy_words(request: Request, layers: list[int], stats: dict[str, float]) -> str:
    if "drafted" in stats:
        return f", {stats['accepted']} of {stats['drafted']} drafts accepted"
    if request.config.policy == "off":
        return ""
    words = f", {sum(k < request.num_layers for k in layers) / len(layers):.0%} of the tokens left early"
    if "audited" in stats:
        words += f", {stats['agreed']} of {stats['audited']} audited ones agree with the whole model"
    return words


class Stream(PieceStreamer):
    """Text to stdout as it comes, and a new line at the end."""

    def end(self) -> None:
        super().end()
        self.write("\n", None)


def open_stream(request: Request) -> Stream:
    """The streamer of a request's one answer; on a terminal with `show_exits`, in colours."""
    coloured = request.config.show_exits and console().is_terminal

    def write(piece: str, layer: int | None) -> None:
        piece = _for_stdout(piece)
        sys.stdout.write(paint(piece, request.exit_layers, layer) if coloured else piece)
        sys.stdout.flush()

    return Stream(request.tokenizer, write)


def _for_stdout(text: str) -> str:
    """A pipe or file gets the text as it is; on a terminal it must not give commands."""
    return visible(text) if sys.stdout.isatty() else text
