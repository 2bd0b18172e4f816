"""The compact parameter: ``compact()``, ``densify()`` and what goes with them."""

from sparse_comm.compact.convert import compact, densify, is_compact, masks_of, values_changed
from sparse_comm.compact.optimizer import param_groups
from sparse_comm.compact.report import Summary, summary
from sparse_comm.compact.state import check_masks, dense_state_dict
from sparse_comm.compact.update import update_masks

__all__ = [
    "Summary",
    "check_masks",
    "compact",
    "dense_state_dict",
    "densify",
    "is_compact",
    "masks_of",
    "param_groups",
    "summary",
    "update_masks",
    "values_changed",
]
