"""A device that is not there: counts on the CPU how often the host would wait for a GPU.

Inside the mode, tensors that were `put` on the device, and what is computed from them, say that they are on `cuda:0`,
and values come back to the host only through calls that would wait for a GPU. Each such wait is noted with its place in
the code. What a GPU would refuse, one operation on tensors of two devices, is refused here too.
"""

from __future__ import annotations

import functools
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name

DEVICE = torch.device("cuda:0")
HOST = torch.device("cpu")
# Calls whose result, or the shape of it, the host must know.
READS = {
    *("item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__", "__complex__", "__contains__"),
    *("nonzero", "argwhere", "masked_select", "unique", "unique_consecutive", "bincount", "one_hot", "equal"),
    *("allclose", "is_nonzero", "__array__"),
}
TO_HOST = READS - {"nonzero", "argwhere", "masked_select", "unique", "unique_consecutive", "bincount", "one_hot"}
FROM_LISTS = {"tensor", "as_tensor", "new_tensor", "asarray"}
TRANSFERS = {"to", "cpu", "cuda", "pin_memory", "copy_"}


def is_there(value: Any) -> bool:
    """Whether a tensor is on the pretended device."""
    return bool(vars(value).get("_is_there", False))


def put(value: Any) -> Any:
    """Put a tensor, the tensors of a module, or of a list or dictionary on the device; returns what was given."""
    if isinstance(value, nn.Module):
        put([*value.parameters(), *value.buffers()])
    elif isinstance(value, Tensor):
        vars(value)["_is_there"] = True
    elif isinstance(value, Mapping):
        put(list(value.values()))
    elif isinstance(value, list | tuple):
        for one in value:
            put(one)
    return value


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors in nested lists, tuples, slices and dictionaries."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from tensors_in(list(value.values()))
    elif isinstance(value, list | tuple):
        for one in value:
            yield from tensors_in(one)


def kernel(function: Callable) -> Callable:
    """Make of a function on the host a kernel of the device: it reads its tensors, and nobody waits for it."""

    @functools.wraps(function)
    def launch(*args: Any, **kwargs: Any) -> Any:
        there = any(map(is_there, tensors_in([args, kwargs])))
        with torch._C.DisableTorchFunction():
            result = function(*args, **kwargs)
        return put(result) if there else result

    return launch


class PretendDevice(TorchFunctionMode):
    """The mode; after it, `waits` has one entry for each wait: the call, and file and line that made it."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []

    def by_file(self) -> Counter[str]:
        """Waits that each file caused, by its name."""
        return Counter(wait.split(" at ")[1].split(":")[0] for wait in self.waits)

    def _wait(self, name: str) -> None:
        frame: Any = sys._getframe(1)
        while frame is not None and any(part in frame.f_code.co_filename for part in (__file__, "/torch/")):
            frame = frame.f_back
        place = "?" if frame is None else f"{frame.f_code.co_filename.rpartition('/')[2]}:{frame.f_lineno}"
        self.waits.append(f"{name} at {place}")

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        full_name = resolve_name(func) or getattr(func, "__name__", "")
        name = full_name.removesuffix(".__get__").rpartition(".")[2]
        if full_name.endswith(".__get__") and name in ("device", "is_cuda", "is_cpu"):
            here = DEVICE if is_there(args[0]) else func(*args)
            return here if name == "device" else is_there(args[0]) == (name == "is_cuda")
        if full_name.endswith((".__get__", ".__set__")):
            return self._marked(func(*args, **kwargs), any(map(is_there, tensors_in(args))))
        if name == "backward":
            with mock.patch.object(torch.autograd, "_engine_run_backward", self._run_backward):
                return func(*args, **kwargs)
        if name in TRANSFERS and isinstance(args[0], Tensor):
            return self._transfer(name, func, args, kwargs)
        return self._compute(name, func, args, kwargs)

    def _run_backward(self, *args: Any, **kwargs: Any) -> Any:
        with self:  # what checkpointing computes again is counted too
            return torch.autograd.graph._engine_run_backward(*args, **kwargs)

    def _compute(self, name: str, func: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        given = list(tensors_in([args, kwargs]))
        there = any(map(is_there, given))
        if "device" in kwargs:
            device = kwargs["device"]
            wanted = there if device is None else torch.device(device).type == "cuda"
            kwargs = {**kwargs, "device": None if device is None else HOST}
            result = func(*args, **kwargs)
            if name in FROM_LISTS and wanted and not there and result.numel():
                self._wait(name)
            return self._marked(result, wanted)
        if there:
            self._check_devices(name, args, given)
            if self._reads(name, args, kwargs):
                self._wait(name)
        return self._marked(func(*args, **kwargs), there and name not in TO_HOST)

    def _reads(self, name: str, args: tuple, kwargs: dict[str, Any]) -> bool:
        if name in READS:
            return True
        if name == "where":
            return len(args) + len(kwargs) == 1
        if name == "repeat_interleave":
            repeats = kwargs.get("repeats", args[1] if len(args) > 1 else args[0])
            return isinstance(repeats, Tensor) and kwargs.get("output_size") is None
        if name in ("__getitem__", "__setitem__"):
            index = list(tensors_in(args[1]))
            by_mask = any(one.dtype == torch.bool for one in index)
            if name == "__setitem__" and by_mask:
                by_mask = isinstance(args[2], Tensor) and args[2].numel() > 1  # otherwise it is a masked_fill
            return by_mask or (is_there(args[0]) and not all(map(is_there, index)))
        return False

    @staticmethod
    def _check_devices(name: str, args: tuple, given: list[Tensor]) -> None:
        if name in ("__getitem__", "__setitem__", "set_", "__set__"):
            return
        strangers = [list(one.shape) for one in given if one.ndim and not is_there(one)]
        if strangers:
            raise RuntimeError(f"{name}: tensors of shapes {strangers} are on the host, others on the device")

    def _transfer(self, name: str, func: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        source, *rest = args
        there = is_there(source)
        if name == "pin_memory":
            assert not there, "only what is on the host can be pinned"
            copy = source.clone()
            vars(copy)["_is_pinned"] = True
            return copy
        if name == "copy_":
            if there != is_there(rest[0]) and not (kwargs.get("non_blocking") or rest[1:]):
                self._wait(name)
            return func(*args, **kwargs)
        wanted, options = self._target(name, source, rest, kwargs)
        # Only from pinned memory does a copy run by itself.
        if wanted != there and not (options.pop("non_blocking", False) and vars(source).get("_is_pinned")):
            self._wait(name)
        options.pop("non_blocking", None)
        result = torch.Tensor.to(source, source.dtype if options.get("dtype") is None else options["dtype"])
        return self._marked(result.clone() if wanted != there else result, wanted)

    @staticmethod
    def _target(name: str, source: Tensor, rest: list, kwargs: dict[str, Any]) -> tuple[bool, dict[str, Any]]:
        """Whether a transfer ends on the device, and its options."""
        if name == "cpu":
            return False, {}
        if name == "cuda":
            return True, {"non_blocking": kwargs.get("non_blocking", False)}
        if rest and isinstance(rest[0], Tensor):
            return is_there(rest[0]), {"dtype": rest[0].dtype, "non_blocking": kwargs.get("non_blocking", False)}
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(
            *rest, **{k: v for k, v in kwargs.items() if k != "copy"}
        )
        wanted = is_there(source) if device is None else device.type == "cuda"
        return wanted, {"dtype": dtype, "non_blocking": non_blocking}

    @staticmethod
    def _marked(result: Any, there: bool) -> Any:
        return put(result) if there else result
