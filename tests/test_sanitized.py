"""The C of the native back-end under the address and undefined-behaviour sanitizers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest

from sparse_comm.kernels import native

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "sparse_comm" / "kernels" / "csrc" / "native.c"
# Puts the sanitized extension where the package looks for its own, then runs the tests with it.
RUN = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("_native", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
sys.modules["sparse_comm.kernels._native"] = module
from sparse_comm.kernels import native
assert native._native is module
import pytest
sys.exit(pytest.main(sys.argv[2:]))
"""


def compiler() -> str | None:
    name = os.environ.get("CC", "cc").split()[0]
    return shutil.which(name) or shutil.which("gcc") or shutil.which("clang")


def build(cc: str, folder: Path) -> Path:
    extension = folder / "_native.abi3.so"
    subprocess.run(
        [
            cc,
            *("-std=c11", "-O1", "-g", "-fno-omit-frame-pointer", "-ffp-contract=off"),
            *("-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
            *("-shared", "-fPIC", "-pthread", "-DPy_LIMITED_API=0x030A0000"),
            *("-Wall", "-Wextra", "-Werror", "-Wno-unused-parameter"),
            f"-I{sysconfig.get_path('include')}",
            *(str(SOURCE), "-o", str(extension)),
        ],
        check=True,
    )
    return extension


def sanitizer(cc: str, name: str) -> str:
    command = [cc, f"-print-file-name={name}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def if_here(cc: str) -> Any:
    reason = f"no {cc} here to compile with; the compilers that are here are tested"
    absent = pytest.mark.skipif(shutil.which(cc) is None, reason=reason)
    return pytest.param(cc, marks=absent)


@pytest.mark.parametrize("cc", [if_here("gcc"), if_here("clang")])
def test_every_compiler_that_is_here_takes_the_c_code_without_a_warning(cc, tmp_path):
    """What one ignores with a warning can be an instruction set."""
    flags = ("-std=c11", "-O1", "-pthread", "-Wall", "-Wextra", "-Werror", "-Wno-unused-parameter")
    include = f"-I{sysconfig.get_path('include')}"
    command = [cc, *flags, "-fPIC", "-c", include, str(SOURCE), "-o", str(tmp_path / "native.o")]
    subprocess.run(command, check=True)


def test_the_c_code_is_clean_under_the_sanitizers(tmp_path: Path) -> None:
    cc = compiler()
    if cc is None:
        assert native.MISSING  # else there is built code that nothing examines
        pytest.skip("no C compiler here to build with sanitizers, and no native code to examine")
    extension = build(cc, tmp_path)
    environment = os.environ | {
        # Python itself is not sanitized, so the runtime must come first; Python leaks on purpose.
        "LD_PRELOAD": f"{sanitizer(cc, 'libasan.so')} {sanitizer(cc, 'libubsan.so')}",
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OMP_NUM_THREADS": "1",
    }
    tests = ["tests/test_backends.py", "tests/test_kernels_bad_input.py"]
    done = subprocess.run(
        # -s: a sanitizer ends the process, and what pytest has captured with it
        [
            sys.executable,
            "-c",
            RUN,
            str(extension),
            "-q",
            "-x",
            "-s",
            "-p",
            "no:cacheprovider",
            *tests,
        ],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert " passed" in done.stdout


def test_the_sanitizers_would_see_an_overrun(tmp_path: Path) -> None:
    """A test that cannot fail would prove nothing: here is one byte too many."""
    cc = compiler()
    if cc is None:
        assert native.MISSING
        return
    source = tmp_path / "overrun.c"
    source.write_text(
        "#include <stdlib.h>\nint main(int n, char **a)"
        "{ volatile char *p = malloc(8); p[7 + n] = 1; return 0; }\n"
    )
    program = tmp_path / "overrun"
    subprocess.run([cc, "-fsanitize=address", str(source), "-o", str(program)], check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True)
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr
