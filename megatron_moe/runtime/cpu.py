"""Replace what Megatron-Core 0.19 hard-codes to CUDA, so that it runs without a GPU.

This is not a mock: model, schedules, dispatcher, optimizer and checkpoints are Megatron-Core's own
and compute real results, on CPU tensors over gloo. Only names that cannot work on a CPU are
replaced, once, before Megatron-Core is first imported, and never in a process that runs on CUDA.
The machine's GPUs are hidden. Replacements::

    torch.cuda.current_device() and "cuda" literals      the CPU
    streams and events                                   objects that do nothing
    Tensor.record_stream(stream)                         nothing
    torch.cuda RNG state                                 the CPU generator's
    calls that wait for CUDA to be initialized           dropped, or they would pile up at each step
    Tensor.type() == "torch.cuda.FloatTensor"            true: Megatron-Core groups parameters by it
    all_to_all_single with sizes in a tensor             sizes in a list of int
    all_gather and reduce_scatter of unequal parts       padded to the largest part
    both as one tensor, in a group of one rank           at most one copy (gloo makes two)
    Megatron-Core's decorator torch.compile              no compilation: saves 4 s of imports
    functions of Apex and Transformer Engine             `torch_engine.py`
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.utils._device
from torch import Tensor

from megatron_moe.runtime.patches import replace
from megatron_moe.runtime.torch_engine import install_torch_engine

CPU = torch.device("cpu")
_installed = False


def install() -> None:
    """Patch this process so that Megatron-Core runs on CPU and gloo; a second call does nothing."""
    global _installed
    if _installed:
        return
    _installed = True
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # Megatron-Core asserts it for tp
    # Hide GPUs, in child processes too, because calls below torch's Python API are not replaced.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    _replace_cuda_queries()
    _replace_cuda_literals()
    _replace_collectives()
    _silence_warnings()
    _import_megatron_quietly()
    install_torch_engine(cuda=False)


class _Inert:
    """A CUDA stream or event that does nothing."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def record_event(self, *args: object) -> _Inert:
        return self

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None

    def __enter__(self) -> _Inert:
        return self

    def __exit__(self, *error: object) -> None:
        pass


def _replace_cuda_queries() -> None:
    def get_rng_state(device: object = None) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(state: Tensor, device: object = None) -> None:
        torch.set_rng_state(state)

    replacements: dict[str, Any] = {
        "current_device": lambda: CPU,
        "device_count": lambda: 1,
        "is_available": lambda: False,  # must not be derived from device_count
        "set_device": lambda device: None,
        "synchronize": lambda *args: None,
        "empty_cache": lambda: None,
        "Stream": _Inert,
        "Event": _Inert,
        "current_stream": _Inert,
        "default_stream": _Inert,
        "stream": lambda stream: contextlib.nullcontext(),
        "get_rng_state": get_rng_state,
        "set_rng_state": set_rng_state,
        "manual_seed": torch.manual_seed,
        "_lazy_call": lambda *args, **kwargs: None,
        "memory_allocated": lambda *args: 0,
        "max_memory_allocated": lambda *args: 0,
    }
    for name, replacement in replacements.items():
        replace(torch.cuda, name, replacement)
    replace(torch.cuda.random, "get_rng_state", get_rng_state)
    replace(torch.cuda.random, "set_rng_state", set_rng_state)


_FACTORIES = ("tensor", "empty", "zeros", "ones", "full", "arange", "empty_like", "zeros_like")


