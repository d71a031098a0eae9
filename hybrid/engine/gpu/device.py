"""Devices that torch knows: memory, a stream of work, and recordings of it that can be replayed.

`CudaDevice` is a GPU: work is asynchronous, a recording is a CUDA graph. `HostDevice` runs the same
work with torch on the CPU, at once: the GPU path's oracle, and what shows it where there is no GPU.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Sequence
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from hybrid.errors import DeviceUnavailable
from hybrid.kernels._native import CudaDriver, DeviceLink

# How a stream and the CPU wait for each other: by memory operations of the stream, by host
# functions on it, or by waiting for the stream from outside, with the recording cut in pieces.
Mechanism = Literal["memory-operations", "host-functions", "synchronise"]
MECHANISMS: tuple[Mechanism, ...] = get_args(Mechanism)
Work = Callable[[], object]


class Event(Protocol):
    """A place in a stream."""

    def record(self) -> None: ...
    def synchronize(self) -> None: ...


class Device(Protocol):
    """What executor and scheduler need of a device. Work runs in the order of `launch`."""

    name: str
    version: str  # of the driver and torch: with another one, measurements are out of date
    torch_device: torch.device

    @property
    def mechanisms(self) -> Sequence[Mechanism]:
        """Those that can be used here, the usually fastest first."""
        ...

    def host(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Zeros in host memory that the device can copy from and to."""
        ...

    def on_stream(self) -> contextlib.AbstractContextManager[object]:
        """Within it `launch`, `record` and `replay` may be called."""
        ...

    def launch(self, work: Callable[..., object], *arguments: object) -> None:
        """Enqueue `work(*arguments)`, kernels and copies; into the recording, if one is made."""
        ...

    def call(self, work: Work) -> None:
        """Call `work` on this thread, between what was launched before and what comes after."""
        ...

    def event(self) -> Event: ...
    def request(self, link: DeviceLink, slot: int, mechanism: Mechanism) -> None:
        """Enqueue the slot's request."""
        ...

    def wait(self, link: DeviceLink, slot: int, mechanism: Mechanism) -> None:
        """Enqueue the wait for the slot's answer."""
        ...

    def record(self, work: Work) -> Sequence[Work]:
        """What `work` launches and calls, to be replayed; nothing of it happens now."""
        ...

    def limit(self, n_bytes: int) -> None:
        """Refuse tensors, and torch's room for them, beyond so many bytes of the device."""
        ...

    def synchronize(self) -> None:
        """Wait until all that was launched is done. Raises RuntimeError where it failed."""
        ...


def copy(target: Tensor, source: Tensor) -> None:
    """Between device and host, without waiting."""
    target.copy_(source, non_blocking=True)


class _AtOnce:
    """An event of a device that has done everything before it is asked."""

    def record(self) -> None: ...
    def synchronize(self) -> None: ...


class HostDevice:
    """Torch on the CPU. A recording is the list of what to call."""

    name = "torch on the CPU"
    version = str(torch.__version__)
    mechanisms: Sequence[Mechanism] = ("synchronise",)

    def __init__(self) -> None:
        self.torch_device = torch.device("cpu")
        self._recording: list[Work] | None = None

    def host(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(*shape, dtype=dtype)

    def on_stream(self) -> contextlib.AbstractContextManager[object]:
        return torch.inference_mode()

    def launch(self, work: Callable[..., object], *arguments: object) -> None:
        self.call(lambda: work(*arguments))

    def call(self, work: Work) -> None:
        if self._recording is None:
            work()
        else:
            self._recording.append(work)

    def event(self) -> Event:
        return _AtOnce()

    def request(self, link: DeviceLink, slot: int, mechanism: Mechanism) -> None:
        raise AssertionError("the CPU synchronises")

    wait = request

    def record(self, work: Work) -> Sequence[Work]:
        steps: list[Work] = []
        self._recording = steps
        try:
            work()
        finally:
            self._recording = None
        return steps

    def limit(self, n_bytes: int) -> None: ...
    def synchronize(self) -> None: ...


class CudaDevice:
    """One CUDA GPU, by torch. Hand-offs use the driver directly where it can be had."""

    def __init__(self, index: int = 0, *, driver: CudaDriver | None = None) -> None:
        """Raises DeviceUnavailable."""
        if not torch.cuda.is_available():
            raise DeviceUnavailable(
                "PyTorch finds no CUDA GPU (it was built without CUDA, or there is no driver)"
            )
        self.torch_device = torch.device("cuda", index)
        try:
            self.stream = torch.cuda.Stream(self.torch_device)  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            raise DeviceUnavailable(f"the GPU cannot be used: {error}") from error
        self.name = torch.cuda.get_device_name(index)
        self._driver = driver or open_driver()
        driver_version = 0 if self._driver is None else self._driver.version
        self.version = f"{driver_version} {torch.__version__}"
        self._recording: list[Work] | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._pool = torch.cuda.graph_pool_handle()

    @property
    def mechanisms(self) -> Sequence[Mechanism]:
        if self._driver is None:
            return ("synchronise",)
        return MECHANISMS if self._driver.has_memory_operations else MECHANISMS[1:]

    def host(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(*shape, dtype=dtype).pin_memory()

    def on_stream(self) -> contextlib.AbstractContextManager[object]:
        stack = contextlib.ExitStack()
        stack.enter_context(torch.inference_mode())
        stack.enter_context(torch.cuda.stream(self.stream))
        return stack

    def launch(self, work: Callable[..., object], *arguments: object) -> None:
        work(*arguments)

    def call(self, work: Work) -> None:
        if self._recording is None:
            work()
            return
        self._end_graph()
        self._recording.append(work)
        self._begin_graph()

    def event(self) -> Event:
        return torch.cuda.Event()  # type: ignore[no-untyped-call]

    def request(self, link: DeviceLink, slot: int, mechanism: Mechanism) -> None:
        assert self._driver is not None
        by_host = mechanism == "host-functions"
        link.enqueue_request(self._driver, self.stream.cuda_stream, slot, by_host)

    def wait(self, link: DeviceLink, slot: int, mechanism: Mechanism) -> None:
        assert self._driver is not None
        by_host = mechanism == "host-functions"
        link.enqueue_wait(self._driver, self.stream.cuda_stream, slot, by_host)

    def record(self, work: Work) -> Sequence[Work]:
        self.synchronize()
        steps: list[Work] = []
        self._recording = steps
        self._begin_graph()
        try:
            work()
        finally:
            self._end_graph()
            self._recording = None
        return steps

    def limit(self, n_bytes: int) -> None:
        total = torch.cuda.get_device_properties(self.torch_device).total_memory
        fraction = min(1.0, max(n_bytes, 0) / total)
        torch.cuda.set_per_process_memory_fraction(fraction, self.torch_device)

    def synchronize(self) -> None:
        self.stream.synchronize()

    def _begin_graph(self) -> None:
        self._graph = torch.cuda.CUDAGraph()
        # Other threads may use CUDA meanwhile.
        self._graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")

    def _end_graph(self) -> None:
        assert self._graph is not None
        assert self._recording is not None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # nothing was launched between two calls: torch warns
            self._graph.capture_end()
        self._recording.append(self._graph.replay)


def open_driver() -> CudaDriver | None:
    """The CUDA driver of this machine, or None."""
    for library in ("libcuda.so.1", "nvcuda.dll"):
        with contextlib.suppress(RuntimeError):
            return CudaDriver(library)
    return None
