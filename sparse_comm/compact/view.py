"""``module.weight`` of a compact parameter: a dense tensor whose writes reach the values.

In eager mode the attribute gives a ``DenseView``. Operators see the plain dense tensor inside it;
the view exists to notice what a plain tensor would let pass in silence: a write (``nn.init``,
``.data.copy_()``, ``weight[0] = 0``) is packed into the values, and what belongs to the parameter
(``grad``, ``requires_grad``, hooks) is passed on to them. In transient mode it also keeps autograd
from saving the dense weight (``saved.py``). Compiled code gets the plain tensor.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

import torch
from torch import Tensor

from sparse_comm.compact.link import Link, assign_dense
from sparse_comm.compact.saved import expand_again_in_backward
from sparse_comm.compact.slot import Slot

__all__ = ["DenseView"]


class DenseView(torch.Tensor):
    """The dense weight of a compact parameter. Made by the module's attribute, not by users."""

    _plain: Tensor  # the ordinary tensor, with its autograd history
    _link: Link
    _may_get_history = False  # of a view made under no_grad, as all are in an autograd function
    _is_param = False  # isinstance(module.weight, nn.Parameter): True for the attribute itself

    @staticmethod
    def wrap(plain: Tensor, link: Link, whole: bool) -> DenseView:
        """Around ``plain``, which is the link's base (``whole``) or a view of it."""
        view = plain.as_subclass(DenseView)
        view.__dict__.update(_plain=plain, _link=link, _is_param=whole)
        if not whole:
            view.__dict__["_may_get_history"] = not torch.is_grad_enabled()
        return view

    @classmethod
    def of(cls, slot: Slot, values: Tensor) -> DenseView:
        """The dense view of a parameter's ``values``."""
        # A normal tensor even under inference_mode: only those count their versions.
        with _normal_tensors():
            plain = slot.weight(values)
            if values.requires_grad and plain.grad_fn is None:
                plain.requires_grad_()  # under no_grad too: matmul chooses its kernel by it
        return cls.wrap(plain, Link(slot, values, plain), whole=True)

    def current(self) -> Tensor:
        """The plain tensor for an operator to read or write, up to date with the values."""
        self._take_history()
        if not torch.is_grad_enabled():
            plain = self._plain.detach()
            return plain.requires_grad_(self._plain.requires_grad)
        link = self._link
        if self._is_param and link.values.requires_grad and self._plain.grad_fn is None:
            # made under no_grad, or before the values were trained, and kept
            plain = link.slot.weight(link.values)
            self.__dict__.update(_plain=plain, _link=Link(link.slot, link.values, plain))
        return self._plain

    def _take_history(self) -> None:
        """Give the tensor inside the history that this object got after it was made.

        It does from an autograd function that returns its input, or a view of it.
        """
        if self._is_param or not self._may_get_history or not torch.is_grad_enabled():
            return
        with torch._C.DisableTorchFunctionSubclass():
            try:
                is_leaf = self.is_leaf
            except RuntimeError:  # a view made under no_grad, of what was written to since
                is_leaf = True
            if not is_leaf:
                plain = super().as_subclass(torch.Tensor)
                self.__dict__.update(_plain=plain, _may_get_history=False)

    def __getattr__(self, name: str) -> Any:
        """What users and frameworks noted on the parameter (``allreduce``, ``is_expert``, …)."""
        link = self.__dict__.get("_link")
        if link is not None and self._is_param and name in link.values.__dict__:
            return link.values.__dict__[name]
        raise AttributeError(f"'Parameter' object has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "__class__":  # torch.utils.swap_tensors
            _refuse(self, "swapping tensors")
        # a note on the parameter, which this object would not outlive
        own = hasattr(Tensor, name) or not self._is_param
        object.__setattr__(self if own else self._link.values, name, value)

    def as_subclass(self, cls: Any) -> Any:
        """A copy: writes to another kind of tensor would not be noticed."""
        return self.current().clone().as_subclass(cls)

    def set_(self, *_: Any, **__: Any) -> Any:
        """Refused. Here, since PyTorch does not ask ``__torch_function__`` about it."""
        _refuse(self, "set_()")

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        special = _SPECIAL.get(func)
        if special is not None and args and isinstance(args[0], DenseView):
            return special(*args, **(kwargs or {}))
        if func is torch.autograd.grad:
            return _autograd_grad(*args, **(kwargs or {}))
        views: list[DenseView] = []
        args = _unwrap(args, views)
        kwargs = _unwrap(kwargs or {}, views)
        links = {id(v._link): v._link for v in views}
        for link in links.values():
            link.follow()
        before = {key: (link.base._version, link.base.grad_fn) for key, link in links.items()}
        transient = [link for link in links.values() if link.slot.mode == "transient"]
        try:
            if transient and torch.is_grad_enabled():
                with expand_again_in_backward([(x.slot, x.values, x.base) for x in transient]):
                    result = func(*args, **kwargs)
            else:
                result = func(*args, **kwargs)
        except RuntimeError as error:
            explained = _explained(error, views[0]._link.slot)
            if explained is error:
                raise
            raise explained from error
        for key, link in links.items():
            version, node = before[key]
            if link.base.grad_fn is not node:  # a parameter, being a leaf, would refuse this
                link.restore()
                raise RuntimeError(
                    f"in-place write to the dense weight of compact parameter {link.slot.name!r} "
                    "while gradients are recorded; write under torch.no_grad(), as for any "
                    "parameter"
                )
            if link.base._version != version:
                link.write_back()
        return _rewrap(result, links.values())


def _unwrap(value: Any, views: list[DenseView]) -> Any:
    """``value`` with plain tensors in place of the views, which are collected."""
    if isinstance(value, DenseView):
        views.append(value)
        return value.current()
    if type(value) in (list, tuple):
        return type(value)(_unwrap(v, views) for v in value)
    if type(value) is dict:
        return {k: _unwrap(v, views) for k, v in value.items()}
    return value


def _rewrap(result: Any, links: Iterable[Link]) -> Any:
    """``result`` with a view around each tensor that shares memory with a dense weight."""
    if isinstance(result, Tensor) and result.layout == torch.strided:
        storage = result.untyped_storage()._cdata
        for link in links:
            if link.base.untyped_storage()._cdata == storage:
                return DenseView.wrap(result, link, whole=False)
    elif type(result) in (list, tuple):
        return type(result)(_rewrap(r, links) for r in result)
    return result


def _explained(error: RuntimeError, slot: Slot) -> RuntimeError:
    """The operator's error, with what to do where the weight's dtype is behind it."""
    if slot.compute_dtype is None or "dtype" not in str(error):
        return error
    return RuntimeError(
        f"{error}\nThe weight of {slot.name!r} has compute_dtype {slot.compute_dtype}: run the "
        "model under torch.autocast, or cast its inputs and unmasked biases to that dtype"
    )


@contextlib.contextmanager
def _normal_tensors() -> Any:
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False), torch.no_grad():
            yield
    else:
        yield