def _replace_cuda_literals() -> None:
    # ``with torch.device("meta")`` recognizes factories by identity and caches them at its first
    # use. Fill the cache now, or it would hold only our wrappers and miss the real factories.
    torch.utils._device._device_constructors()
    for name in _FACTORIES:
        replace(torch, name, _on_cpu(getattr(torch, name)))
    to, type_name = Tensor.to, Tensor.type

    def tensor_to(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        args = tuple(CPU if _is_cuda(arg) else arg for arg in args)
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        return to(self, *args, **kwargs)

    def tensor_type(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return type_name(self, *args, **kwargs)
        return f"torch.cuda.{type_name(self).rpartition('.')[2]}"  # also for the meta device

    replace(Tensor, "to", tensor_to)
    replace(Tensor, "type", tensor_type)
    replace(Tensor, "cuda", lambda self, *args, **kwargs: self)
    replace(Tensor, "record_stream", lambda self, stream: None)
    replace(torch.nn.Module, "cuda", lambda self, device=None: self)


def _is_cuda(device: object) -> bool:
    return isinstance(device, str | torch.device) and str(device).startswith("cuda")


def _on_cpu(factory: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(factory)
    def wrapped(*args: Any, **kwargs: Any) -> Tensor:
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return wrapped


def _replace_collectives() -> None:
    all_to_all_single, all_gather = dist.all_to_all_single, dist.all_gather
    reduce_scatter = dist.reduce_scatter

    def ints(sizes: Any) -> list[int] | None:
        return None if sizes is None else [int(size) for size in sizes]

    @functools.wraps(all_to_all_single)
    def all_to_all_single_of_ints(
        output: Tensor,
        input: Tensor,
        output_split_sizes: Any = None,
        input_split_sizes: Any = None,
        **kwargs: Any,
    ) -> Any:
        return all_to_all_single(
            output, input, ints(output_split_sizes), ints(input_split_sizes), **kwargs
        )

    @functools.wraps(all_gather)
    def all_gather_padded(
        tensor_list: list[Tensor], tensor: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        if _same_shape(tensor_list):
            return all_gather(tensor_list, tensor, *args, **kwargs)
        length = max(len(part) for part in tensor_list)
        padded = [tensor.new_empty((length, *tensor.shape[1:])) for _ in tensor_list]
        all_gather(padded, _pad_rows(tensor, length), *args, **kwargs)
        for part, source in zip(tensor_list, padded, strict=True):
            part.copy_(source[: len(part)])
        return None

    @functools.wraps(reduce_scatter)
    def reduce_scatter_padded(output: Tensor, input_list: list[Tensor], **kwargs: Any) -> Any:
        if _same_shape(input_list):
            return reduce_scatter(output, [part.contiguous() for part in input_list], **kwargs)
        length = max(len(part) for part in input_list)
        result = output.new_empty((length, *output.shape[1:]))
        reduce_scatter(result, [_pad_rows(part, length) for part in input_list], **kwargs)
        output.copy_(result[: len(output)])
        return None

    replace(dist, "all_to_all_single", all_to_all_single_of_ints)
    replace(dist, "all_gather", all_gather_padded)
    replace(dist, "reduce_scatter", reduce_scatter_padded)
    for name in ("all_gather_into_tensor", "reduce_scatter_tensor"):
        replace(dist, name, _copy_if_alone(getattr(dist, name)))


def _copy_if_alone(collective: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a collective so that a group of one rank only copies its input to its output."""

    @functools.wraps(collective)
    def wrapped(output: Tensor, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        group = kwargs.get("group") or dist.group.WORLD
        if args or group is None or group.size() > 1:
            return collective(output, input, *args, **kwargs)
        if output.data_ptr() != input.data_ptr():
            output.copy_(input.view_as(output))
        return _Inert() if kwargs.get("async_op") else None

    return wrapped


def _same_shape(tensors: Sequence[Tensor]) -> bool:
    return all(tensor.shape == tensors[0].shape for tensor in tensors)


def _pad_rows(tensor: Tensor, length: int) -> Tensor:
    padded = tensor.new_zeros((length, *tensor.shape[1:]))
    padded[: len(tensor)] = tensor
    return padded


def _silence_warnings() -> None:
    """Suppress warnings that torch 2.14 repeats at every step of Megatron-Core 0.19."""
    for name in (
        "torch.utils.cpp_extension",
        "megatron.core.distributed",
        "megatron.core.tensor_parallel.random",  # warns about the CPU's RNG
    ):
        logging.getLogger(name).setLevel(logging.ERROR)
    for message in (
        r".*`?torch\.distributed\.\w+`? is deprecated",
        r".*torch\.distributed\.nn\.functional",
        "full scope is deprecated",
        "MimoModelConfig is experimental",
        r"The \.grad attribute of a Tensor that is not a leaf",
        r".*`sequence_parallel` is set to `True`",  # experts with etp 1 under tp
    ):
        warnings.filterwarnings("ignore", message)


def _import_megatron_quietly() -> None:
    """Import Megatron-Core without its warnings that Apex and Transformer Engine are missing."""
    with warnings.catch_warnings(), _uncompiled():
        warnings.simplefilter("ignore")
        import megatron.core.models.gpt.gpt_layer_specs
        import megatron.core.optimizer  # noqa: F401


@contextlib.contextmanager
def _uncompiled() -> Iterator[None]:
    """Make ``@torch.compile`` return functions unchanged, without importing the compiler."""
    compiled = torch.compile
    torch.compile = lambda function: function
    try:
        yield
    finally:
        torch.compile = compiled
