"""The trainings that ``bench_step.py`` compares, by the names that tables give them."""

DENSE_FP32 = "dense fp32"
DENSE_BF16 = "dense bf16"
DENSE_BF16_TUNED = "dense bf16, buckets for the link"
POWERSGD = "PowerSGD rank 4, fp32"
COO = "COO all-reduce, fp32"
SAMO_FP32, SAMO_BF16 = "SAMO, fp32 collective", "SAMO, bf16 collective"
OURS_FP32 = "sparse_comm fp32"
OURS = "sparse_comm bf16"
OURS_TRANSIENT = "sparse_comm bf16, transient"
KINDS = (
    *(DENSE_FP32, DENSE_BF16, DENSE_BF16_TUNED, POWERSGD, COO),
    *(SAMO_FP32, SAMO_BF16, OURS_FP32, OURS, OURS_TRANSIENT),
)

# What is computed in, and what its losses may differ by where nothing but rounding differs (nats).
COMPUTE_FP32, COMPUTE_BF16 = "fp32", "bf16"
ROUNDING = {COMPUTE_FP32: 1e-4, COMPUTE_BF16: 5e-3}

# Those on one process.
MASKED_DENSE = "masked dense"
CACHED, TRANSIENT = "compact, cached", "compact, transient"

Phases = dict[str, float]  # seconds of a step, by what they went into
