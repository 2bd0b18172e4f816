"""Compares one pruned GPT's training in a framework, dense and compact: bytes, time and losses.

All sides train from one pruned start, on equal batches and in turn, on ranks with one thread each
(gloo) that compute in bf16, joined by a link of 1 Gbit/s between network namespaces (needs root)
and by the loopback. Losses are compared with masked dense training, whose gradients are masked.

DeepSpeed: in each ZeRO stage, engines of one config. Times are compared with dense training, which
nothing masks; compact training is sparse_comm's, with cached weights (not in stage 3) and with
transient ones.

AxoNN: on grids of pipeline stages and replicas, AxoNN's own reduction of gradients, buckets without
and with overlap, and compact training; with the phases of a step, as in SAMO's Figure 8.

--pipeline compares sends between the stages of torch's pipelines instead: dense, with each codec of
sparse_comm, and with what users would pick, of image networks and GPTs.
"""

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path

from lib import deepspeed_run, pipeline_compare, results
from lib.axonn_compare import AXONN
from lib.axonn_report import grid
from lib.bench import LOOPBACK, check_links
from lib.compare_run import Plan, compare
from lib.deepspeed_compare import DEEPSPEED
from lib.images import NoImages
from lib.netns import LinkUnavailable
from lib.pair import UNTIMED
from lib.pipeline_models import MODELS

FRAMEWORKS = {framework.package: framework for framework in (DEEPSPEED, AXONN)}
GRIDS = ("1x2", "2x1", "2x2")
STAGES = (0, 1, 2, 3)
LINKS = ("1gbit", LOOPBACK)


def main() -> int:
    options = parse_arguments()
    if options.pipeline:
        return compare_sends(options)
    framework = FRAMEWORKS[options.framework]
    sections = list(dict.fromkeys(options.grids if framework is AXONN else sorted(options.stages)))
    size = (framework.quick if options.quick else framework.full) | {"seed": options.seed}
    if options.steps:
        size |= {"steps": options.steps}
    links = list(dict.fromkeys(options.links))
    out = options.out or results.FOLDER / options.framework
    return compare(framework, Plan(sections, links, size, out, "compare", not options.quick))


def compare_sends(options: argparse.Namespace) -> int:
    size = (pipeline_compare.QUICK if options.quick else pipeline_compare.FULL) | {
        "seed": options.seed
    }
    if options.steps:
        size |= {"steps": options.steps}
    every = pipeline_compare.QUICK_SECTIONS if options.quick else pipeline_compare.SECTIONS
    sections = [s for s in every if not options.models or s[0] in options.models]
    out = options.out or results.FOLDER / "pipeline"
    links = list(dict.fromkeys(options.links))
    try:
        return pipeline_compare.compare(
            pipeline_compare.Plan(sections, links, size, out, not options.quick)
        )
    except (LinkUnavailable, NoImages) as error:
        print(error, file=sys.stderr)
        return 1


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Writes compare.md, compare.json and compare.png (--pipeline: pipeline.…). Takes "
        "some 15 minutes (--pipeline: 35) on two cores, and 4 GB of memory (AxoNN: 8). --pipeline "
        "fetches Fashion-MNIST by apt-get (31 MB) if it is not here.",
    )
    parser.add_argument(
        "--framework",
        choices=FRAMEWORKS,
        default=DEEPSPEED.package,
        help="that trains (default: %(default)s)",
    )
    parser.add_argument(
        "--pipeline",
        action="store_true",
        help="compare sends between the stages of torch's pipelines",
    )
    parser.add_argument(
        "--models",
        nargs="+",
        choices=MODELS,
        metavar="MODEL",
        help=f"of --pipeline: {', '.join(map(repr, MODELS))} (default: all)",
    )
    parser.add_argument(
        "--stages",
        nargs="+",
        type=int,
        choices=STAGES,
        default=[1, 2, 3],
        metavar="STAGE",
        help="DeepSpeed: of ZeRO, 0 to 3 (default: 1 2 3)",
    )
    parser.add_argument(
        "--grids",
        nargs="+",
        type=grid,
        default=[grid(name) for name in GRIDS],
        metavar="GRID",
        help="AxoNN: pipeline stages x replicas, as 2x1; an even number of ranks "
        f"(default: {' '.join(GRIDS)})",
    )
    parser.add_argument(
        "--links",
        nargs="+",
        default=LINKS,
        metavar="LINK",
        help=f"{LOOPBACK}, or speeds as 'tc' writes them; those that this machine cannot make "
        f"are left out (default: {' '.join(LINKS)})",
    )
    parser.add_argument(
        "--steps",
        type=int,
        help=f"of each training (default: {DEEPSPEED.full['steps']}; AxoNN: {AXONN.full['steps']})",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a small model and few steps: shows in a minute or two that everything works, but its "
        "times mean nothing",
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights and data (default: 0)")
    parser.add_argument(
        "--out",
        type=Path,
        help="folder for the results (default: the framework's in results of the checkout)",
    )
    options = parser.parse_args()
    check_machine(parser, None if options.pipeline else options.framework)
    check_links(parser, options.links)
    if options.steps is not None and options.steps < UNTIMED + 2:
        parser.error(
            f"--steps is {options.steps}; the first {UNTIMED} are not timed, and an interval "
            "needs 2"
        )
    return options


def check_machine(parser: argparse.ArgumentParser, framework: str | None) -> None:
    """Refuse what cannot work before any process starts."""
    if sys.platform != "linux":
        parser.error(f"this script needs Linux; this is {sys.platform}")
    if framework == DEEPSPEED.package:
        deepspeed_run.prepare(parser)
    elif framework is not None and find_spec(framework) is None:
        parser.error("AxoNN is not installed here: run bash scripts/setup_env.sh axonn")


if __name__ == "__main__":
    sys.exit(main())
