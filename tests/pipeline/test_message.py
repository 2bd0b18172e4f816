"""A message gives back what was put into it, to the bit, or an error."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparse_comm.kernels import use_backend
from sparse_comm.pipeline import Dense, MessageError, Zeros, decode, encode
from tests.pipeline.tensors import around_zero, same, sparse

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
DTYPES = [*FLOATS, torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64]
SHAPES = [(), (0,), (1,), (3, 0, 2), (63,), (2, 3, 65), (4097,)]


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
