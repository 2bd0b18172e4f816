"""Tests of the DeepSpeed integration, on its CPU accelerator."""

import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")
