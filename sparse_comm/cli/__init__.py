"""The command ``sparse-comm``: what the installation can do, and masks of models on disk.

    sparse-comm doctor
    sparse-comm masks make model.safetensors --sparsity 0.9 -o masks.safetensors
    sparse-comm masks show masks.safetensors

Here is the parsing only; each command is a module of its own, imported when it is asked for.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import NoReturn

from sparse_comm import __version__

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: those after the program's name; the process's own if not given.

    Returns:
        Exit status: 0; 1 if the command failed, with one line on the standard error; 130 if the
        user stopped it. A command line that makes no sense raises SystemExit(2), as argparse does.

    Source: ours.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a name that the terminal cannot show is no failure
            stream.reconfigure(errors="backslashreplace")
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.module is None:
        options.parser.print_help(sys.stderr)
        return 2
    with _noting_interrupts() as interrupts:
        try:
            status = int(importlib.import_module(options.module).run(options))
            sys.stdout.flush()
            return status
        except BrokenPipeError:  # whoever read the output has seen enough
            # For the flush at the end of the process.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        except (KeyboardInterrupt, Exception) as error:
            if interrupts or isinstance(error, KeyboardInterrupt):
                return _fail(options, "stopped", 130)
            if isinstance(error, (OSError, MemoryError, ImportError, ValueError)):
                return _fail(options, _message(error), 1)
            raise


@contextlib.contextmanager
def _noting_interrupts() -> Iterator[list[int]]:
    """A list that is not empty once Ctrl-C came, also where C code turned it into another error."""
    interrupts: list[int] = []

    def note(signal_number: int, frame: FrameType | None) -> None:
        interrupts.append(signal_number)
        raise KeyboardInterrupt

    own = (
        signal.getsignal(signal.SIGINT) is signal.default_int_handler
        and threading.current_thread() is threading.main_thread()
    )
    if own:
        signal.signal(signal.SIGINT, note)
    try:
        yield interrupts
    finally:
        if own:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _message(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if isinstance(error, MemoryError):
        return f"out of memory {error}"
    if isinstance(error, ImportError):
        return f"{error} (sparse-comm doctor says what is broken)"
    return str(error)


def _fail(options: argparse.Namespace, message: str, status: int) -> int:
    print(f"{options.parser.prog}: {' '.join(message.split())}", file=sys.stderr)
    return status


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="sparse-comm",
        description="Pay only for the unpruned entries of a pruned network: the command line.",
        epilog=_example("sparse-comm doctor"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.set_defaults(module=None, parser=parser)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    _add_doctor(commands)
    masks = commands.add_parser(
        "masks",
        help="make and look at files of masks",
        description="Masks say which entries of a model's parameters are unpruned.",
        epilog=_example("sparse-comm masks show masks.safetensors"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    masks.set_defaults(parser=masks)
    mask_commands = masks.add_subparsers(title="commands", metavar="COMMAND")
    _add_make(mask_commands)
    _add_show(mask_commands)
    return parser


def _add_doctor(commands: argparse._SubParsersAction[_Parser]) -> None:
    doctor = commands.add_parser(
        "doctor",
        help="say what works here, what is missing, and how to add it",
        description=(
            "Say which versions, kernels, communication back-ends and frameworks are here,\n"
            "which of them this version is tested with, and how to add what is missing.\n"
            "Exit status: 0 if sparse_comm can work, 1 if something that it needs is broken."
        ),
        epilog=_example("sparse-comm doctor --json > doctor.json   # to go with a bug report"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    doctor.add_argument("--json", action="store_true", help="print the same as JSON")
    doctor.set_defaults(module="sparse_comm.cli.doctor", parser=doctor)


def _add_make(commands: argparse._SubParsersAction[_Parser]) -> None:
    make = commands.add_parser(
        "make",
        help="make masks from the weights of a model on disk",
        description=(
            "Make masks from the weights of a model on disk, reading one tensor at a time:\n"
            "those that sparse_comm.prune.magnitude (or masks_from_zeros) gives for the\n"
            "model. Tensors of two or more dimensions take part, embeddings included; biases\n"
            "and norm weights, of one dimension, stay dense."
        ),
        epilog=_example(
            "sparse-comm masks make model.safetensors --sparsity 0.9 -o masks.safetensors",
            "sparse-comm masks make my-llm/ --sparsity 0.5 --exclude '*embed*' lm_head.weight "
            "-o masks.safetensors",
            "sparse-comm masks make pruned.safetensors --from-zeros -o masks.safetensors",
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    make.add_argument(
        "model",
        metavar="MODEL",
        help="a .safetensors file, the .safetensors.index.json of a sharded model, or its folder",
    )
    how = make.add_mutually_exclusive_group(required=True)
    how.add_argument(
        "--sparsity",
        type=_sparsity,
        metavar="S",
        help="fraction of the entries to prune, those of smallest magnitude: 0 to 1",
    )
    how.add_argument(
        "--from-zeros",
        action="store_true",
        help="the model is pruned already: take its zeros as the pruned entries",
    )
    make.add_argument(
        "--scope",
        choices=("global", "layer"),
        help="with --sparsity: rank all entries together, or prune the same fraction of each "
        "tensor (default: global)",
    )
    which = make.add_mutually_exclusive_group()
    which.add_argument(
        "--names",
        nargs="+",
        action="extend",
        metavar="GLOB",
        help="after MODEL: only these tensors, such as '*.mlp.*'; a full name may be of one "
        "dimension, too",
    )
    which.add_argument(
        "--exclude",
        nargs="+",
        action="extend",
        metavar="GLOB",
        help="after MODEL: all but these tensors",
    )
    make.add_argument("-o", "--output", required=True, metavar="FILE", help="where the masks go")
    make.add_argument("--force", action="store_true", help="replace FILE if it exists")
    make.set_defaults(module="sparse_comm.cli.make", parser=make)


def _add_show(commands: argparse._SubParsersAction[_Parser]) -> None:
    show = commands.add_parser(
        "show",
        help="list the masks of a file",
        description="List the masks of a file that save_masks or `masks make` wrote.",
        epilog=_example("sparse-comm masks show masks.safetensors"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    show.add_argument("file", metavar="FILE", help="the file of masks")
    show.add_argument("--json", action="store_true", help="print the same as JSON, digests in full")
    show.set_defaults(module="sparse_comm.cli.show", parser=show)


def _sparsity(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        hint = f"; for {text} % write {value / 100:g}" if 1 < value <= 100 else ""
        raise argparse.ArgumentTypeError(f"a number from 0 to 1 is expected, got {text!r}{hint}")
    return value


def _example(*lines: str) -> str:
    return "\n".join(["example:" if len(lines) == 1 else "examples:", *(f"  {x}" for x in lines)])
