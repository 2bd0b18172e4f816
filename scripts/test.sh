#!/usr/bin/env bash
# Sets up .venv where needed, then runs every check; arguments go to pytest.
#
#     bash scripts/test.sh -x -k pattern
#     bash scripts/test.sh -n 0 --pdb        by one process, as a debugger needs it
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
export OMP_NUM_THREADS=1 # several processes share the cores
export MPLCONFIGDIR="$PWD/.sparse_comm_cache/matplotlib"
export TORCHINDUCTOR_CACHE_DIR="$PWD/.sparse_comm_cache/inductor"
export TORCH_EXTENSIONS_DIR="$PWD/.sparse_comm_cache/torch_extensions" # DeepSpeed compiles kernels
export DS_ACCELERATOR=cpu

bash scripts/setup_env.sh dev

# DeepSpeed's kernels, which its tests would wait for, are compiled beside the linters and the first
# tests.
.venv/bin/python -m tests.integrations.deepspeed.kernels &
trap 'kill -- -$! 2> /dev/null || kill $! 2> /dev/null || true' EXIT

run() {
    printf '\n$ %s\n' "$*"
    .venv/bin/python -m "$@"
}
run ruff check
run ruff format --check
run mypy
# Tests wait for ranks half of their time, so two workers share them, but for those marked alone. A
# file is one worker's, as its tests share processes. Status 5: none of these tests was chosen.
beside=0 alone=0
run pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not alone" "$@" || beside=$?
run pytest -m alone "$@" || alone=$?
if [ $beside = 5 ]; then exit $alone; fi
if [ $beside != 0 ] || [ $alone = 5 ]; then exit $beside; fi
exit $alone
