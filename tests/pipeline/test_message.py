"""A message gives back what was put into it, to the bit, or an error."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sparse_comm.kernels import use_backend
from sparse_comm.pipeline import Dense, MessageError, Zeros, decode, encode

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
DTYPES = [*FLOATS, torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64]
SHAPES = [(), (0,), (1,), (3, 0, 2), (63,), (2, 3, 65), (4097,)]
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def same(a: Tensor, b: Tensor) -> bool:
    """To the bit: NaNs and the sign of zero count."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if a.is_complex():
        a, b = torch.view_as_real(a), torch.view_as_real(b)
    integer = BITS[a.itemsize]
    return torch.equal(a.contiguous().view(integer), b.contiguous().view(integer))


def sparse(shape: tuple[int, ...], dtype: torch.dtype, density: float = 0.2) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(shape, generator=generator) * 9
    # Not by a product, which would make zeros of either sign.
    return values.where(torch.rand(shape, generator=generator) < density, 0).to(dtype)


@pytest.fixture(params=["native", "reference"])
def backend(request):
    use_backend(request.param)
    yield
    use_backend(None)


@pytest.mark.parametrize("codec", [Dense(), Zeros()], ids=lambda codec: codec.name)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_sent_arrives(codec, dtype, shape, backend):
    sent = [sparse(shape, dtype), None, sparse((5, 40), torch.float32), torch.arange(3)]
    message, _ = encode(sent, codec)
    received, _ = decode(message)
    assert received[1] is None
    for before, after in zip(sent, received, strict=True):
        assert before is None or same(before, after)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(0, 70), max_size=3).map(tuple),
    dtype=st.sampled_from(FLOATS),
    density=st.sampled_from([0.0, 0.1, 0.5, 0.93, 1.0]),
    bits=st.integers(0, 1 << 31),
)
def test_every_bit_pattern_arrives(shape, dtype, density, bits):
    generator = torch.Generator().manual_seed(bits)
    raw = torch.randint(0, 256, (*shape, dtype.itemsize), dtype=torch.uint8, generator=generator)
    kept = torch.rand(shape, generator=generator) < density
    raw *= kept.unsqueeze(-1)
    (received,), _ = decode(encode([raw.view(dtype).squeeze(-1)], Zeros())[0])
    assert same(raw.view(dtype).squeeze(-1), received)


