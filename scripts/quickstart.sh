#!/usr/bin/env bash
# Sets up .venv where needed, then runs scripts/quickstart.py with the arguments given.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export OMP_NUM_THREADS=1 # several processes share the cores
export MPLCONFIGDIR="$root/.sparse_comm_cache/matplotlib"

extra=plot
case " $* " in
    *" --framework deepspeed "* | *" --framework=deepspeed "*) extra=deepspeed ;;
    *" --framework axonn "* | *" --framework=axonn "*) extra=axonn ;;
esac
bash "$root/scripts/setup_env.sh" "$extra"
exec "$root/.venv/bin/python" "$root/scripts/quickstart.py" "$@"
