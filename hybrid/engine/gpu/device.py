"""Devices that torch knows: their memory, a stream of work, and recordings that can be replayed.

`CudaDevice` is a GPU: work is asynchronous, and a recording is a CUDA graph. `HostDevice` runs the
same work immediately with torch on the CPU. It is the oracle of the GPU path, and lets that path
run on machines without a GPU.
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

# How a stream and the CPU wait for each other: with memory operations of the stream, with host
# functions on the stream, or with calls that synchronise. Those cut the recording into several.
Mechanism = Literal["memory-operations", "host-functions", "synchronise"]
MECHANISMS: tuple[Mechanism, ...] = get_args(Mechanism)
Work = Callable[[], object]


class Event(Protocol):
    """A point in a stream."""

    def record(self) -> None: ...
    def synchronize(self) -> None: ...


class Device(Protocol):
    """What the executor needs of a device. Work runs in the order of the `launch` calls."""

    name: str
    version: str  # of the driver and torch; another version makes measurements stale
    torch_device: torch.device

    @property
    def mechanisms(self) -> Sequence[Mechanism]:
        """The mechanisms that work here, the one that is usually fastest first."""
        ...

    def host(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Allocate zeros in host memory that the device can copy from and to."""
        ...

    def on_stream(self) -> contextlib.AbstractContextManager[object]:
        """Return a context in which `launch`, `record` and recordings may be called."""
        ...

    def launch(self, work: Callable[..., object], *arguments: object) -> None:
        """Enqueue the kernels and copies of `work(*arguments)`, or add them to a recording."""
        ...

    def call(self, work: Work) -> None:
        """Call `work` on this thread, between the launches before and after this call."""
        ...

    def event(self) -> Event: ...
    def request(self, link: DeviceLink, slot: int, mechanism: Mechanism) -> None:
        """Enqueue the slot's request."""
        ...

    def wait(self, link: DeviceLink, slot: int, mechanism: Mechanism) -> None:
        """Enqueue the wait for the slot's answer."""
        ...

    def record(self, work: Work) -> Sequence[Work]:
        """Record what `work` launches and calls, for replays. Nothing of it runs now."""
        ...

    def limit(self, n_bytes: int) -> None:
        """Limit the bytes that torch reserves on the device, tensors and spare room together."""
        ...

    def synchronize(self) -> None:
        """Wait until all launched work is done. Raises RuntimeError if it failed."""
        ...


def copy(target: Tensor, source: Tensor) -> None:
    """Copy between device and host, without waiting."""
    target.copy_(source, non_blocking=True)


class _AtOnce:
    """An event of a device that runs all work immediately, so there is nothing to wait for."""

    def record(self) -> None: ...
    def synchronize(self) -> None: ...


class HostDevice:
    """Torch on the CPU. A recording is a list of calls."""

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
    """One CUDA GPU, used through torch. Hand-offs use the driver directly if it can be loaded."""

    def __init__(self, index: int = 0, *, driver: CudaDriver | None = None) -> None:
        """Raises DeviceUnavailable."""
        if not torch.cuda.is_available():
            raise DeviceUnavailable(
                "PyTorch finds no CUDA GPU (it was built without CUDA, or the driver is missing)"
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
        # "thread_local" lets other threads use CUDA during the capture.
        self._graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")

    def _end_graph(self) -> None:
        assert self._graph is not None
        assert self._recording is not None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about an empty graph between two calls
            self._graph.capture_end()
        self._recording.append(self._graph.replay)


def open_driver() -> CudaDriver | None:
    """Load the CUDA driver of this machine. Return None if there is none."""
    for library in ("libcuda.so.1", "nvcuda.dll"):
        with contextlib.suppress(RuntimeError):
            return CudaDriver(library)
    return None
