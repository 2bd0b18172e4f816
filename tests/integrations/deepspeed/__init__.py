"""Tests of the DeepSpeed integration, on its CPU accelerator."""

import os
import warnings

os.environ.setdefault("DS_ACCELERATOR", "cpu")
# DeepSpeed calls collectives by names that torch 2.13 has deprecated, thousands of times here.
warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)
