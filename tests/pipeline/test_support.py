"""Of which entries gradients count: what is left out changes nothing that anybody sees."""

from __future__ import annotations

import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sparse_comm.pipeline import Channels, Keep, Origin, Zeros, decode, encode, set_origin
from sparse_comm.pipeline.layers import hides_its_end
from sparse_comm.pipeline.support import drop_origin, pass_origin
from tests.pipeline.tensors import around_zero, same, sparse


def relu(x):
    return torch.relu(x)


def squared_relu(x):
    return torch.relu(x).square()


def squared_by_product(x):
    y = torch.relu(x)
    return y * y


def dropout_of_relu(x):
    return F.dropout(torch.relu(x), 0.5)


def dropout(x):
    return F.dropout(x, 0.9)


def pooled(x):
    return F.max_pool2d(torch.relu(x), 2)


def flattened(x):
    return torch.relu(x).flatten(1)


def narrowed(x):
    return torch.relu(x).to(torch.float16)


def relu6(x):
    return F.relu6(x)


def scaled(x):
    return torch.relu(x) * 1e-30


def permuted(x):
    return torch.relu(x).permute(0, 2, 3, 1)


def permuted_twice(x):
    return torch.relu(x).permute(0, 2, 3, 1).transpose(1, 2)


def in_place(x):
    return (x * 1).relu_()


REUSED = [
    *(relu, squared_relu, squared_by_product, dropout_of_relu, dropout, pooled, flattened),
    *(relu6, permuted, in_place),
]
IN_A_ROW = [dropout_of_relu, narrowed, scaled, permuted_twice]


def told(y: Tensor) -> Tensor:
    """What a row of layers tells of its output."""
    set_origin(y, Origin(unseen=lambda: True))
    return y


@pytest.mark.parametrize(
    ("function", "tell"),
    [*((function, None) for function in REUSED), *((function, told) for function in IN_A_ROW)],
    ids=lambda function: getattr(function, "__name__", ""),
)
def test_gradients_through_zeros_are_as_if_all_of_them_were_sent(function, tell):
    """Also where the output underflows but its derivative does not."""
    x = around_zero()
    torch.manual_seed(1)
    y = function(x)
    if tell is not None:
        tell(y)
    message, mine = encode([y], Zeros())
    (received,), theirs = decode(message)
    assert same(received, y.detach().contiguous())
    assert theirs[0] is not None, "the bitmap is not reused"
    gradient = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y.dtype)
    back, _ = encode([gradient], Zeros(), theirs)
    (returned,), _ = decode(back, mine)
    assert (returned == 0).sum() > 0.1 * returned.numel()
    (expected,) = torch.autograd.grad(y, x, gradient, retain_graph=True)
    (found,) = torch.autograd.grad(y, x, returned)
    assert torch.equal(found, expected)
    assert expected.count_nonzero() > 0


def plus_one(x):
    return torch.relu(x) + 1


def gelu(x):
    return F.gelu(x)


def threshold_below_zero(x):
    return F.threshold(x, -1.0, 0.0)


def leaky(x):
    return F.leaky_relu(x)


def sum_of_two(x):
    return torch.relu(x) + torch.relu(-x)


def times_weight(x):
    return torch.relu(x) * torch.ones_like(x).requires_grad_()


def averaged(x):
    return F.avg_pool2d(torch.relu(x), 2)


@pytest.mark.parametrize(
    "function",
    [plus_one, gelu, threshold_below_zero, leaky, sum_of_two, times_weight, averaged],
    ids=lambda function: function.__name__,
)
def test_gradients_through_anything_else_have_their_own_bitmap(function):
    y = function(around_zero())
    message, mine = encode([y], Zeros())
    _, theirs = decode(message)
    assert mine == theirs == [None]
    gradient = sparse(tuple(y.shape), y.dtype, 0.3)
    back, _ = encode([gradient], Zeros(), theirs)
    assert same(decode(back, mine)[0][0], gradient)


def test_an_infinite_gradient_is_seen_through_dropout():
    """Zero times infinity is NaN, by which a loss scale notices the overflow."""
    y = dropout(around_zero())
    message, mine = encode([y], Zeros())
    _, theirs = decode(message)
    gradient = torch.ones_like(y)
    gradient[y == 0] = torch.inf
    back, _ = encode([gradient], Zeros(), theirs)
    assert same(decode(back, mine)[0][0], gradient)


