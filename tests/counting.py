"""Measure the cost of running code: its products of matrices, and the most that its tensors hold at one time."""

import math
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from storm_ref.cost import Cost, attention, linear


class Count(TorchDispatchMode):
    """Counts the products of matrices that torch runs while this is active, in `total`.

    Fused attention counts as its two products; torch's own counter takes the CPU's for nothing. An einsum counts as the
    product that it stands for: where a dimension to be summed has size one, torch multiplies elementwise instead.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = Cost()
        self._einsum = _Einsum(self)

    def __enter__(self) -> "Count":
        super().__enter__()
        self._einsum.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._einsum.__exit__(*error)
        super().__exit__(*error)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self._einsum.running:
            self.total += _product(func.overloadpacket.__name__, args)
        return result


class _Einsum(TorchFunctionMode):
    """Counts an einsum as a whole: its parts are no longer seen as one further down."""

    def __init__(self, count: Count) -> None:
        super().__init__()
        self.count, self.running = count, False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not torch.einsum:
            return func(*args, **(kwargs or {}))
        self.running = True
        try:
            result = func(*args, **(kwargs or {}))
        finally:
            self.running = False
        names, factors = args[0].partition("->")[0].split(","), args[1:]
        sizes = {i: size for name, t in zip(names, factors, strict=True) for i, size in zip(name, t.shape, strict=True)}
        self.count.total += Cost(math.prod(sizes.values()), sum(t.numel() for t in (*factors, result)))
        return result


def _product(name: str, args: tuple[Any, ...]) -> Cost:
    """The cost of one operation that torch has run; nothing for one that is not a product of matrices."""
    if name.startswith("_scaled_dot_product") and "backward" not in name:
        q, k = args[0].shape, args[1].shape
        return attention(q[0] * q[1], q[2], k[2], q[3])
    if name not in ("mm", "addmm", "bmm", "baddbmm"):
        return Cost()
    a, b = (t for t in args[-2:] if isinstance(t, Tensor))
    batch = a.shape[0] if a.ndim == 3 else 1
    return batch * linear(a.shape[-2], a.shape[-1], b.shape[-1])


class Live(TorchDispatchMode):
    """Bytes of the storages that torch makes while this is active and that still live, `now`, and the most, `peak`."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._storages: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        before = {_key(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for t in tree_leaves(result):
            if isinstance(t, Tensor) and _key(t) not in before and _key(t) not in self._storages:
                self._watch(t)
        self.peak = max(self.peak, self.now)
        return result

    def _watch(self, t: Tensor) -> None:
        storage, key = t.untyped_storage(), _key(t)
        size = storage.nbytes()

        def gone(_: object) -> None:
            self.now -= size
            del self._storages[key]

        self.now += size
        self._storages[key] = weakref.ref(storage, gone)


def _key(t: Tensor) -> int:
    return t.untyped_storage()._cdata
