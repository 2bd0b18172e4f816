"""AxoNN's strategy for Lightning Fabric, with compact parameters and bucketed averaging.

Not imported with the package, as it needs Lightning: ``from sparse_comm.integrations.axonn.fabric
import FabricStrategy``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from axonn.lightning import AxonnStrategy, axonn_strategy
from torch import Tensor, nn

from sparse_comm.compact.slot import Mode
from sparse_comm.reduce import GradientBuckets, Reduction

from .averaging import agreed_cap_mb, make_buckets, trained
from .compacting import make_compact
from .launcher import start_mpi_for_others
from .layers import refuse_unscattered
from .masks import whole_names
from .modules import intra_layer
from .start import init

__all__ = ["FabricStrategy"]


class FabricStrategy(AxonnStrategy):
    """``axonn.lightning.AxonnStrategy``, on CPUs too, and with compact parameters if asked.

    Example::

        strategy = FabricStrategy(G_intra_r=2, sparse=True, masks=masks)
        fabric = lightning.Fabric(accelerator="cpu", devices=4, strategy=strategy)
        fabric.launch()
        with fabric.init_module():  # auto_parallelize()
            model = Model()
        optimizer = torch.optim.AdamW(model.parameters())
        model, optimizer = fabric.setup(model, optimizer)

    Args:
        *args: of ``AxonnStrategy``.
        sparse: whether ``fabric.setup`` makes the model compact.
        masks: if so, bool masks of whole weights by name, True = unpruned.
        weights: "cached" or "transient", as in ``sparse_comm.compact``.
        reduce_dtype: what gradients travel in; None for their own dtype, as in AxoNN.
        bucket_cap_mb: MiB of a bucket; from the link's measured speed if not given.
        overlap: whether gradients are averaged while backward goes on (not beside
            ``overlap_communication``, which gives weights their gradients later).
        **kwargs: of ``AxonnStrategy``.

    Raises:
        ValueError, TypeError: on all ranks; by ``fabric.launch``: ``overlap_communication`` with
            several depths on CPUs; by ``fabric.setup``: masks that do not fit or differ, several
            optimizers with ``sparse``.

    Source: AxoNN (Singh et al., 2023, arXiv 2305.13525); values in place of weights ours.
    """

    def __init__(
        self,
        *args: Any,
        sparse: bool = False,
        masks: Mapping[str, Tensor] | None = None,
        weights: Mode = "cached",
        reduce_dtype: torch.dtype | None = None,
        bucket_cap_mb: float | None = None,
        overlap: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        start_mpi_for_others()
        if masks is not None and not sparse:
            raise ValueError("masks are given, but not sparse=True")
        self._sparse, self._masks, self._weights = sparse, masks, weights
        self._reduce_dtype, self._cap_mb, self._overlap = reduce_dtype, bucket_cap_mb, overlap
        self._buckets: WeakKeyDictionary[nn.Module, tuple[list[int], GradientBuckets]]
        self._buckets = WeakKeyDictionary()

    def _setup_distributed(self) -> None:
        """As AxoNN's, by our ``init``."""
        if self.overlap_communication and self.G_intra_d > 1 and self.root_device.type == "cpu":
            raise ValueError(
                "overlap_communication gathers weights of several depths ahead, which gloo does by "
                "what autograd takes for writes to them: leave it out on CPUs, or use G_intra_d=1"
            )
        self._set_world_ranks()
        self._process_group_backend = self._get_process_group_backend()
        axonn_strategy._init_dist_connection(
            self.cluster_environment, self._process_group_backend, timeout=self._timeout
        )
        grid = (self.G_intra_r, self.G_intra_c, self.G_intra_d)
        of_model = grid[0] * grid[1] * grid[2]
        self.G_data = max(1, dist.get_world_size() // of_model)
        init(1, self.G_data, *grid, device=self.root_device.type)

    def setup_module_and_optimizers(
        self, module: nn.Module, optimizers: list[torch.optim.Optimizer], scheduler: Any = None
    ) -> tuple[nn.Module, list[torch.optim.Optimizer], Any]:
        """Make the model compact, and its optimizer with it."""
        if self._sparse and len(optimizers) > 1:
            raise ValueError(
                f"fabric.setup was given {len(optimizers)} optimizers; with sparse=True set up "
                "the model first, fabric.setup_module(model), and build them on its parameters"
            )
        self._optimizer = optimizers[0]
        try:
            return super().setup_module_and_optimizers(module, optimizers, scheduler)
        finally:
            self._optimizer = None

    _optimizer: torch.optim.Optimizer | None = None

    def setup_module(self, module: nn.Module) -> nn.Module:
        """Make the model compact."""
        if self._sparse:
            there = whole_names(module, None)
            make_compact(module, self._masks, there, self._weights, self._optimizer)
        module = super().setup_module(module)
        refuse_unscattered(module)
        if self._cap_mb is None:
            self._cap_mb = agreed_cap_mb(module, Reduction(self._reduce_dtype))
        self._make_buckets(module)
        return module

    def _make_buckets(self, module: nn.Module) -> GradientBuckets:
        assert self._cap_mb is not None  # since the module was set up
        buckets = make_buckets(
            module,
            whole_names(module, None),
            Reduction(self._reduce_dtype),
            self._cap_mb,
            own_batches=True,
        )
        # Its own overlap gives weights their gradients after backward has passed them.
        buckets.overlap = self._overlap and not self.overlap_communication
        self._buckets[module] = (trained(module), buckets)
        return buckets

    def backward(self, tensor: Tensor, module: nn.Module, *args: Any, **kwargs: Any) -> None:
        """Average gradients unless ``fabric.no_backward_sync`` says that more are to come."""
        known, buckets = self._buckets.get(module, (None, None))
        if buckets is None:
            raise ValueError(
                "fabric.backward(loss, model=model) needs the model that fabric.setup gave back"
            )
        if trained(module) != known:  # some were frozen, or no longer are
            buckets = self._make_buckets(module)
        last = not intra_layer.NO_GRADIENT_SYNC
        with intra_layer.no_grad_sync(), buckets.backward(last):
            super().backward(tensor, module, *args, **kwargs)
        if last:
            buckets.wait()
