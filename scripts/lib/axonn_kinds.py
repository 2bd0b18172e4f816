"""What ``compare_comm.py --framework axonn`` compares, by the names that tables give it."""

from .step_kinds import CACHED, TRANSIENT

RELEASED = "AxoNN as released"
RELEASED_BF16 = "AxoNN, gradients in bf16"
BUCKETS_AFTER = "dense, buckets, no overlap"
BUCKETS = "dense, buckets"
MASKED = "masked dense, buckets"
COMPACT_AFTER = "compact, cached, no overlap"
KINDS = (RELEASED, RELEASED_BF16, BUCKETS_AFTER, BUCKETS, MASKED, COMPACT_AFTER, CACHED, TRANSIENT)
COMPACT = (COMPACT_AFTER, CACHED, TRANSIENT)

COMPUTE, POINT_TO_POINT, BUBBLE, COLLECTIVE = "compute", "point-to-point", "bubble", "collective"
OPTIMIZER = "optimizer"
PHASES = (COMPUTE, POINT_TO_POINT, BUBBLE, COLLECTIVE, OPTIMIZER)
