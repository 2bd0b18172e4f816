"""Trains one small pruned GPT twice, masked dense and compact, and measures what that saves.

Two processes train on the source code and the documentation of Python's standard library: a short
dense warm-up, then 90 % of the weights are pruned by magnitude, then the pruned model goes on
twice, with equal seeds and data, once as DDP with masks and once compact. Both are timed in turn
on the loopback and, where root and network namespaces are to be had, over a slow link.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from lib import quickstart_plot
from lib import quickstart_report as report
from lib.launch import RankFailed, stop_on_signals
from lib.machine import provenance
from lib.netns import LinkUnavailable
from lib.quickstart_stages import Results, run_stages
from lib.settings import Settings
from rich.console import Console

PACKAGES = ("torch", "numpy", "sparse-comm")
MINIMUM_STEPS = 5  # the first steps of each block are not timed


def main() -> int:
    options = parse_arguments()
    settings = Settings(
        **{key: vars(options)[key] for key in vars(options).keys() & asdict(Settings())}
    )
    stop_on_signals()
    console = Console()
    errors = Console(stderr=True, markup=False, highlight=False)
    origin = provenance(command_line(), PACKAGES)
    try:
        results = run_stages(settings, options.link, options.rate, console)
    except (RankFailed, LinkUnavailable) as error:
        errors.print(f"{error}\nquickstart failed; everything that it started was stopped.")
        return 1
    except KeyboardInterrupt:
        errors.print("Stopped; no process and no network namespace is left.")
        return 130
    write_report(results, settings, origin, options.out, console)
    return 0


def parse_arguments() -> argparse.Namespace:
    defaults = Settings()
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Writes report.md, report.json and plot.png. Takes a few minutes on two cores.",
    )

    def add(name: str, convert: type, text: str) -> None:
        default = getattr(defaults, name.replace("-", "_"))
        parser.add_argument(
            f"--{name}", type=convert, default=default, help=f"{text} (default: {default})"
        )

    add("warmup", int, "dense steps before pruning")
    add("steps", int, "steps of each training on the loopback")
    add("link-steps", int, "steps of each training over the slow link")
    add("sparsity", float, "fraction of the transformer blocks' weights to prune")
    add("layers", int, "transformer blocks")
    add("width", int, "width of the model, a multiple of 64")
    add("batch", int, "sequences per rank and step")
    add("context", int, "bytes per sequence")
    add("seed", int, "seed of initial weights and data order")
    parser.add_argument(
        "--weights",
        choices=("cached", "transient"),
        default=defaults.weights,
        help="cached keeps a dense copy of each weight (fastest), transient makes it when its "
        "layer runs (least memory) (default: %(default)s)",
    )
    parser.add_argument(
        "--link",
        choices=("auto", "loopback", "netns"),
        default="auto",
        help="netns: also over a slow link between two network namespaces, needs root; "
        "loopback: not so; auto: where it is possible (default: %(default)s)",
    )
    parser.add_argument(
        "--rate", default="1gbit", help="speed of that link, as 'tc' writes it (default: 1gbit)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("results/quickstart"),
        help="folder for the report (default: %(default)s)",
    )
    options = parser.parse_args()
    check(parser, options)
    return options


def check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Refuse what cannot work before any process starts."""
    if sys.platform != "linux":
        parser.error(f"this script needs Linux; this is {sys.platform}")
    if options.width % 64 or options.width < 64:
        parser.error(f"--width is {options.width}; it must be a multiple of 64, such as 512")
    if not 0 < options.sparsity < 1:
        parser.error(f"--sparsity is {options.sparsity}; it must lie between 0 and 1, such as 0.9")
    for name in ("steps", "link_steps"):
        if getattr(options, name) < MINIMUM_STEPS:
            parser.error(
                f"--{name.replace('_', '-')} is {getattr(options, name)}; "
                f"at least {MINIMUM_STEPS} are needed to time any"
            )
    for name in ("warmup", "layers", "batch", "context"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} is {getattr(options, name)}; it must be at least 1")


def command_line() -> str:
    """The command to repeat this run, without --out: results hold no paths."""
    arguments = iter(sys.argv[1:])
    kept = []
    for argument in arguments:
        if argument == "--out":
            next(arguments)
        elif not argument.startswith("--out="):
            kept.append(argument)
    return " ".join(["python scripts/quickstart.py", *kept])


def write_report(
    results: Results, settings: Settings, origin: dict[str, str], out: Path, console: Console
) -> None:
    """Print the table, and write it with the plot into ``out``."""
    rows = report.table_rows(results.links, results.ranks)
    notes = report.notes(results.links, results.ranks, settings, results.why_no_link)
    facts = {"settings": asdict(settings), "notes": notes, "first stage": results.ranks}
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.md").write_text(report.markdown(rows, notes, origin))
    measured = report.as_json(rows, results.links, facts, origin)
    (out / "report.json").write_text(json.dumps(measured, indent=1) + "\n")
    warm_up = report.warm_up_losses(results.ranks)
    quickstart_plot.draw(rows, results.links[0], warm_up, out / "plot.png")
    console.print(report.rich_table(rows))
    console.print(f"Written: report.md, report.json and plot.png in {out}", highlight=False)


if __name__ == "__main__":
    sys.exit(main())
