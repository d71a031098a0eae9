"""Measures the speed of an engine: prefill, decode, and the stages of a token."""

from __future__ import annotations

import itertools
import statistics
import time
from dataclasses import dataclass

import numpy as np
import psutil

from hybrid.engine.engine import Engine
from hybrid.engine.session import Session
from hybrid.errors import InvalidOption
from hybrid.placement.disturbance import StolenTime
from hybrid.text.sampling import Sampler

PREFILL_LENGTHS = (128, 512)
SHORT_CONTEXT = 16


@dataclass(frozen=True, slots=True)
class SpeedOptions:
    """What to measure."""

    n_tokens: int = 128  # decoded in each run
    n_runs: int = 5
    long_context: int = 1024  # tokens in the context of the long decode
    seed: int = 0  # of the random token ids
    with_stages: bool = False


@dataclass(frozen=True, slots=True)
class DecodeResult:
    """Repeated decoding of the same tokens from the same position."""

    context: int  # tokens before the first decoded one
    tps: list[float]  # tokens per second of each run
    bytes_per_token: float
    active_fraction: float
    predicted_fraction: float  # share of the gates that is computed
    shortlisted: float  # rows of a previewed head that are computed in full, per token

    @property
    def median_tps(self) -> float:
        return statistics.median(self.tps)

    @property
    def gbs(self) -> float:
        return self.bytes_per_token * self.median_tps / 1e9

    def share_of(self, streams: list[float]) -> float:
        """Return the median share of the bandwidth over all runs.

        A run is compared with the better of the two measurements before and after it. The bandwidth
        of a machine may change while the program runs.
        """
        around = [max(pair) for pair in itertools.pairwise(streams)]
        return statistics.median(
            self.bytes_per_token * tps / 1e9 / level
            for tps, level in zip(self.tps, around, strict=True)
        )


@dataclass(frozen=True, slots=True)
class StageTimes:
    """Where the time of one token goes, from the last run. The stages add up to the whole."""

    context: int
    median_tps: float  # while stages are timed
    ms: dict[str, float]  # a token's time in a stage: all threads' time over their number
    n_bytes: dict[str, float]  # that a token reads in a stage


@dataclass(frozen=True, slots=True)
class Measurements:
    """Everything that one bench measured."""

    prefill_tps: dict[int, list[float]]  # tokens → tokens per second of each run
    short: DecodeResult
    long: DecodeResult
    dense: DecodeResult
    stages: dict[str, StageTimes]  # name in the JSON → times; empty without --stages
    streams: list[float]  # GB/s of the memory, before, between and after the runs
    stolen_fraction: float  # of the threads' time, by a hypervisor
    rss_bytes: int

    @property
    def stream(self) -> float:
        return max(self.streams)


def measure_speed(engine: Engine, options: SpeedOptions) -> Measurements:
    """Measure prefill and decode. All runs decode the same random ids.

    Call `Engine.wait_for_weights` before. The bandwidth is measured with the same threads before,
    between and after the runs. Raises InvalidOption if the context has no room for the tokens.
    """
    n_context, n = engine.n_context, options.n_tokens
    if n > n_context - SHORT_CONTEXT:
        raise InvalidOption(
            f"--tokens {n}: expected at most {n_context - SHORT_CONTEXT}, which is the context "
            f"size minus {SHORT_CONTEXT}"
        )
    ids = np.random.default_rng(options.seed).integers(0, engine.config.vocab_size, n_context)
    stolen, streams = StolenTime(), [engine.measure_stream_gbs()]
    prefill_tps = {
        length: measure_prefill(engine, ids[:length], min(options.n_runs, 3))
        for length in PREFILL_LENGTHS
        if length <= n_context
    }
    long_context = min(options.long_context, n_context - n)
    runs = ((SHORT_CONTEXT, False), (long_context, False), (SHORT_CONTEXT, True))

    def bench_of(context: int, *, dense: bool = False, timed: bool = False) -> DecodeBench:
        decoded = ids[context : context + n]
        return DecodeBench(engine, ids[:context], decoded, dense=dense, timed=timed)

    staged: dict[str, DecodeBench] = {}
    if engine.uses_gpu:  # one session at a time: the budget may not have room for two
        results = []
        for context, is_dense in runs:
            decode = bench_of(context, dense=is_dense)
            for _ in range(options.n_runs):
                decode.run()
                streams.append(engine.measure_stream_gbs())
            results.append(decode.result())
    else:
        benches = [bench_of(context, dense=is_dense) for context, is_dense in runs]
        if options.with_stages:
            staged["stages"] = bench_of(SHORT_CONTEXT, timed=True)
            staged["long_stages"] = bench_of(long_context, timed=True)
        for _ in range(options.n_runs):  # alternate, because the machine's speed drifts
            for decode in (*benches, *staged.values()):
                decode.run()
            streams.append(engine.measure_stream_gbs())
        results = [decode.result() for decode in benches]
    short, long, dense = results
    return Measurements(
        prefill_tps,
        short,
        long,
        dense,
        {name: stage_times(engine, decode) for name, decode in staged.items()},
        streams,
        stolen.share(engine.n_threads),
        psutil.Process().memory_info().rss,
    )