# What belongs to the parameter rather than to one dense tensor.


def _of_parameter(view: DenseView, what: str) -> Link:
    if not view._is_param:
        raise RuntimeError(
            f"{what} of a view of the dense weight of compact parameter {view._link.slot.name!r}: "
            "use it on the module's attribute itself, or on a clone(); for tools that make a new "
            "parameter of it (parametrizations), call sparse_comm.densify(model) first"
        )
    return view._link


def _get_data(view: DenseView) -> DenseView:
    # detach, not .data: it shares the version counter by which writes are noticed
    return DenseView.wrap(view._plain.detach(), view._link, whole=False)


def _set_data(view: DenseView, dense: Tensor) -> None:
    link = _of_parameter(view, ".data assignment")
    plain = dense._plain if isinstance(dense, DenseView) else dense
    if plain.shape != link.slot.pattern.shape:
        raise ValueError(
            f"data for compact parameter {link.slot.name!r} has shape {tuple(plain.shape)}, "
            f"expected the dense shape {tuple(link.slot.pattern.shape)}; to change its shape, call "
            "sparse_comm.densify(model) first"
        )
    assign_dense(link.slot, link.values, plain)


def _get_grad(view: DenseView) -> DenseView | None:
    if not view._is_param or view._link.values.grad is None:
        return None
    slot, grad = view._link.slot, view._link.values.grad
    with torch.no_grad():
        dense = slot.expand(grad)
    return DenseView.wrap(dense, Link(slot, grad, dense), whole=False)


def _set_grad(view: DenseView, grad: Tensor | None) -> None:
    link = _of_parameter(view, ".grad assignment")
    if isinstance(grad, DenseView):
        grad = grad._plain
    if grad is not None:
        if grad.shape != link.slot.pattern.shape:
            raise ValueError(
                f"gradient for compact parameter {link.slot.name!r} has shape "
                f"{tuple(grad.shape)}, expected {tuple(link.slot.pattern.shape)}"
            )
        grad = link.slot.pack(grad.detach()).to(link.values.dtype)
    link.values.grad = grad


def _get_requires_grad(view: DenseView) -> bool:
    view._take_history()
    return view._link.values.requires_grad if view._is_param else view._plain.requires_grad


def _requires_grad_(view: DenseView, requires_grad: bool = True) -> DenseView:
    _of_parameter(view, "requires_grad_()").values.requires_grad_(requires_grad)
    return view


def _set_requires_grad(view: DenseView, requires_grad: bool) -> None:
    _requires_grad_(view, requires_grad)


