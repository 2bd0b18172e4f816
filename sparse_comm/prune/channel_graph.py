"""Which channels belong together: found by running a model once, and following its channels.

Each output channel of a Linear, a convolution or an embedding gets a number, and each tensor a
tensor of the same shape with the number of the channel that each of its entries belongs to.
Whatever moves entries is done to the numbers, too; what adds two tensors ties their channels, and
what nobody knows here protects the channels that go into it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

__all__ = ["ChannelGraph", "Use"]


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_SAME = _names(  # functions that look at each entry alone
    "relu relu_ relu6 leaky_relu prelu elu celu selu gelu silu mish sigmoid logsigmoid tanh "
    "softplus softsign hardtanh hardsigmoid hardswish threshold square sqrt abs neg exp pow "
    "__pow__ clone contiguous to float half bfloat16 double detach dropout dropout1d dropout2d "
    "dropout3d feature_dropout clamp"
)
_MOVES = _names(  # that move entries
    "view reshape flatten unflatten transpose permute unsqueeze squeeze chunk split unbind movedim "
    "swapaxes swapdims expand repeat cat concat stack __getitem__ select narrow t __get__ "
    "index_select tensor_split roll flip view_as moveaxis"
)
_BINARY = _names(
    "add add_ sub sub_ mul mul_ div div_ __add__ __radd__ __iadd__ __sub__ __rsub__ __isub__ "
    "__mul__ __rmul__ __imul__ __truediv__ true_divide maximum minimum"
)
_POOLS = _names(
    "max_pool1d max_pool2d max_pool3d _max_pool1d _max_pool2d _max_pool3d avg_pool1d avg_pool2d "
    "avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d "
    "adaptive_max_pool2d boolean_dispatch fn interpolate"
)
_CONVOLUTIONS = _names("conv1d conv2d conv3d")
_LAYERS = _CONVOLUTIONS | _names("linear embedding batch_norm multi_head_attention_forward")
_SHAPE = _names(
    "size dim ndimension numel nelement __len__ is_floating_point is_complex get_device stride "
    "is_contiguous storage_offset element_size data_ptr __hash__ __repr__ __format__"
)


@dataclass
class Use:
    """A parameter that has channels.

    Attributes:
        parameter: the parameter.
        channels: numbers, of the parameter's shape or one that broadcasts to it.
        writes: whether these are the channels that it makes; else those that it reads.
        scores: whether its entries count for how large a channel is.
    """

    parameter: Tensor
    channels: np.ndarray
    writes: bool
    scores: bool = False


@dataclass
class ChannelGraph(TorchFunctionMode):
    """Follows the channels of what is computed within it."""

    uses: list[Use] = field(default_factory=list)
    count: int = 0
    _ties: list[np.ndarray] = field(default_factory=list)
    _protected: list[np.ndarray] = field(default_factory=list)
    _numbers: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    _made: dict[tuple[int, int], Tensor] = field(default_factory=dict)  # by weight and dimension
    _read: dict[int, Tensor | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()

    def classes(self) -> tuple[np.ndarray, np.ndarray]:
        """Of each channel the class that it is pruned with; of each class whether it must stay."""
        pairs = np.concatenate([np.empty((0, 2), np.int64), *self._ties])
        graph = coo_array((np.ones(len(pairs)), (pairs[:, 0], pairs[:, 1])), (self.count,) * 2)
        _, of_channel = connected_components(graph, directed=False)
        protected = np.zeros(of_channel.max(initial=-1) + 1, bool)
        for numbers in self._protected:
            protected[of_channel[numbers]] = True
        return of_channel, protected

    def protect(self, *values: Any) -> None:
        """Whatever channels are in these may not be pruned."""
        for tensor in tree_flatten(values)[0]:
            if isinstance(tensor, Tensor) and (numbers := self._of(tensor)) is not None:
                found = np.unique(numbers.numpy())
                self._protected.append(found[found >= 0])

    # ---------------------------------------------------------------- following

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        result = function(*args, **kwargs)
        if name in _SHAPE or (name == "__get__" and not _tensors(result)):
            return result
        if not _tensors(result):  # written to something, or read off as numbers
            self.protect(args, kwargs)
            return result
        rule = self._rule(name)
        given = _tensors((args, kwargs))
        if name in _LAYERS or any(self._of(tensor) is not None for tensor in given):
            rule(function, result, args, kwargs)
        return result

    def _rule(self, name: str) -> Callable[..., None]:
        rules: dict[str, Callable[..., None]] = {
            "linear": self._linear,
            "embedding": self._embedding,
            "batch_norm": self._batch_norm,
            "scaled_dot_product_attention": self._attention,
            "multi_head_attention_forward": self._multi_head,
            "mean": self._mean,
        }
        for names, rule in (
            (_SAME, self._same),
            (_MOVES, self._move),
            (_BINARY, self._binary),
            (_POOLS, self._pool),
            (_CONVOLUTIONS, self._convolution),
        ):
            rules |= dict.fromkeys(names, rule)
        return rules.get(name, self._unknown)

    def _of(self, tensor: Any) -> Tensor | None:
        found = self._numbers.get(id(tensor))
        return None if found is None else found[1]

    def _set(self, tensor: Tensor, numbers: Tensor) -> None:
        # The tensor is kept, so that no other gets its id.
        self._numbers[id(tensor)] = tensor, numbers.expand(tensor.shape)

    def _new(self, count: int) -> Tensor:
        self.count += count
        return torch.arange(self.count - count, self.count)

    def _tie(self, one: Tensor, other: Tensor) -> None:
        a, b = (t.reshape(-1).numpy() for t in torch.broadcast_tensors(one, other))
        known = (a >= 0) & (b >= 0) & (a != b)
        if known.any():
            self._ties.append(np.unique(np.stack([a[known], b[known]], 1), axis=0))
        for numbers, others in ((a, b), (b, a)):  # tied to what has no number
            self._protected.append(np.unique(numbers[(numbers >= 0) & (others < 0)]))

    def _along(self, tensor: Tensor, dim: int) -> Tensor | None:
        """Numbers along a dimension, where the other dimensions do not matter; else protected."""
        if (numbers := self._of(tensor)) is None:
            return None
        rows = numbers.movedim(dim, -1).reshape(-1, numbers.shape[dim])
        if len(rows) and bool((rows == rows[0]).all()):
            return rows[0]
        self.protect(tensor)
        return None

    # ---------------------------------------------------------------- rules

    def _unknown(self, function: Any, result: Any, args: Any, kwargs: Any) -> None:
        self.protect(args, kwargs)

    def _same(self, function: Any, result: Any, args: Any, kwargs: Any) -> None:
        self.protect(args[1:], kwargs)  # an exponent, say
        numbers = self._of(args[0]) if args else None
        if numbers is None or not isinstance(result, Tensor):
            self._unknown(function, result, args, kwargs)
        else:
            self._set(result, numbers)

    def _move(self, function: Any, result: Any, args: Any, kwargs: Any) -> None:
        def numbers(value: Any) -> Any:
            if not isinstance(value, Tensor) or (value.ndim == 0 and not value.is_floating_point()):
                return value
            known = self._of(value)
            if known is not None:
                return known
            return torch.full(value.shape, -1) if value.is_floating_point() else value

        moved = function(*tree_map(numbers, args), **tree_map(numbers, kwargs))
        for tensor, of in zip(_tensors(result), _tensors(moved), strict=True):
            self._set(tensor, of)

    def _binary(self, function: Any, result: Any, args: Any, kwargs: Any) -> None:
        given = _tensors((args, kwargs))
        tensors = [t for t in given if t.numel() > 1] or given
        self.protect([t for t in given if t.numel() == 1 and len(given) > 1])
        known = [torch.full(t.shape, -1) if (n := self._of(t)) is None else n for t in tensors]
        if len(known) == 2:
            self._tie(*known)
        numbers = known[0] if bool((known[0] >= 0).any()) else known[-1]
        self._set(result, numbers)

    def _pool(self, function: Any, result: Any, args: Any, kwargs: Any) -> None:
        channels = self._along(args[0], 1)
        if channels is None:
            return
        for tensor in _tensors(result):
            if tensor.is_floating_point():
                self._set(tensor, channels.reshape(-1, *[1] * (tensor.ndim - 2)))

    def _mean(self, function: Any, result: Any, args: Any, kwargs: Any) -> None:
        dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
        keep = kwargs.get("keepdim", args[2] if len(args) > 2 else False)
        if dim is None:
            return self._unknown(function, result, args, kwargs)
        dims = [dim] if isinstance(dim, int) else list(dim)
        numbers = self._of(args[0])
        assert numbers is not None
        first = numbers
        for one in dims:
            first = first.narrow(one, 0, 1)
        if not bool((numbers == first).all()):
            return self._unknown(function, result, args, kwargs)
        self._set(result, first if keep else first.reshape(result.shape))
        return None

    def _linear(self, function: Any, result: Any, args: Any, kwargs: Any) -> None:
        x, weight, bias = _parameters(args, kwargs)
        read = self._along(x, -1)
        if self._reads(weight, read) and read is not None:
            self.uses.append(Use(weight, read[None].numpy(), writes=False))
        self._written(result, weight, bias, -1)

    def _convolution(self, function: Any, result: Any, args: Any, kwargs: Any) -> None:
        x, weight, bias = _parameters(args, kwargs)
        groups = kwargs.get("groups", args[6] if len(args) > 6 else 1)
        read = self._along(x, 1)
        numbers = self._written(result, weight, bias, 1)
        if not self._reads(weight, read) or read is None:
            return
        if groups > 1 and weight.shape[1] == 1 and weight.shape[0] == len(read):
            self._tie(numbers, read)  # depthwise
            return
        rows = read.reshape(groups, -1).repeat_interleave(weight.shape[0] // groups, 0)
        shape = (*rows.shape, *[1] * (weight.ndim - 2))
        self.uses.append(Use(weight, rows.reshape(shape).numpy(), writes=False))

    def _reads(self, weight: Tensor, read: Tensor | None) -> bool:
        """Whether this is the weight's first use; others read the same channels, or keep them."""
        if id(weight) not in self._read:
            self._read[id(weight)] = read
            return True
        before = self._read[id(weight)]
        if before is not None and read is not None:
            self._tie(before, read)
        else:
            for numbers in (before, read):
                if numbers is not None:
                    self._protected.append(np.unique(numbers[numbers >= 0].numpy()))
        return False

    def _written(self, result: Tensor, weight: Tensor, bias: Tensor | None, dim: int) -> Tensor:
        if (embedding := self._made.get((id(weight), 1))) is not None:  # tied to one
            self._protected.append(embedding.numpy())
        shape = (-1, *[1] * (result.ndim - 1 - dim % result.ndim))
        if (numbers := self._made.get((id(weight), 0))) is not None:  # used before
            self._set(result, numbers.reshape(shape))
            return numbers
        numbers = self._made[id(weight), 0] = self._new(weight.shape[0])
        self._set(result, numbers.reshape(shape))
        shape = (-1, *[1] * (weight.ndim - 1))
        self.uses.append(Use(weight, numbers.reshape(shape).numpy(), writes=True, scores=True))
        if bias is not None:
            self.uses.append(Use(bias, numbers.numpy(), writes=True))
        return numbers

    def _embedding(self, function: Any, result: Any, args: Any, kwargs: Any) -> None:
        weight = kwargs.get("weight", args[1] if len(args) > 1 else None)
        if (numbers := self._made.get((id(weight), 1))) is not None:  # used before
            self._set(result, numbers)
            return
        numbers = self._made[id(weight), 1] = self._new(weight.shape[1])
        if (id(weight), 0) in self._made:  # tied to a head that reads these columns
            self._protected.append(numbers.numpy())
        self.uses.append(Use(weight, numbers[None].numpy(), writes=True, scores=True))
        self._set(result, numbers)

    def _batch_norm(self, function: Any, result: Any, args: Any, kwargs: Any) -> None:
        channels = self._along(args[0], 1)
        if channels is None:
            return
        names = ("running_mean", "running_var", "weight", "bias")
        given = {**dict(zip(names, args[1:5], strict=False)), **kwargs}
        for name in ("weight", "bias"):
            if isinstance(given.get(name), Tensor):
                self.uses.append(Use(given[name], channels.numpy(), writes=True))
        self._set(result, channels.reshape(-1, *[1] * (result.ndim - 2)))

    def _attention(self, function: Any, result: Any, args: Any, kwargs: Any) -> None:
        """Query and key of a head meet in sums: heads go as a whole. (…, heads, length, width)."""
        names = ("query", "key", "value")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        numbers = [self._of(given[name]) for name in names]
        known = [n for n in numbers if n is not None]
        if len(known) < 3 or given["query"].ndim < 4:
            return self._unknown(function, result, args, kwargs)
        query, _, value = known
        heads = [n.movedim(-3, 0).flatten(1) for n in known]
        if len({len(head) for head in heads}) > 1:  # grouped queries
            return self._unknown(function, result, args, kwargs)
        first = query.movedim(-3, 0).flatten(1)[:, :1]
        for head in heads:
            self._tie(head, first)
        self._set(result, value.narrow(-2, 0, 1))
        return None

    def _multi_head(self, function: Any, result: Any, args: Any, kwargs: Any) -> None:
        """Of ``nn.MultiheadAttention``: its heads, in rows of one weight and columns of another."""
        given = inspect.signature(function).bind(*args, **kwargs).arguments
        self.protect(given["query"], given["key"], given["value"])
        weight, bias = given["in_proj_weight"], given["in_proj_bias"]
        if weight is not None:
            numbers = self._new(weight.shape[0])
            self.uses.append(Use(weight, numbers[:, None].numpy(), writes=True, scores=True))
            if bias is not None:
                self.uses.append(Use(bias, numbers.numpy(), writes=True))
            heads = numbers.reshape(3, given["num_heads"], -1)
            self._tie(heads, heads[:1, :, :1])
            read = heads[2].reshape(1, -1)
            self.uses.append(Use(given["out_proj_weight"], read.numpy(), writes=False))
        self._written(result[0], given["out_proj_weight"], given["out_proj_bias"], -1)


def _tensors(value: Any) -> list[Tensor]:
    return [t for t in tree_flatten(value)[0] if isinstance(t, Tensor)]


def _parameters(args: Any, kwargs: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    names = ("input", "weight", "bias")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    return given["input"], given["weight"], given.get("bias")
