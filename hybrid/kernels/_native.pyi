from collections.abc import Callable, Sequence
from enum import Enum
from typing import overload

import numpy as np
from numpy.typing import NDArray

BLOCK: int
GROUP: int
ROW_TILE: int
SPAN: int
KEY_TILE: int
PREFILL_CHUNK: int
FLAG_BYTES: int
PREDICT_TILE: int

class Format(Enum):
    bf16 = 0
    q8 = 1
    q4 = 2
    f16 = 3

class Activation(Enum):
    relu = 0
    fatrelu = 1
    silu = 2

class KvFormat(Enum):
    fp16 = 0
    bf16 = 1

def available_isas() -> list[str]: ...
def active_isa() -> str: ...
def set_isa(name: str) -> None: ...
def set_best_isa(cap: str) -> None: ...
def allocate_bytes(n_bytes: int) -> NDArray[np.uint8]: ...
def lock_bytes(memory: NDArray[np.uint8]) -> None: ...
def map_file(file: int, n_bytes: int) -> NDArray[np.uint8]: ...
def move_into_memory(mapped: NDArray[np.uint8], first: int, n_bytes: int, file: int) -> None: ...
def crc32(data: NDArray[np.uint8], crc: int = 0, portable: bool = False) -> int: ...
def padded_cols(format: Format, n_cols: int) -> int: ...
def group_places(format: Format, n_cols: int) -> list[int]: ...
def head_stride(head_dim: int) -> int: ...
def pack_rows(
    format: Format,
    w: NDArray[np.float32],
    values: NDArray[np.uint8],
    scales: NDArray[np.uint8] | None,
) -> None: ...
def pack_interleaved(format: Format, w: NDArray[np.float32], tiles: NDArray[np.uint8]) -> None: ...
def quantize(format: Format, x: NDArray[np.float32]) -> NDArray[np.uint8]: ...
def dequantize(rows: Rows, row: int, scale: float = 1.0) -> NDArray[np.float32]: ...
def gemm(rows: Rows, x: NDArray[np.uint8], first: int, last: int) -> NDArray[np.float32]: ...
def sparse_ffn(
    gate: Rows,
    up: Rows,
    down: Rows,
    x: NDArray[np.uint8],
    first: int,
    last: int,
    activation: Activation,
    threshold: float,
    computes_all: bool = False,
    predictor: Predictor | None = None,
) -> tuple[NDArray[np.float32], int, int]: ...
def preview_logits(
    preview: Preview, x: NDArray[np.float32]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]: ...
def gather_dots(
    rows: Rows, indices: Sequence[int], x: NDArray[np.uint8]
) -> NDArray[np.float32]: ...
def add_partials(
    format: Format, partials: NDArray[np.float32], scale: float, x: NDArray[np.float32]
) -> NDArray[np.float32]: ...
def rms_norm(
    x: NDArray[np.float32], weight: NDArray[np.float32], eps: float, scale: float
) -> NDArray[np.float32]: ...
def attend_span(
    q: NDArray[np.float32],
    k: NDArray[np.uint16],
    v: NDArray[np.uint16],
    kv: KvFormat = ...,
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]: ...
def to_kv(kv: KvFormat, x: NDArray[np.float32]) -> tuple[NDArray[np.uint16], float]: ...
def to_fp16(x: NDArray[np.float32]) -> NDArray[np.uint16]: ...

class Rows:
    def __init__(
        self,
        *,
        format: Format,
        memory: NDArray[np.uint8],
        n_rows: int,
        n_cols: int,
        offset: int = 0,
        row_stride: int | None = None,
        scales_offset: int = 0,
        is_bit_reversed: bool = False,
    ) -> None: ...
    @property
    def n_rows(self) -> int: ...
    @property
    def n_cols(self) -> int: ...
    def scaled(self, matrix_scale: float) -> Rows: ...
    @property
    def matrix_scale(self) -> float: ...
    @property
    def memory(self) -> NDArray[np.uint8]: ...

class PredictorInput(Enum):
    normed = 0
    residual = 1
    previous = 2

class Predictor:
    @overload
    def __init__(
        self,
        *,
        format: Format,
        n_neurons: int,
        tiles: NDArray[np.uint8],
        first_matrix: Rows,
    ) -> None: ...
    @overload
    def __init__(
        self,
        *,
        first_matrix: Rows,
        second_matrix: Rows,
        threshold: float,
        input: PredictorInput,
        first_biases: NDArray[np.float32] | None = None,
        second_biases: NDArray[np.float32] | None = None,
    ) -> None: ...

class Preview:
    def __init__(self, *, n_rows: int, n_cols: int, tiles: NDArray[np.uint8]) -> None: ...
    @property
    def n_bytes(self) -> int: ...

class ThreadPool:
    def __init__(self, n_threads: int) -> None: ...
    @property
    def n_threads(self) -> int: ...
    def read(self, memory: NDArray[np.float32]) -> float: ...