@pytest.mark.parametrize("special", [float("nan"), float("inf"), -float("inf"), -0.0])
def test_nan_inf_and_negative_zero_pass(special):
    x = sparse((7, 100), torch.float32)
    x[3, 5:9] = special
    message, _ = encode([x], Zeros())
    assert message.numel() < x.nbytes
    assert same(x, decode(message)[0][0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_bytes_are_those_of_the_nonzeros_and_a_bit_an_entry(dtype):
    x = torch.relu(sparse((1 << 18,), dtype, 0.4)).requires_grad_()
    y = torch.relu(x * 1)
    density = (y != 0).float().mean().item()
    message, mine = encode([y], Zeros())
    assert message.numel() <= (density + 1 / 16 + 0.005) * y.nbytes
    _, theirs = decode(message)
    back, _ = encode([torch.randn(y.shape).to(dtype)], Zeros(), theirs)
    assert back.numel() <= (density + 0.005) * y.nbytes
    assert mine[0] is not None


def test_what_would_grow_goes_dense():
    x = torch.randn(10_000).bfloat16()
    assert encode([x], Zeros())[0].numel() == encode([x], Dense())[0].numel()
    assert encode([x], Zeros())[0].numel() <= x.nbytes + 256


@pytest.mark.parametrize("layout", ["transposed", "channels last", "expanded", "sliced"])
def test_any_layout_arrives(layout):
    x = sparse((4, 6, 8, 10), torch.float32)
    x = {
        "transposed": lambda: x.transpose(1, 3),
        "channels last": lambda: x.to(memory_format=torch.channels_last),
        "expanded": lambda: x[:1].expand(5, 6, 8, 10),
        "sliced": lambda: x[:, 1::2, :, 3:],
    }[layout]()
    assert same(x.contiguous(), decode(encode([x], Zeros())[0])[0][0])


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


def in_place(x):
    return (x * 1).relu_()


REUSED = [
    *(relu, squared_relu, squared_by_product, dropout_of_relu, dropout, pooled, flattened),
    *(narrowed, relu6, scaled, permuted, in_place),
]


def around_zero(seed: int = 0) -> Tensor:
    """Many negative, and some so small that squares and half precision lose them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 4, 8, 8, generator=generator) - 0.8
    small = torch.rand(x.shape, generator=generator) < 0.1
    return torch.where(small, x.abs() * 1e-25, x).requires_grad_()


@pytest.mark.parametrize("function", REUSED, ids=lambda function: function.__name__)
def test_gradients_through_zeros_are_as_if_all_of_them_were_sent(function):
    """Also where the output underflows but its derivative does not."""
    x = around_zero()
    torch.manual_seed(1)
    y = function(x)
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


def hooked(x):
    y = torch.relu(x)
    y.register_hook(lambda gradient: gradient / gradient.norm())
    return y


def retained(x):
    y = torch.relu(x)
    y.retain_grad()
    return y


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
        *(of_the_same_name, written_to, copy_written_to, square_written_to, hooked, retained),
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


@pytest.mark.parametrize("checksum", [False, True])
@pytest.mark.parametrize("of", ["dense", "zeros", "reply"])
def test_a_truncated_message_is_an_error(of, checksum):
    message, mine = damaged(of, checksum)
    for length in [0, 10, 23, 24, 50, message.numel() // 2, message.numel() - 1]:
        with pytest.raises(MessageError):
            decode(message[:length].clone(), mine)
        cut = message.clone()
        cut[length:] = 0  # as a buffer that was not filled
        with pytest.raises(MessageError):
            decode(cut, mine)


def damaged(of: str, checksum: bool) -> tuple[Tensor, list | None]:
    y = torch.relu(around_zero())
    if of == "dense":
        return encode([y, y], Dense(), checksum=checksum)[0], None
    message, mine = encode([y, y], Zeros(), checksum=checksum)
    if of == "zeros":
        return message, None
    _, theirs = decode(message)
    return encode([torch.ones_like(y)] * 2, Zeros(), theirs, checksum=checksum)[0], mine


@settings(max_examples=150, deadline=None)
@given(of=st.sampled_from(["dense", "zeros", "reply"]), data=st.data())
def test_no_damage_goes_unnoticed_with_a_checksum(of, data):
    message, mine = damaged(of, True)
    at = data.draw(st.integers(0, message.numel() - 1))
    message[at] ^= data.draw(st.integers(1, 255))
    with pytest.raises(MessageError):
        decode(message, mine, checksum=True)


@settings(max_examples=150, deadline=None)
@given(of=st.sampled_from(["dense", "zeros", "reply"]), data=st.data())
def test_without_a_checksum_damage_is_an_error_or_changes_values_only(of, data):
    message, mine = damaged(of, False)
    at = data.draw(st.integers(0, message.numel() - 1))
    message[at] ^= data.draw(st.integers(1, 255))
    try:
        received, _ = decode(message, mine)
    except MessageError:
        return
    assert [t.numel() for t in received] == [3 * 4 * 8 * 8] * 2


def test_a_message_of_another_micro_batch_is_an_error():
    message, _ = encode([torch.ones(3)], Dense(), number=4)
    with pytest.raises(MessageError, match="expected the message of micro-batch 5, got 4's"):
        decode(message, number=5)


def test_a_gradient_that_answers_another_tensor_is_an_error():
    y = torch.relu(around_zero())
    _, theirs = decode(encode([y], Zeros())[0])
    back, _ = encode([torch.ones_like(y)], Zeros(), theirs)
    _, other = encode([torch.relu(around_zero(5))], Zeros())
    with pytest.raises(MessageError):
        decode(back)
    with pytest.raises(MessageError):  # as many entries, but not the same number of them
        decode(back, other)


def test_what_a_message_cannot_hold_is_refused():
    with pytest.raises(TypeError, match="a message holds CPU tensors"):
        encode([torch.ones(3, device="meta")], Zeros())
