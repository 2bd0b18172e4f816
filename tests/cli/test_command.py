"""What holds for every command: help, exit status, pipes, and that the page about them is true."""

from __future__ import annotations

import configparser
import importlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import sparse_comm
from sparse_comm.cli import main
from tests.cli.command import COMMAND, ROOT, Terminal, call, environment, start

COMMANDS = [[], ["doctor"], ["masks"], ["masks", "make"], ["masks", "show"]]
PAGE = ROOT / "docs" / "command-line.md"


def some_masks(path: Path, count: int = 3) -> Path:
    mask = torch.arange(64).reshape(8, 8) % 3 == 0
    sparse_comm.save_masks({f"layers.{i}.größe": mask for i in range(count)}, path)
    return path


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_gives_an_example_whose_arguments_are_understood(capsys, command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    done = call(capsys, *command, "--help")
    assert done.status == 0 and done.err == ""
    text, _, examples = done.out.partition("\nexample")
    assert max(map(len, text.splitlines())) <= 80
    lines = re.findall(r"^  (sparse-comm .*)$", examples, re.MULTILINE)
    assert lines and all(line.startswith(" ".join(["sparse-comm", *command])) for line in lines)
    for line in lines:
        arguments = line.partition("#")[0].partition(">")[0].replace("'", "").split()[1:]
        assert call(capsys, *arguments).status in (0, 1)  # 2 is for what is not understood


def test_the_version_is_the_packages(capsys):
    done = call(capsys, "--version")
    assert (done.status, done.out) == (0, f"sparse-comm {sparse_comm.__version__}\n")


@pytest.mark.parametrize("command", [[], ["masks"]])
def test_a_command_without_its_command_prints_help_and_ends_with_2(capsys, command):
    done = call(capsys, *command)
    assert done.status == 2 and done.out == "" and "commands:" in done.err


@pytest.mark.parametrize("arguments", [["doctr"], ["doctor", "--jsn"], ["masks", "mak"]])
def test_a_misspelt_command_ends_with_2_and_one_line_that_points_to_help(capsys, arguments):
    done = call(capsys, *arguments)
    assert done.status == 2 and done.out == ""
    assert re.fullmatch(r"sparse-comm.*\(see sparse-comm.* --help\)\n", done.err)


def test_the_installed_script_is_this_command():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    name, target = config["options.entry_points"]["console_scripts"].strip().split(" = ")
    module, function = target.split(":")
    assert name == "sparse-comm"
    assert getattr(importlib.import_module(module), function) is main


def test_a_reader_that_has_seen_enough_is_no_failure(tmp_path):
    """As `| head -1` does, with more output than a pipe holds."""
    file = some_masks(tmp_path / "m", 2000)
    for options in ([], ["--json"]):
        with subprocess.Popen(
            [*COMMAND, "masks", "show", file, *options],
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        ) as process:
            assert process.stdout is not None and process.stderr is not None
            assert process.stdout.readline()
            process.stdout.close()
            assert process.stderr.read() == b""
        assert process.returncode == 0


def test_ctrl_c_is_a_stop_even_where_c_code_turned_it_into_another_error(monkeypatch, capsys):
    def run(options: object) -> int:
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(60)
        except KeyboardInterrupt:
            raise TypeError("object of unknown shape") from None
        return 0

    monkeypatch.setattr("sparse_comm.cli.show.run", run)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        done = call(capsys, "masks", "show", "m")
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert (done.status, done.err) == (130, "sparse-comm masks show: stopped\n")


def test_output_that_knows_only_ascii_gets_all_the_same(tmp_path):
    done = start("masks", "show", some_masks(tmp_path / "m"), PYTHONIOENCODING="ascii")
    assert done.status == 0 and done.err == ""
    assert r"layers.2.gr\xf6\xdfe" in done.out


def test_colour_is_for_terminals(monkeypatch, capsys):
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[32m" in Terminal(80, "doctor").finish().out
    assert "\x1b" not in call(capsys, "doctor").out


def test_the_page_is_true_block_by_block(tmp_path, monkeypatch):
    """Runs the Python and the shell of the page, and compares what it says is printed."""
    monkeypatch.chdir(tmp_path)
    script = tmp_path / "bin" / "sparse-comm"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\nexec {sys.executable} -m sparse_comm "$@"\n')
    script.chmod(0o755)
    variables = environment(PATH=f"{script.parent}:{os.environ['PATH']}")
    namespace: dict[str, object] = {}
    printed, kinds = "", set()
    for kind, code in re.findall(r"^```(\w*)\n(.*?)^```$", PAGE.read_text(), re.M | re.S):
        kinds.add(kind)
        if kind == "python":
            exec(compile(code, PAGE.name, "exec"), namespace)
        elif kind == "bash":
            done = subprocess.run(
                ["bash", "-e", "-c", code], env=variables, capture_output=True, text=True
            )
            assert done.returncode == 0, done.stderr
            printed = done.stdout
        else:
            assert code == printed
    assert kinds == {"python", "bash", "text"}
