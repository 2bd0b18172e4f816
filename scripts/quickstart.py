"""Trains one small pruned GPT twice, masked dense and compact, and measures what that saves.

Two processes train on the source code and the documentation of Python's standard library: a short
dense warm-up, then 90 % of the weights are pruned by magnitude, then the pruned model goes on
twice, with equal seeds and data, once as DDP with masks and once compact. Both are timed in turn
on the loopback and, where root and network namespaces are to be had, over a slow link.

With --framework deepspeed it is scripts/compare_comm.py in small: a GPT of 6 blocks trains for 20
steps under DeepSpeed's ZeRO 1, in bf16, dense, masked dense and compact. With --framework axonn
likewise: 12 steps, on two pipeline stages × two replicas.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

import compare_comm
from lib import quickstart_plot, results
from lib import quickstart_report as report
from lib.compare_run import Plan, compare
from lib.launch import RankFailed, stop_on_signals
from lib.netns import LinkUnavailable
from lib.quickstart_stages import run_stages
from lib.settings import Settings

NAME = "quickstart"
PLOT = f"{NAME}.png"
WRITTEN = f"{NAME}.md, {NAME}.json and {PLOT}"
MINIMUM_STEPS = 5  # the first steps of each block are not timed
PYTORCH = "pytorch"
LINK, RATE = "auto", "1gbit"  # defaults
SMALL: dict[str, tuple[list, dict[str, int]]] = {  # what is compared, and the sizes
    "deepspeed": ([1], {"layers": 6, "warm_up": 20, "steps": 20}),
    "axonn": ([(2, 2)], {"layers": 6, "warm_up": 20, "steps": 12}),
}


def main() -> int:
    """Run the stages and write the report; returns the exit status."""
    options = parse_arguments()
    return run_pytorch(options) if options.framework == PYTORCH else run_comparison(options)


def run_comparison(options: argparse.Namespace) -> int:
    """``compare_comm.py`` in small."""
    framework = compare_comm.FRAMEWORKS[options.framework]
    sections, size = SMALL[options.framework]
    out = options.out or results.FOLDER / options.framework
    size = framework.full | size | {"seed": options.seed}
    plan = Plan(sections, compare_comm.LINKS, size, out, NAME, judge_times=False)
    return compare(framework, plan)


def run_pytorch(options: argparse.Namespace) -> int:
    out = options.out or results.FOLDER / NAME
    stop_on_signals()
    console = Console()
    errors = Console(stderr=True, markup=False, highlight=False, soft_wrap=True)
    given = vars(options)
    settings = Settings(**{name: given[name] for name in asdict(Settings()) if name in given})
    origin = results.origin()
    warnings = busy_warnings()
    for warning in warnings:
        console.print(warning)
    try:
        stages, why_no_link = run_stages(settings, options.link, options.rate, console)
    except (RankFailed, LinkUnavailable) as error:
        errors.print(f"{error}\nQuickstart failed; everything that it started was stopped.")
        return 1
    except KeyboardInterrupt:
        errors.print("Stopped; no process and no network namespace is left.")
        return 130
    rows = report.table_rows(stages)
    notes = warnings + report.notes(stages, settings, why_no_link)
    measured = {
        "settings": asdict(settings),
        "notes": notes,
        "table": [asdict(row) | {"ratio": row.ratio} for row in rows],
        "stages": [asdict(stage) for stage in stages],
    }
    title = "The same pruned training, dense and compact"
    results.write(out, NAME, measured, title, report.markdown(rows, notes, PLOT), origin)
    quickstart_plot.draw(rows, stages[0], out / PLOT)
    console.print(report.rich_table(rows))
    console.print(f"Written: {WRITTEN} in {out}", highlight=False)
    return 0


def busy_warnings() -> list[str]:
    """What to say where other programs compete for the cores, which hides what is gained."""
    load, cores = os.getloadavg()[0], len(os.sched_getaffinity(0))
    if load < cores / 2:
        return []
    return [
        f"Other programs were busy at the start (load average {load:.1f}, {cores} cores): times "
        "are noisy, and above all the ratio of step times is not to be trusted. Bytes are."
    ]


def parse_arguments() -> argparse.Namespace:
    """All options; those that only PyTorch takes are as in Settings, LINK and RATE if not given."""
    defaults = asdict(Settings()) | {"link": LINK, "rate": RATE}
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"Writes {WRITTEN}. Takes about three minutes on two cores.",
    )

    parser.add_argument(
        "--framework",
        choices=(PYTORCH, *compare_comm.FRAMEWORKS),
        default=PYTORCH,
        help="that trains; others than %(default)s take --seed and --out only "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of initial weights and data order (default: 0)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="folder for the report (default: results/quickstart of the checkout, or results/ and "
        "the framework)",
    )
    pytorch = parser.add_argument_group("options of PyTorch")

    def add(name: str, convert: type, text: str, choices: Sequence[str] | None = None) -> None:
        pytorch.add_argument(
            f"--{name}",
            type=convert,
            choices=choices,
            default=argparse.SUPPRESS,  # whether it was given shows
            help=f"{text} (default: {defaults[name.replace('-', '_')]})",
        )

    add("warmup", int, "dense steps before pruning")
    add("steps", int, "steps of each training on the loopback")
    add("link-steps", int, "steps of each training over the slow link")
    add("sparsity", float, "fraction of the transformer blocks' weights to prune")
    add("layers", int, "transformer blocks")
    add("width", int, "width of the model, a multiple of 64")
    add("batch", int, "sequences per rank and step")
    add("context", int, "bytes per sequence")
    add(
        "weights",
        str,
        "cached keeps a dense copy of each weight (fastest), transient makes it when its layer "
        "runs (least memory)",
        ("cached", "transient"),
    )
    add(
        "link",
        str,
        "netns: also over a slow link between two network namespaces, needs root; loopback: not "
        "so; auto: where it is possible",
        ("auto", "loopback", "netns"),
    )
    add("rate", str, "speed of that link, as 'tc' writes it")
    options = parser.parse_args()
    given = [name for name in defaults if name != "seed" and name in options]
    if options.framework != PYTORCH:
        check_framework(parser, options.framework, given)
        return options
    options = argparse.Namespace(**(defaults | vars(options)))
    check(parser, options)
    return options


def check_framework(parser: argparse.ArgumentParser, framework: str, given: Sequence[str]) -> None:
    """Refuse what cannot work before any process starts."""
    for name in given:
        parser.error(
            f"--{name.replace('_', '-')} is an option of PyTorch, which --framework {framework} "
            "does not take: leave it out, or use scripts/compare_comm.py, which has options of its "
            "own"
        )
    compare_comm.check_machine(parser, framework)


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


if __name__ == "__main__":
    sys.exit(main())
