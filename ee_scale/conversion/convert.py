"""What a `convert` config asks for: plan, then carry out; with `verify`, compare source and result."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from ee_scale.config.convert import ConvertConfig
from ee_scale.conversion.check.verify import Agreement, verify
from ee_scale.conversion.copying import differing_copies
from ee_scale.conversion.execute import Conversion, run
from ee_scale.conversion.plan import make_conversion, open_result
from ee_scale.conversion.show import plan_lines, summary
from ee_scale.errors import UserError
from ee_scale.progress import transfer


@dataclass
class Converted:
    """A conversion that was planned, or carried out.

    Attributes:
        folder: that was written; None for a plan.
        lines: what a person should know of it; of a plan, every new tensor and what it would be made of.
        agreement: of source and result, where they were compared.
    """

    folder: Path | None = None
    lines: list[str] = field(default_factory=list)
    agreement: Agreement | None = None


def convert(config: ConvertConfig, tell: Callable[[str], None]) -> Converted:
    """Write the folder `out`. `tell` gets each of the lines as soon as it is known. Raises `UserError`."""
    out, done = config.out_folder, Converted()
    if out.exists():
        raise UserError(f"out={out}: exists already; choose another folder")
    conversion = make_conversion(config)
    if config.verify and conversion.opened.model.config is None:
        raise UserError("verify=true: without a config there is no model to run; give model=<Hugging Face folder>")
    if config.plan:
        return Converted(lines=list(plan_lines(conversion)))

    def say(line: str) -> None:
        done.lines.append(line)
        tell(line)

    def check(folder: Path) -> None:
        if config.verify:
            done.agreement = _compare(conversion, config, folder)

    for item in differing_copies(conversion.opened.stored, conversion.source):
        say(f"{item.extent.path}: '{item.piece.key}' differs from what it is a copy of, which is what counts")
    for note in [*conversion.notes, summary(conversion)]:
        say(note)
    with transfer("writing", conversion.nbytes) as moved:
        run(conversion, config.workers, moved, check)
    for line in conversion.source.values.lines():
        say(line)
    done.folder = out
    return done


def _compare(conversion: Conversion, config: ConvertConfig, folder: Path) -> Agreement:
    """Compare what was written with the source, before it gets its name."""
    try:
        return verify(conversion.opened, open_result(config, folder))
    except UserError as error:
        raise UserError(f"{error}; what was written is in {folder}, under no other name") from error