class Relu(torch.autograd.Function):
    """Another than torch's, of the same name: its gradient passes."""

    @staticmethod
    def forward(ctx, x):
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def of_the_same_name(x):
    return Relu.apply(x)


def written_to(x):
    y = F.relu6(x)
    with torch.no_grad():
        y[:, :2].zero_()
    return y


def copy_written_to(x):
    y = torch.relu(x).clone()
    with torch.no_grad():
        y[:, :2].zero_()
    return y


def square_written_to(x):
    y = torch.relu(x).square()
    with torch.no_grad():
        y.add_(1)
    return y


def retained(x):
    y = torch.relu(x)
    y.retain_grad()
    return y


def looked_at(x):
    """A ReLU whose whole gradient somebody looks at."""
    y = torch.relu(x)
    y.register_hook(lambda gradient: gradient / gradient.norm())
    return y


def view_of_it(x):
    return looked_at(x).view(-1, 8)


def view_of_a_view_of_it(x):
    y = torch.relu(x).view(-1, 8)
    y.register_hook(lambda gradient: gradient / gradient.norm())
    return y.view(-1, 4)


def selection_of_it(x):
    return looked_at(x).index_select(1, torch.tensor([0, 2]))


def kept_channels_of_it(x):
    unread = torch.tensor([False, True, False, True])
    return Keep(Channels(1, (~unread).nonzero().flatten(), unread, "a test"))(looked_at(x))


def square_of_it(x):
    return looked_at(x).square()


def product_of_it(x):
    y = looked_at(x)
    return y * y


def multiple_of_it(x):
    return looked_at(x) * 2.0


def narrowed_of_it(x):
    return looked_at(x).bfloat16()


def pooled_of_it(x):
    return F.max_pool2d(looked_at(x), 2)


def pool_of_a_view_of_it(x):
    return F.max_pool2d(looked_at(x).unsqueeze(0)[0], 2)


def node_before(x):
    y = torch.relu(x)
    y.grad_fn.register_prehook(lambda gradients: (gradients[0] / gradients[0].norm(),))
    return y


def node_behind(x):
    y = torch.relu(x)
    y.grad_fn.register_hook(lambda _, gradients: (gradients[0].norm().expand(y.shape),))
    return y


def node_in_between(x):
    y = torch.relu(x)
    y.grad_fn.register_prehook(lambda gradients: (gradients[0] / gradients[0].norm(),))
    return y.square()


LOOKED_AT = [
    *(looked_at, view_of_it, view_of_a_view_of_it, selection_of_it),
    *(kept_channels_of_it, square_of_it, product_of_it, multiple_of_it),
    *(narrowed_of_it, pooled_of_it, pool_of_a_view_of_it, node_before),
    *(node_behind, node_in_between),
]


@pytest.mark.parametrize("function", LOOKED_AT, ids=lambda function: function.__name__)
def test_who_looks_at_a_gradient_on_its_way_sees_all_of_it(function):
    x = around_zero()
    y = function(x)
    message, mine = encode([y], Zeros())
    (received,), theirs = decode(message)
    assert same(received, y.detach().contiguous())
    assert mine == theirs == [None]
    gradient = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y.dtype)
    (returned,), _ = decode(encode([gradient], Zeros(), theirs)[0], mine)
    assert same(returned, gradient)


def test_dropout_tells_its_own_zeros_only_if_somebody_may_look_behind_it():
    x, seen = around_zero(), []
    between = torch.relu(x)
    between.register_hook(seen.append)
    y = F.dropout(between, 0.5)
    message, mine = encode([y], Zeros())
    _, theirs = decode(message)
    gradient = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    (returned,), _ = decode(encode([gradient], Zeros(), theirs)[0], mine)
    expected = torch.autograd.grad(y, x, gradient, retain_graph=True)
    assert torch.equal(torch.autograd.grad(y, x, returned)[0], expected[0])
    assert torch.equal(*seen)
    assert (returned == 0).sum() > 0.4 * returned.numel()


