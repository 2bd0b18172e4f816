#!/usr/bin/env bash
# Makes .venv in this checkout and installs sparse_comm into it, editable, at the versions that
# scripts/constraints.txt pins.
#
#     bash scripts/setup_env.sh plot         what the scripts need
#     bash scripts/setup_env.sh deepspeed    what those that use DeepSpeed need; holds plot
#     bash scripts/setup_env.sh axonn        what those that use AxoNN need; holds plot
#     bash scripts/setup_env.sh dev          what the tests need; holds all
#
# Quick when the last install still stands. Writes to the checkout and to pip's cache only.
set -euo pipefail

extra=${1:-dev}
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=.venv/bin/python
stamp=.venv/sparse_comm.stamp # "<fingerprint> <extra>" of the last install that ended well

say() { printf 'setup: %s\n' "$*"; }
die() { printf 'setup: error: %s\n' "$*" >&2; exit 1; }

can_run() { # can_run PYTHON MODULE…: is it 3.10 or newer, and has it these modules?
    "$1" -I - "${@:2}" <<'PY' 2> /dev/null
import sys
from importlib.util import find_spec

sys.exit(sys.version_info < (3, 10) or not all(map(find_spec, sys.argv[1:])))
PY
}

intact() { # has every installed package all of its files? Not so after an install that was killed.
    "$python" -I - <<'PY' 2> /dev/null
import sys
from importlib.metadata import distributions

for package in distributions():
    files = package.files  # None without a RECORD, which pip writes last
    if files is None or not all(f.suffix == ".pyc" or f.locate().exists() for f in files):
        sys.exit(1)
PY
}

fingerprint() { # of all that an install depends on, and of whether the native kernels are built
    "$python" -I - <<'PY'
import hashlib, pathlib, sys

digest = hashlib.sha256(f"{sys.version}{pathlib.Path.cwd()}".encode())
names = ["setup.cfg", "setup.py", "pyproject.toml", "scripts/constraints.txt"]
for path in [*map(pathlib.Path, names), *sorted(pathlib.Path("sparse_comm").rglob("*.[ch]"))]:
    digest.update(path.read_bytes())
built = sorted(path.name for path in pathlib.Path("sparse_comm/kernels").glob("_native.*"))
digest.update(repr(built).encode())
print(digest.hexdigest())
PY
}

pip_install() {
    local command=("$python" -I -m pip install --disable-pip-version-check -c scripts/constraints.txt "$@")
    if [ -t 1 ]; then # a terminal shows pip's own progress bars
        "${command[@]}"
        return
    fi
    # Elsewhere: a line for each large download, and one before the long silence of unpacking.
    "${command[@]}" 2>&1 | tee .venv/pip.log | awk '
        /^ *Downloading .* MB\)/ { sub(/^ */, "setup:   "); print; fflush() }
        /^Installing collected packages:.* torch/ {
            print "setup:   unpacking " split($0, names, ",") " packages, torch among them: about a minute"
            fflush()
        }' || { tail -n 30 .venv/pip.log >&2; die "pip failed; all that it said is in .venv/pip.log"; }
}

[ $# -le 1 ] || die "one extra at a time, got '$*': dev holds all"
case $extra in
    plot | dev) installed=$extra ;;
    deepspeed | axonn) installed=plot,$extra ;;
    *) die "unknown extra '$extra': plot, deepspeed, axonn or dev" ;;
esac

if can_run "$python" pip && intact; then
    now=$(fingerprint)
    case $(cat "$stamp" 2> /dev/null || true) in
        "$now dev" | "$now $extra") exit 0 ;;
        "$now deepspeed" | "$now axonn") [ "$extra" != plot ] || exit 0 ;;
    esac
elif [ -e .venv ]; then
    say "the .venv here is damaged: making it anew"
    rm -rf .venv
fi
rm -f "$stamp"

if [ ! -e .venv ]; then
    for base in python3 python3.{14,13,12,11,10} python ''; do
        if can_run "$base" venv ensurepip; then break; fi
    done
    [ -n "$base" ] || die "no Python >= 3.10 with the modules venv and ensurepip on PATH"
    say "making .venv with $base ($("$base" -c 'import platform; print(platform.python_version())'))"
    "$base" -m venv .venv
fi
say "installing sparse_comm[$installed]: minutes when torch is new here, else seconds"
pip_install setuptools # builds sparse_comm below; the one that comes with venv is too old
pip_install --no-build-isolation -e ".[$installed]"
printf '%s %s\n' "$(fingerprint)" "$extra" > "$stamp"
say "done in $SECONDS s"