def stage_times(engine: Engine, staged: DecodeBench) -> StageTimes:
    """Return the times of the last run, and close its session."""
    session, n = staged.session, staged.ids.size
    ms = {name: s * 1e3 / engine.n_threads / n for name, s in session.stage_seconds.items()}
    ms["sampling"] = sampling_ms(engine, session)
    if engine.prediction is None:
        del ms["predict"]
    n_bytes = {name: session.decode_bytes.get(name, 0) / n for name in ms}
    session.close()
    return StageTimes(staged.context, statistics.median(staged.tps), ms, n_bytes)


def measure_prefill(engine: Engine, ids: np.ndarray, n_runs: int) -> list[float]:
    """Return the tokens per second of each run."""
    rates = []
    with engine.open_session() as session:
        for _ in range(n_runs):
            session.reset()
            started = time.perf_counter()
            session.prefill(ids)
            rates.append(ids.size / (time.perf_counter() - started))
    return rates


class DecodeBench:
    """Decodes the same tokens in every run, each time from the end of the same context."""

    def __init__(
        self,
        engine: Engine,
        context: np.ndarray,
        ids: np.ndarray,
        *,
        dense: bool = False,
        timed: bool = False,
    ) -> None:
        self.engine, self.ids, self.context = engine, ids, context.size
        self.session: Session = engine.open_session(dense=dense, timed=timed)
        self.session.prefill(context)
        self.tps: list[float] = []
        self.n_bytes = self.n_active = self.n_gates = self.n_shortlisted = 0
        self.dense = dense
        for token in ids[:8].tolist():  # warm-up: the first tokens meet cold caches and pages
            self.session.decode(token)

    def run(self) -> None:
        session = self.session
        session.truncate(self.context)
        session.reset_counts()
        tokens = self.ids.tolist()
        started = time.perf_counter()
        for token in tokens:
            session.decode(token)
        self.tps.append(len(tokens) / (time.perf_counter() - started))
        self.n_bytes = sum(session.decode_bytes.values())
        self.n_active = sum(session.active_counts)
        self.n_gates = sum(session.predicted_counts)
        self.n_shortlisted = session.shortlisted_count

    def result(self) -> DecodeResult:
        n, config = self.ids.size, self.engine.config
        n_neurons = n * config.n_layers * config.n_neurons
        expected = self.engine.expected_decode_bytes(
            n_tokens=n,
            first_position=self.context,
            n_active=n_neurons if self.dense else self.n_active,
            n_gates=None if self.dense else self.n_gates,
            n_shortlisted=self.n_shortlisted,
        )
        if not self.engine.uses_gpu:  # bytes that a GPU reads are not counted
            assert self.n_bytes == expected, f"{self.n_bytes} bytes counted, {expected} expected"
        self.session.close()
        return DecodeResult(
            self.context,
            self.tps,
            self.n_bytes / n,
            self.n_active / n_neurons,
            self.n_gates / n_neurons,
            self.n_shortlisted / n,
        )


def sampling_ms(engine: Engine, session: Session, n_runs: int = 50) -> float:
    """Return the median milliseconds to sample one token with the model's sampling parameters."""
    sampler = Sampler(engine.default_sampling)
    times = []
    for _ in range(n_runs):
        started = time.perf_counter()
        sampler.sample(session.logits)
        times.append(time.perf_counter() - started)
    return statistics.median(times) * 1e3