def _autograd_grad(outputs: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
    """Of a weight, by way of its values: at each use of a module it is another tensor."""
    inputs = [inputs] if isinstance(inputs, Tensor) else list(inputs)
    links = [x._link if isinstance(x, DenseView) and x._is_param else None for x in inputs]
    inputs = [x if link is None else link.values for x, link in zip(inputs, links, strict=True)]
    rest = _unwrap([outputs, inputs, *args], []), _unwrap(kwargs, [])
    grads = torch.autograd.grad(*rest[0], **rest[1])
    return tuple(
        grad if link is None or grad is None else link.slot.expand(grad)
        for grad, link in zip(grads, links, strict=True)
    )


def _retains_grad(view: DenseView) -> bool:
    """An optimizer asks, of tensors that are not leaves."""
    if not view._is_param:
        return view._plain.retains_grad
    raise ValueError(
        f"the dense weight of compact parameter {view._link.slot.name!r} is not a leaf, so an "
        "optimizer cannot hold it: give the optimizer the values, from model.parameters()"
    )


def _register_hook(view: DenseView, hook: Callable[[Tensor], Tensor | None]) -> Any:
    """The hook sees the dense gradient, zero where pruned, and may return another."""
    link = _of_parameter(view, "register_hook()")
    slot = link.slot

    def on_values(grad: Tensor) -> Tensor | None:
        changed = hook(slot.expand(grad))
        return None if changed is None else slot.pack(changed)

    return link.values.register_hook(on_values)


def _register_post_hook(view: DenseView, hook: Callable[[Tensor], None]) -> Any:
    name = _of_parameter(view, "register_post_accumulate_grad_hook()").slot.name
    raise RuntimeError(
        f"register the hook on the values of compact parameter {name!r}: "
        f"dict(model.named_parameters())[{name!r}].register_post_accumulate_grad_hook(hook)"
    )


class _Node:
    """The autograd node of a dense weight.

    ``nn.Module.register_parameter`` asks for its truth, to refuse tensors that are not leaves;
    that is where another module would take the dense weight for a parameter of its own.
    """

    def __init__(self, node: Any, name: str) -> None:
        self._node, self._name = node, name

    def __getattr__(self, name: str) -> Any:
        return getattr(self._node, name)

    def __bool__(self) -> bool:
        raise RuntimeError(
            f"the dense weight of compact parameter {self._name!r} cannot become a parameter of "
            "another module (tie_weights, SyncBatchNorm conversion, parametrizations and pruning "
            "try that): do it before sparse_comm.compact, or after sparse_comm.densify"
        )


def _grad_fn(view: DenseView) -> Any:
    """A node always: a dense weight is a function of its values, never a leaf."""
    if not view._is_param:
        view._take_history()
        return view._plain.grad_fn
    return _Node(view._plain.grad_fn, view._link.slot.name)


def _read_only(function: Callable[..., Any]) -> Callable[..., Any]:
    """For methods that give a NumPy array."""

    def special(view: DenseView, *args: Any, **kwargs: Any) -> Any:
        array = function(view._plain, *args, **kwargs)
        array.flags.writeable = False
        return array

    return special


def _plain_copy(view: DenseView, *_: Any) -> Tensor:
    return view._plain.detach().clone()


def _refuse(view: DenseView, what: str) -> NoReturn:
    raise RuntimeError(
        f"{what} on the dense weight of compact parameter {view._link.slot.name!r} would have no "
        "effect on it: copy into it under torch.no_grad(); for tools that replace it "
        "(parametrizations), call sparse_comm.densify(model) first"
    )


def _refuse_of_parameter(function: Callable[..., Any]) -> Callable[..., Any]:
    """For methods that change shape or strides in place."""

    def special(view: DenseView, *args: Any, **kwargs: Any) -> Any:
        if view._is_param:
            _refuse(view, f"{function.__name__}()")
        return _rewrap(function(view.current(), *args, **kwargs), [view._link])

    return special


_T: Any = Tensor  # whose getters and setters type checkers do not know
_SPECIAL: dict[Any, Callable[..., Any]] = {
    _T.data.__get__: _get_data,
    _T.data.__set__: _set_data,
    _T.grad.__get__: _get_grad,
    _T.grad.__set__: _set_grad,
    _T.grad.__delete__: lambda view: _set_grad(view, None),
    _T.requires_grad.__get__: _get_requires_grad,
    _T.requires_grad.__set__: _set_requires_grad,
    _T.is_leaf.__get__: lambda v: v._plain.is_leaf and not v._is_param,
    _T.grad_fn.__get__: _grad_fn,
    Tensor.requires_grad_: _requires_grad_,
    Tensor.retain_grad: lambda view: None,  # values, being a leaf, keep their gradient anyway
    Tensor.register_hook: _register_hook,
    Tensor.register_post_accumulate_grad_hook: _register_post_hook,
    Tensor.numpy: _read_only(Tensor.numpy),
    Tensor.__array__: _read_only(Tensor.__array__),
    Tensor.__dlpack__: lambda view, *args, **kw: _plain_copy(view).__dlpack__(*args, **kw),
    Tensor.__deepcopy__: _plain_copy,
    Tensor.__reduce_ex__: lambda view, protocol: _plain_copy(view).__reduce_ex__(protocol),
    Tensor.retains_grad.__get__: _retains_grad,  # type: ignore[attr-defined]
}
for _name in (
    *("t_", "transpose_", "swapaxes_", "swapdims_", "squeeze_", "unsqueeze_"),
    *("as_strided_", "resize_", "resize_as_"),
):
    _SPECIAL[getattr(Tensor, _name)] = _refuse_of_parameter(getattr(Tensor, _name))
