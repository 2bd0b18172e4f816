"""Ways to choose which weights to prune. Each returns masks and leaves the model as it is."""

from sparse_comm.prune.channels import channels
from sparse_comm.prune.magnitude import magnitude

__all__ = ["channels", "magnitude"]
