"""A rank of DeepSpeed that DeepSpeed's own launcher did not start."""

import os


def as_launched(rank: int, ranks: int) -> None:
    """Set what DeepSpeed's launcher would have set, and compile no inference kernel."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    without_inference_kernel()


def without_inference_kernel() -> None:
    """Keep DeepSpeed from compiling its inference kernel over shared memory as it starts.

    Training never calls it, and a rank killed meanwhile leaves a lock on which later runs wait.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
