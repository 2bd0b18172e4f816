"""The subclass that a module gets when one of its parameters becomes compact.

``module._parameters[name]`` holds the values, so every framework finds them under the parameter's
own name; a property of that name gives the dense weight, so ``forward`` finds what it always did.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sparse_comm.compact.kinds import CompactPretrained, CompactRNN
from sparse_comm.compact.link import assign_dense, memory_format_of
from sparse_comm.compact.slot import Slot, is_sharded, mark
from sparse_comm.compact.view import DenseView
from sparse_comm.compact.watch import MARK, REPLACED

__all__ = [
    "CompactModule",
    "become_compact",
    "become_plain",
    "compact_slots",
    "weight_of",
]


class CompactModule(nn.Module):
    """Mixed into the class of each module that has compact parameters, and of the model's root."""

    _compact: dict[str, Slot]

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Take an assignment to the attribute: values, a dense tensor to pack, or a tie."""
        slot = self._compact.get(name)
        if slot is None and self._compact:
            _check_none_removed(self)
        if isinstance(param, DenseView):
            _tie(self, name, param)
        elif slot is None or (is_sharded(param) and is_sharded(self._parameters[name])):
            super().register_parameter(name, param)
        elif is_sharded(param):
            raise RuntimeError(
                f"cannot shard the 1-D values of compact parameter {slot.name!r} as a matrix "
                "(tensor-parallel plans try that): leave its module out of the plan. FSDP2 "
                "(fully_shard) does shard values"
            )
        elif param is None:
            del self._compact[name]
            super().register_parameter(name, None)
        elif tuple(param.shape) == (slot.pattern.nnz,):
            old = self._parameters.get(name)
            if old is not None and old is not param:
                setattr(old, REPLACED, slot.name)
            super().register_parameter(name, param)
            slot.place(param)
        elif type(param.data) is not Tensor or param.layout != torch.strided:
            raise TypeError(
                f"cannot assign a {type(param.data).__name__} of layout {param.layout} to compact "
                f"parameter {slot.name!r}; call sparse_comm.densify(model) first"
            )
        elif param.shape == slot.pattern.shape:
            _replace(self, name, slot, param)
        else:
            raise ValueError(
                f"parameter assigned to {slot.name!r} has shape {tuple(param.shape)}, expected the "
                f"dense shape {tuple(slot.pattern.shape)} or that of its values "
                f"({slot.pattern.nnz},)"
            )

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Copied or unpickled."""
        super().__setstate__(state)
        for name, slot in self._compact.items():
            values = self._parameters[name]
            assert values is not None
            mark(values, slot)

    def __delattr__(self, name: str) -> None:
        if name in self._compact:
            raise RuntimeError(
                f"cannot remove compact parameter {self._compact[name].name!r} (parametrizations, "
                "weight_norm and torch pruning do so): call sparse_comm.densify(model) first, "
                "change the module, and compact it again"
            )
        super().__delattr__(name)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        for name, slot in self._compact.items():
            values = self._parameters[name]
            assert values is not None
            # .to(memory_format=…) passes over 1-D values; a small dense tensor shows what it does
            if len(slot.pattern.shape) in (4, 5):
                probe = torch.empty((2,) * len(slot.pattern.shape), device=values.device)
                after = fn(probe.contiguous(memory_format=slot.memory_format))
                slot.memory_format = memory_format_of(after)
            slot.place(values)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not self._compact and _inner_extra_state(type(self)) is None:
            destination.pop(prefix + "_extra_state", None)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        from sparse_comm.compact.state import check_state, pack_state

        check_state(self, state_dict, prefix)
        pack_state(self, state_dict, prefix)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        key = prefix + "_extra_state"  # a dense state has none
        if key in missing_keys and _inner_extra_state(type(self)) is None:
            missing_keys.remove(key)
        for slot in self._compact.values():
            slot.mark_stale()

    # Tools that look at the exact type of a module, or at its source.

    @property
    def qconfig(self) -> Any:
        """Absent. ``torch.ao.quantization`` sets it, and would then pass over this class."""
        raise AttributeError("qconfig")

    @qconfig.setter
    def qconfig(self, value: Any) -> None:
        raise RuntimeError(
            f"quantization finds modules by exact type and would skip this compact "
            f"{type(self).__name__}: call sparse_comm.densify(model) first"
        )

    def __prepare_scriptable__(self) -> Any:
        raise RuntimeError(
            "torch.jit.script cannot compile compact modules: use torch.export, torch.jit.trace "
            "or torch.compile, or call sparse_comm.densify(model) first"
        )

    def _replicate_for_data_parallel(self) -> Any:
        raise RuntimeError(
            f"DataParallel cannot replicate compact modules such as this {type(self).__name__}: "
            "use torch.nn.parallel.DistributedDataParallel, or a single GPU "
            "(CUDA_VISIBLE_DEVICES=0)"
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(max(int(protocol), 2))
        _, (cls, *rest), *state = reduced
        assert cls is type(self), f"{cls.__name__} pickles in a way of its own"
        return (_rebuild, (plain_class(cls), tuple(self._compact), *rest), *state)


class _Digests:
    """For modules that have compact parameters themselves: digests of the patterns in state dicts.

    Values of another pattern fit as well. Modules on the way to compact ones have nothing to say
    here, and ``torch.distributed.checkpoint`` insists on the key where a class defines the method.
    """

    _compact: dict[str, Slot]

    def get_extra_state(self) -> Any:
        """uint8 tensor of shape (compact parameters, 16): pattern digests in order of name."""
        digests = [
            list(bytes.fromhex(s.pattern.digest())) for _, s in sorted(self._compact.items())
        ]
        state = torch.tensor(digests, dtype=torch.uint8).reshape(-1, 16)
        if (inner := _inner_extra_state(type(self))) is not None:
            return {"patterns": state, "module": inner.get_extra_state(self)}
        return state

    def set_extra_state(self, state: Any) -> None:
        """Nothing to set: a digest that differs was refused before anything was loaded."""
        if (inner := _inner_extra_state(type(self))) is not None:
            inner.set_extra_state(self, state["module"] if _is_ours(state) else state)


_subclasses: dict[tuple[type[nn.Module], bool], type[CompactModule]] = {}


def _subclass(base: type[nn.Module], has_slots: bool) -> type[CompactModule]:
    """One subclass a base class, so that compiled code is shared; it keeps the base's name.

    Another one for modules that have no compact parameter, but are on the way to one.
    """
    if (base, has_slots) not in _subclasses:
        extra: tuple[type, ...] = (_Digests,) if has_slots else ()
        if issubclass(base, nn.RNNBase):
            extra += (CompactRNN,)
        if hasattr(base, "save_pretrained"):
            extra += (CompactPretrained,)
        names = {
            "__module__": base.__module__,
            "__qualname__": base.__qualname__,
            "__doc__": base.__doc__,
        }
        cls = type(base.__name__, (*extra, CompactModule, base), names)
        _subclasses[base, has_slots] = cls
    return _subclasses[base, has_slots]


def plain_class(cls: type[nn.Module]) -> type[nn.Module]:
    """The class that a compact class was made from."""
    return cls.__mro__[cls.__mro__.index(CompactModule) + 1]


def _plain_again(cls: type) -> type:
    """``cls`` without us; torch derives from it where other parameters are parametrized."""
    if CompactModule in cls.__bases__:
        return plain_class(cls)
    bases = (_plain_again(b) if issubclass(b, CompactModule) else b for b in cls.__bases__)
    own = {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__")}
    return type(cls.__name__, tuple(bases), own)


def _rebuild(base: type[nn.Module], names: tuple[str, ...], *args: Any) -> Any:
    cls = _subclass(base, bool(names))
    for name in names:
        _add_property(cls, name)
    return cls.__new__(cls, *args)


def become_compact(module: nn.Module, slots: dict[str, Slot]) -> None:
    """Give ``module`` the compact class, with these slots besides those it has."""
    if not isinstance(module, CompactModule):
        cls = _subclass(type(module), bool(slots))
        object.__setattr__(module, "_compact", {})
        object.__setattr__(module, "__class__", cls)
    elif slots and CompactModule in type(module).__bases__:  # on the way to one so far
        object.__setattr__(module, "__class__", _subclass(plain_class(type(module)), True))
    assert isinstance(module, CompactModule)
    for name, slot in slots.items():
        _add_property(type(module), name)
        module._compact[name] = slot
    if slots and isinstance(module, nn.RNNBase):
        module.__dict__.pop("_flat_weights", None)


def become_plain(module: CompactModule) -> None:
    """Give ``module`` its own class back."""
    object.__setattr__(module, "__class__", _plain_again(type(module)))
    del module.__dict__["_compact"]
    if isinstance(module, nn.RNNBase):
        module._init_flat_weights()


def _add_property(cls: type, name: str) -> None:
    if not isinstance(getattr(cls, name, None), _Weight):
        setattr(cls, name, _Weight(name))


class _Weight(property):
    """The property that gives a compact parameter's dense weight.

    It is the class's: of a module of the class that has no such parameter, the attribute is an
    ordinary one.
    """

    def __init__(self, name: str) -> None:
        super().__init__(
            lambda module: weight_of(module, name),
            lambda module, value: module.__dict__.__setitem__(name, value),
            lambda module: module.__dict__.pop(name),
        )


def weight_of(module: CompactModule, name: str) -> Tensor | None:
    """What ``module.name`` gives: the dense weight of a compact parameter.

    The raw parameter where it is not compact, and where it is sharded: FSDP2 asks for its own
    DTensor by this way, and the dense weight exists only between its gathering and its release.
    """
    if name not in module._parameters:
        if name in module.__dict__:
            return module.__dict__[name]
        raise AttributeError(f"{type(module).__name__!r} object has no attribute {name!r}")
    values = module._parameters[name]
    slot = module._compact.get(name)
    if slot is None or values is None:
        return values
    if torch.compiler.is_compiling():
        # no look at the mark or at nnz: compiled code would be of one parameter or one nnz only
        fits = values.dim() == 1 if len(slot.pattern.shape) != 1 else _fits(values, slot)
    else:
        fits = _fits(values, slot)
        if not hasattr(values, MARK):
            mark(values, slot)
    if is_sharded(values):
        slot.drop_cache()
        return values
    if not fits:
        if values.shape == slot.pattern.shape:  # functional_call with dense tensors
            return slot.expand(slot.pack(values))
        return values  # partitioned by a framework, which holds no data here
    if (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
    ):
        return slot.weight(values)
    return DenseView.of(slot, values)


def _fits(values: Tensor, slot: Slot) -> bool:
    return tuple(values.shape) == (slot.pattern.nnz,)


def compact_slots(model: nn.Module) -> Iterator[tuple[str, CompactModule, str, Slot]]:
    """(parameter's full name, module, attribute, slot) of every compact parameter, ties too."""
    for prefix, module in model.named_modules():
        if isinstance(module, CompactModule):
            for name, slot in module._compact.items():
                yield f"{prefix}.{name}" if prefix else name, module, name, slot


def _replace(module: CompactModule, name: str, slot: Slot, dense: nn.Parameter) -> None:
    """``module.weight = nn.Parameter(dense)``: the values take over all there is to it."""
    values = module._parameters[name]
    assert values is not None
    if values.is_meta and not dense.is_meta:  # a meta parameter can take no data
        slot.pattern = slot.pattern.to(dense.device)
        packed = slot.pack(dense.detach())
        module.register_parameter(name, nn.Parameter(packed, dense.requires_grad))
        return
    assign_dense(slot, values, dense)
    values.requires_grad_(dense.requires_grad)
    values.grad = None if dense.grad is None else slot.pack(dense.grad)
    notes = {k: v for k, v in dense.__dict__.items() if not k.startswith(MARK)}
    values.__dict__.update(notes)


def _tie(module: CompactModule, name: str, view: DenseView) -> None:
    """``a.weight = b.weight`` of a compact b: a's parameter is b's from now on."""
    slot, values = view._link.slot, view._link.values
    old = module._compact.get(name)
    if not view._is_param:
        raise TypeError(
            f"cannot assign a view of the dense weight of {slot.name!r} as parameter {name!r}; "
            "assign the module's attribute itself to tie them, or nn.Parameter(view.clone())"
        )
    if old is None:
        raise ValueError(
            f"cannot register the dense weight of compact parameter {slot.name!r} as {name!r}, "
            "which is not compact (torch pruning and ties try that): do it before "
            "sparse_comm.compact, or after sparse_comm.densify"
        )
    if old.pattern.shape != slot.pattern.shape:
        raise ValueError(
            f"cannot tie parameter {name!r} of shape {tuple(old.pattern.shape)} to {slot.name!r} "
            f"of shape {tuple(slot.pattern.shape)}"
        )
    module._compact[name] = slot
    nn.Module.register_parameter(module, name, values)  # type: ignore[arg-type]


def _check_none_removed(module: CompactModule) -> None:
    for name, slot in module._compact.items():
        if name not in module._parameters:
            raise RuntimeError(
                f"compact parameter {slot.name!r} was taken out of its module (the old "
                "torch.nn.utils.weight_norm does so), which is now without it: call "
                "sparse_comm.densify(model) before"
            )


def _inner_extra_state(cls: type) -> Any:
    """The class, below ours, that has an extra state of its own; None if there is none."""
    base = plain_class(cls)
    return base if base.get_extra_state is not nn.Module.get_extra_state else None


def _is_ours(state: Any) -> bool:
    return isinstance(state, dict) and set(state) == {"patterns", "module"}