def test_activations_are_not_swelled_for_the_sake_of_gradients():
    """A tenth is dropped, and most are zero before: to send nine tenths twice would be more."""
    y = F.dropout(torch.relu(around_zero()), 0.1)
    message, mine = encode([y], Zeros())
    assert mine == [None]
    assert message.numel() < 0.5 * y.nbytes


def test_looking_for_hooks_leaves_none():
    x = around_zero()
    y = torch.relu(x)
    for _ in range(3):
        _, mine = encode([y], Zeros())
        assert mine != [None]
    y.sum().backward()
    assert torch.equal(x.grad, (x > 0).float())


def halves_multiplied(x):
    one, other = torch.relu(x).chunk(2, 1)
    return one * other


def broadcast(x):
    return torch.relu(x[:, :1]) * torch.linspace(0.5, 1, 4).view(1, 4, 1, 1)


def gradient_of_a_gradient(x):
    y = torch.relu(x).square().sum()
    return torch.autograd.grad(y, x, create_graph=True)[0].relu() + 0


def checkpointed_square(x):
    return checkpoint(squared_relu, x, use_reentrant=False)


@pytest.mark.parametrize(
    "function",
    [
        *(of_the_same_name, written_to, copy_written_to, square_written_to, retained),
        *(halves_multiplied, broadcast, gradient_of_a_gradient, checkpointed_square),
    ],
    ids=lambda function: function.__name__,
)
def test_where_it_is_not_certain_the_gradient_is_sent(function):
    y = function(around_zero())
    message, mine = encode([y], Zeros())
    (received,), theirs = decode(message)
    assert same(received, y.detach().contiguous())
    assert mine == theirs == [None]


def test_a_send_computes_nothing_of_a_checkpointed_stage():
    calls = []

    def stage(x):
        calls.append(1)
        return torch.relu(x).square()

    y = checkpoint(stage, around_zero(), use_reentrant=False)
    encode([y], Zeros())
    assert len(calls) == 1


@pytest.mark.parametrize("factor", [torch.inf, -2.0])
def test_products_keep_every_bit(factor):
    y = torch.relu(around_zero()) * factor
    assert same(decode(encode([y], Zeros())[0])[0][0], y.detach())


def test_what_was_overwritten_since_is_not_read():
    y = torch.relu(around_zero()).square()
    y.grad_fn.next_functions[0][0]._saved_result.add_(1)
    assert encode([y], Zeros())[1] == [None]


def test_sources_live_no_longer_than_the_sending():
    source = torch.relu(around_zero())
    kept = source.index_select(1, torch.tensor([0, 2]))
    pass_origin(kept, source)
    assert not hasattr(kept, "_sparse_comm_origin"), "nobody wants to know"
    set_origin(source, Origin(unseen=lambda: True))
    pass_origin(kept, source)
    gone = weakref.ref(source)
    del source
    assert gone() is not None
    drop_origin(kept)
    assert gone() is None


ROW = (nn.Conv2d(4, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.2), nn.Flatten())


def test_a_row_of_torchs_layers_gives_what_is_between_to_nobody():
    assert hides_its_end(nn.Sequential(*ROW))
    assert hides_its_end(nn.Sequential(ROW[0], nn.Sequential(*ROW[1:])))
    assert hides_its_end(nn.ReLU())
    assert not hides_its_end(nn.Sequential(ROW[0], nn.Dropout(0.2)))
    assert not hides_its_end(nn.Sequential(nn.ReLU(), ROW[0], nn.Dropout(0.2)))
    assert not hides_its_end(nn.Sequential(nn.ReLU(), nn.GELU()))


@pytest.mark.parametrize("index", [None, 1, 3])
def test_hooks_of_layers_may_give_it_to_somebody(index):
    row = nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Identity(), nn.Dropout(0.2))
    layer = row if index is None else row[index]
    handle = layer.register_forward_hook(lambda module, args, output: None)
    assert not hides_its_end(row)
    handle.remove()
    assert hides_its_end(row)
    row[1].forward = lambda x: x
    assert not hides_its_end(row)


def test_hooks_of_all_modules_may_give_it_to_somebody():
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: None)
    try:
        assert not hides_its_end(nn.Sequential(*ROW))
    finally:
        handle.remove()
    assert hides_its_end(nn.Sequential(*ROW))
