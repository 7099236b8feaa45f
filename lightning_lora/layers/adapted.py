"""Adapting a module in place: its class is replaced by one that derives from it, and what is added is a child of it."""

from __future__ import annotations

import copyreg
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar, TypeVar, cast

from torch import Tensor, nn

from lightning_lora import names

Module = TypeVar("Module", bound=nn.Module)


class Adapted(nn.Module):
    """Base of all classes that are swapped in: each derives from it and from the class of the module.

    Attributes:
        method_key: the key of the method, which is the name of the child that it adds.
        original_class: the class of the module before.
    """

    method_key: ClassVar[str]
    original_class: ClassVar[type[nn.Module]]

    def leave_update(self, keep: Callable[[Tensor], bool]) -> bool:
        """Write what was trained into the parameters, for good, where they can hold it; returns whether they can.

        Args:
            keep: called before a tensor is written; false if it was written before, under another name.
        """
        return False


class DynamicClass(Adapted):
    """Mixin for classes made at run time, which cannot be imported by name: pickle stores how to make them.

    Attributes:
        class_recipe: a function that can be imported, and the arguments with which it gives the class.
    """

    class_recipe: ClassVar[tuple[Callable[..., type[nn.Module]], tuple[Any, ...]]]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle and copy by the recipe."""
        rebuild, arguments, *rest = cast("tuple[Any, ...]", super().__reduce_ex__(max(2, protocol)))
        if rebuild is copyreg.__newobj__ and arguments[0] is type(self):  # type: ignore[attr-defined]
            return (_rebuild, (*self.class_recipe, *arguments[1:]), *rest)
        return (rebuild, arguments, *rest)


def _rebuild(make: Callable[..., type[nn.Module]], recipe: tuple[Any, ...], *arguments: Any) -> nn.Module:
    cls = make(*recipe)
    return cls.__new__(cls, *arguments)


_CLASSES: dict[tuple[type[Adapted], type[nn.Module]], type[Adapted]] = {}  # torch.compile guards on the class


def swapped_class(mixin: type[Adapted], original: type[nn.Module]) -> type[Adapted]:
    """The class that derives from ``mixin`` and ``original``, one for each pair of them.

    Args:
        mixin: a class that can be imported by name. Its ``forward`` may call ``super().forward``, the original's.
        original: the class of a module that is not adapted.
    """
    if (mixin, original) not in _CLASSES:
        attributes = {"class_recipe": (swapped_class, (mixin, original)), "__module__": __name__}
        cls = derived(original, [DynamicClass, mixin, original], f"{mixin.__name__}{original.__name__}", attributes)
        _CLASSES.setdefault((mixin, original), cls)
    return _CLASSES[mixin, original]


def derived(
    original: type[nn.Module], bases: list[type[nn.Module]], name: str, attributes: dict[str, Any]
) -> type[Adapted]:
    """A class with these ``bases`` that a module of the class ``original`` can be given."""
    attributes = {**attributes, "original_class": original}
    if nn.Module in _layout_bases(original):
        return cast("type[Adapted]", type(name, tuple(bases), attributes))
    return _with_layout_of(original, name, bases, attributes)


def _layout_bases(cls: type) -> Iterator[type]:
    """The chain of bases from which ``cls`` has its memory layout: of several, Python takes the first."""
    base = cls.__base__
    while base is not None:
        yield base
        base = base.__base__


def _with_layout_of(
    original: type[nn.Module], name: str, bases: list[type[nn.Module]], attributes: dict[str, Any]
) -> type[Adapted]:
    """``type(name, bases, attributes)`` where the first base of ``original`` is no module, as in ``(ABC, nn.Linear)``.

    Python replaces the class of an object only by one that has its layout from the same base. So ``original`` is the
    first base here, and a metaclass keeps the order in which methods are looked up.
    """
    ordered = type(name, tuple(bases), {})

    def mro(cls: type) -> list[type]:
        return [cls, *ordered.__mro__[1:]] if "original_class" in vars(cls) else type.mro(cls)

    metaclass: Any = type(type(ordered).__name__, (type(ordered),), {"mro": mro})
    rest = (base for base in bases if base is not original)
    return metaclass(name, (original, *rest), attributes)  # type: ignore[no-any-return]


def not_swappable(module: nn.Module, key: str) -> str | None:
    """Why the class of ``module`` cannot be replaced, as the end of a sentence about it; ``None`` if it can.

    Args:
        module: any module.
        key: of the method.
    """
    if "forward" in vars(module):
        return "has a `forward` set on the instance, which would bypass the adapter"
    if hasattr(module, key) and not isinstance(module, Adapted):
        return f"has an attribute `{key}` of its own, where the adapter would go"
    return None


def swap_in(module: nn.Module, mixin: type[Adapted], child: nn.Module) -> None:
    """Give ``module`` the class of ``mixin`` and its own one, and ``child`` under the key of the method.

    The object, its parameters, their names and its hooks stay.
    """
    swap(module, swapped_class(mixin, type(module)), child)


def swap(module: nn.Module, cls: type[Adapted], child: nn.Module) -> None:
    """As :func:`swap_in`, with the class that ``module`` gets."""
    child.train(module.training)
    module._modules.pop(cls.method_key, None)
    module.add_module(cls.method_key, child)
    module.__class__ = cls


def swap_out(module: Adapted) -> nn.Module:
    """Give ``module`` its original class back, and return the child that was added."""
    child = added_to(module)
    del module._modules[module.method_key]
    module.__class__ = _without_method(type(module))  # type: ignore[assignment]
    return child


def _without_method(cls: type[Adapted]) -> type[nn.Module]:
    """The original class; under ``fully_shard``, which makes a class of its own, that class of the original."""
    if "original_class" in vars(cls):
        return cls.original_class
    unit, *_ = cls.__bases__  # FSDPModule
    original = cls.original_class
    return type(f"FSDP{original.__name__}", (unit, original), {"__deepcopy__": cls.__deepcopy__})  # type: ignore[attr-defined]


def added_to(module: Adapted) -> nn.Module:
    """The child that the method added to ``module``."""
    child = module._modules[module.method_key]
    assert child is not None
    return child


def has_added(module: nn.Module) -> bool:
    """Whether ``module`` is adapted, and not only swapped for what was adapted in it, with an empty child."""
    if not isinstance(module, Adapted):
        return False
    child = added_to(module)
    return bool(child._parameters or child._modules)


def adapted_modules(model: nn.Module) -> Iterator[tuple[str, Adapted]]:
    """The adapted modules of ``model``, of whatever method, by their first clean names."""
    for name, module in names.each_module_once(model):
        if isinstance(module, Adapted):
            yield names.clean(name), module


class FullPrecision(nn.Module):
    """Base of what a method adds: its parameters keep their dtype, fp32, when the model is cast.

    ``model.half()`` and Lightning's ``precision="bf16-true"`` cast everything else. In bf16 an update of 1e-3 to a
    value of 1 is lost.

    Attributes:
        loads: how often a state dict gave it values: what is loaded is meant, what another hook wrote is not.
    """

    loads: int = 0

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        self.loads += any(f"{prefix}{name}" in state_dict for name in self._parameters)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _apply(self: Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Module:
        apply = super()._apply
        keep_dtype(self.parameters(), lambda: apply(fn, recurse))  # type: ignore[no-untyped-call]
        return self


def keep_dtype(parameters: Iterable[nn.Parameter], apply: Callable[[], object]) -> None:
    """Call ``apply``, which may cast ``parameters``, and give them their dtype back with the values from before.

    They are not cast to another dtype and back: a resumed run needs the same bits.
    """
    before = [(p, p.data, None if p.grad is None else p.grad.detach()) for p in parameters]
    try:
        apply()
    finally:
        for parameter, data, grad in before:
            if parameter.dtype != data.dtype:
                parameter.grad = None
                parameter.data = data.to(parameter.device)
                parameter.grad = None if grad is None else grad.to(parameter.device)