class Program:
    def __init__(
        self,
        *,
        format: Format,
        hidden_size: int,
        n_heads: int,
        n_kv_heads: int,
        head_dim: int,
        rms_norm_eps: float,
        rope_cos: NDArray[np.float32],
        rope_sin: NDArray[np.float32],
        n_filled: int | None = None,
        fill_rope: Callable[[int], int] | None = None,
    ) -> None: ...
    def embed(self, embedding: Rows, scale: float) -> None: ...
    def qkv(
        self,
        norm: NDArray[np.float32],
        qkv: Rows,
        layer: int,
        matrix_scales: Sequence[float] = (1.0, 1.0, 1.0),
    ) -> None: ...
    def attend(self, o: Rows, scale: float, layer: int) -> None: ...
    def ffn(
        self,
        norm: NDArray[np.float32] | None,
        gate: Rows,
        up: Rows,
        down: Rows,
        activation: Activation,
        threshold: float,
        scale: float,
        layer: int,
        predictor: Predictor | None = None,
        first_neuron: int = 0,
        n_given: int = 0,
    ) -> None: ...
    def end_segment(self, *, sends_x: bool) -> None: ...
    def receive_x(self) -> None: ...
    def seal(self) -> None: ...
    @property
    def n_segments(self) -> int: ...
    def head(
        self, norm: NDArray[np.float32], head: Rows, scale: float, preview: Preview | None = None
    ) -> None: ...
    @property
    def max_context(self) -> int: ...

class Session:
    def __init__(
        self,
        program: Program,
        pool: ThreadPool,
        n_context: int,
        is_dense: bool = False,
        is_timed: bool = False,
        kv: KvFormat = ...,
    ) -> None: ...
    def prefill(
        self,
        tokens: NDArray[np.int64],
        all_logits: bool = False,
        masks: NDArray[np.uint8] | None = None,
        inputs: NDArray[np.uint16] | None = None,
    ) -> NDArray[np.float32] | None: ...
    def decode(self, token: int) -> None: ...
    def begin(
        self,
        tokens: NDArray[np.int64],
        *,
        is_decode: bool,
        logits: NDArray[np.float32] | None = None,
    ) -> None: ...
    def run_segment(self, segment: int) -> None: ...
    def end(self) -> None: ...
    def truncate(self, position: int) -> None: ...
    def copy_prefix(self, source: Session, n: int) -> None: ...
    def read_kv(self, first: int, last: int) -> NDArray[np.uint16]: ...
    def append_kv(self, array: NDArray[np.uint16]) -> None: ...
    @property
    def logits(self) -> NDArray[np.float32]: ...
    @property
    def position(self) -> int: ...
    @property
    def n_context(self) -> int: ...
    @property
    def kv(self) -> KvFormat: ...
    @property
    def largest_kv(self) -> float: ...
    @property
    def active_counts(self) -> list[int]: ...
    @property
    def predicted_counts(self) -> list[int]: ...
    @property
    def shortlisted_count(self) -> int: ...
    @property
    def decode_bytes(self) -> dict[str, int]: ...
    @property
    def stage_seconds(self) -> dict[str, float]: ...
    def reset_counts(self) -> None: ...

class Batch:
    def __init__(
        self, program: Program, pool: ThreadPool, n_context: int, is_timed: bool = False
    ) -> None: ...
    def run(
        self,
        sessions: Sequence[Session],
        tokens: Sequence[Sequence[int] | NDArray[np.int64]],
        wants_logits: Sequence[bool],
    ) -> None: ...
    @property
    def active_counts(self) -> list[int]: ...
    @property
    def predicted_counts(self) -> list[int]: ...
    @property
    def shortlisted_count(self) -> int: ...
    @property
    def decode_bytes(self) -> dict[str, int]: ...
    @property
    def stage_seconds(self) -> dict[str, float]: ...
    def reset_counts(self) -> None: ...

class CudaDriver:
    def __init__(self, library: str = "libcuda.so.1") -> None: ...
    @property
    def version(self) -> int: ...
    @property
    def has_memory_operations(self) -> bool: ...

class DeviceLink:
    def __init__(
        self,
        *,
        flags: NDArray[np.uint8],
        n_slots: int,
        x: NDArray[np.float32],
        h: NDArray[np.float32],
        gates: NDArray[np.float32],
        y: NDArray[np.float32],
        patience_s: float = 2.0,
    ) -> None: ...
    @property
    def n_slots(self) -> int: ...
    @property
    def error(self) -> int: ...
    def arm(self) -> None: ...
    def abandon(self) -> None: ...
    def request(self, slot: int) -> None: ...
    def await_answer(self, slot: int) -> None: ...
    def enqueue_request(
        self, driver: CudaDriver, stream: int, slot: int, by_host: bool
    ) -> None: ...
    def enqueue_wait(self, driver: CudaDriver, stream: int, slot: int, by_host: bool) -> None: ...
    def serve(self, session: Session, token: int) -> bool: ...

def meet(session: Session, link: DeviceLink) -> None: ...

class Sampler:
    def __init__(self) -> None: ...
    def draw(
        self,
        logits: NDArray[np.float32],
        top: float,
        temperature: float,
        top_p: float,
        min_p: float,
        uniform: float,
    ) -> int: ...

def log_sum_exp(logits: NDArray[np.float32], top: float) -> float: ...
