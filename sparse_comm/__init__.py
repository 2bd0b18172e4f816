"""Pay only for the unpruned entries of a pruned network, in the framework you already use."""

from sparse_comm import kernels, prune
from sparse_comm.compact import (
    Summary,
    check_masks,
    compact,
    dense_state_dict,
    densify,
    is_compact,
    masks_of,
    param_groups,
    summary,
    update_masks,
    values_changed,
)
from sparse_comm.mask_file import load_masks, save_masks
from sparse_comm.mask_sync import broadcast_masks
from sparse_comm.masks import masks_from_torch_prune, masks_from_zeros
from sparse_comm.pattern import SparsityPattern

__all__ = [
    "SparsityPattern",
    "Summary",
    "broadcast_masks",
    "check_masks",
    "compact",
    "dense_state_dict",
    "densify",
    "is_compact",
    "kernels",
    "load_masks",
    "masks_from_torch_prune",
    "masks_from_zeros",
    "masks_of",
    "param_groups",
    "prune",
    "save_masks",
    "summary",
    "update_masks",
    "values_changed",
]
__version__ = "0.1.0"
