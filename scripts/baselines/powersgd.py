"""PowerSGD (Vogels et al., NeurIPS 2019) as torch ships it: low-rank gradients, a DDP hook.

Faithful: torch's own hook and its defaults (error feedback, warm start). Bucket size: one bucket
for all gradients, because several make the hook hang on gloo; so nothing overlaps with backward.
Lossy: what a matrix of low rank cannot express comes later, by error feedback.
"""

from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

RANK = 4
ONE_BUCKET_MB = 4096
COLLECTIVES = 3  # of a bucket: of small parameters, and of the two factors of all matrices
PLAIN_STEPS = 2  # all-reduced uncompressed at the start: the fewest that error feedback allows


def powersgd_ddp(
    module: nn.Module, rank: int = RANK, hook=powerSGD_hook
) -> DistributedDataParallel:
    """DDP whose gradients are reduced as matrices of ``rank``, after PLAIN_STEPS ordinary steps.

    Args:
        module: an fp32 module; its parameters of two or more dimensions are compressed.
        rank: of the approximation.
        hook: ``powerSGD_hook``, or what calls it, to time it.
    """
    ddp = DistributedDataParallel(module, gradient_as_bucket_view=True, bucket_cap_mb=ONE_BUCKET_MB)
    state = PowerSGDState(None, rank, start_powerSGD_iter=PLAIN_STEPS)
    ddp.register_comm_hook(state, hook)
    return ddp


def bytes_sent(module: nn.Module, rank: int = RANK) -> int:
    """Payload bytes of a compressed step: two fp32 factors a matrix, small parameters whole."""
    entries = 0
    for parameter in module.parameters():
        rows = parameter.shape[0]
        columns = parameter.numel() // rows
        factors = min(rows, columns, rank) * (rows + columns)
        # The hook's own rule: what would not shrink to less than half is sent as it is.
        entries += factors if 2 * factors < parameter.numel() else parameter.numel()
    return 4 * entries
