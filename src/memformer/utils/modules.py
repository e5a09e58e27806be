"""The modules of a model, without a walk through it before every token."""

from itertools import chain
from weakref import WeakKeyDictionary

from torch import nn

Modules = tuple[nn.Module, ...]


class _Inside:
    """The modules inside a model. It does not hold the model itself, which must be freed when nobody uses it."""

    def __init__(self, model: nn.Module) -> None:
        self.modules: Modules = tuple(model.modules())[1:]
        self._places = [model._modules, *(module._modules for module in self.modules)]
        self._known = self._children()

    def _children(self) -> list[nn.Module | None]:
        return list(chain.from_iterable([place.values() for place in self._places]))

    def is_current(self) -> bool:
        """Return whether no module was added, replaced or removed."""
        return self._children() == self._known


_inside: WeakKeyDictionary[nn.Module, _Inside] = WeakKeyDictionary()


def modules_inside(model: nn.Module) -> Modules:
    """Return all modules of a model but itself: the same tuple until a module is added, replaced or removed."""
    known = _inside.get(model)
    if known is None or not known.is_current():
        known = _inside[model] = _Inside(model)
    return known.modules
