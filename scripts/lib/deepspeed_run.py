"""What scripts that run DeepSpeed share; ranks are started by the script, not by its launcher."""

import argparse
import os
from importlib.util import find_spec
from pathlib import Path

from . import results

# --- in the parent -------------------------------------------------------------------------------


def prepare(parser: argparse.ArgumentParser) -> None:
    """Refuse an environment without DeepSpeed; let ranks use the CPU, and compile once for all."""
    if find_spec("deepspeed") is None:
        parser.error("DeepSpeed is not installed here: run bash scripts/setup_env.sh deepspeed")
    os.environ["DS_ACCELERATOR"] = "cpu"  # else DeepSpeed takes a GPU
    # What it and torch compile or cache stays in the checkout, as with scripts/test.sh.
    cache = results.FOLDER.parent / ".sparse_comm_cache"
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(cache / "torch_extensions"))
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache / "inductor"))


def add_gpt_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of a script that measures GPTs in each ZeRO stage."""
    parser.add_argument(
        "--width", type=int, default=2048, help="of the model (default: %(default)s)"
    )
    parser.add_argument(
        "--density", type=float, default=0.1, help="of matrices (default: %(default)s)"
    )
    parser.add_argument(
        "--stages", nargs="+", type=int, choices=range(4), default=[0, 1, 2, 3], help="of ZeRO"
    )
    add_out_argument(parser)


def add_out_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out",
        type=Path,
        default=results.FOLDER / "deepspeed",
        help="folder for the results (default: results/deepspeed of the checkout)",
    )


def check_gpt_arguments(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Refuse what the options of ``add_gpt_arguments`` do not take."""
    if options.width % 64 or options.width < 64:
        parser.error(f"--width is {options.width}; it must be a multiple of 64, such as 2048")
    if not 0 < options.density < 1:
        parser.error(f"--density is {options.density}; it must lie between 0 and 1")


# --- in a rank -----------------------------------------------------------------------------------


def as_launched(rank: int, ranks: int) -> None:
    """Set what DeepSpeed's launcher would have set, and compile no inference kernel."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    without_inference_kernel()


def without_inference_kernel() -> None:
    """Keep DeepSpeed from compiling its inference kernel over shared memory as it starts.

    Training never calls it, and a rank killed meanwhile leaves a lock on which later runs wait.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
