"""Compare decode and prefill speed with llama.cpp's, at equal shapes and bits.

    CMAKE_ARGS="-DGGML_NATIVE=ON" pip install gguf --no-binary llama-cpp-python llama-cpp-python
    python tests/benchmarks/compare_llama_cpp.py --quant q4 -t 2

The result shows how fast each engine goes through the layers of a model of this shape on this
machine. hybrid reads synthetic weights of the published sparsity. llama.cpp reads random weights
and computes all of them, as it does for the real model. The text is noise in both engines, so the
result says nothing about it. It also says nothing about llama.cpp's speed in other formats. With
--transformers, prefill is compared with Hugging Face transformers too, in bf16 whatever the format.

Each engine has its own process, and only one works at a time. The runs alternate, because the speed
of a machine drifts; compare the medians and ratios. A share of the bandwidth refers to what was
measured before and after the same round, whichever is higher. If a hypervisor takes the processors
during a run of any engine, the run is repeated; some hypervisors stop a machine for 33 ms of each
100 ms. GB are 1e9 bytes. The last line is JSON.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from dense_gguf import bytes_per_token, write_dense_gguf

from hybrid import active_isa, load
from hybrid.bench import spread
from hybrid.checkpoint import open_checkpoint
from hybrid.evaluation.speed import PREFILL_LENGTHS, SHORT_CONTEXT
from hybrid.hub.catalog import resolve
from hybrid.kernels import Format
from hybrid.model.config import ModelConfig
from hybrid.placement.disturbance import StolenTime

PREFILL = max(PREFILL_LENGTHS)
MOST_STOLEN = 0.02  # largest share of its time that a hypervisor may take from a run that counts
MOST_TRIES = 8  # of one run, before a disturbed one counts


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "-m",
        "--model",
        default="synthetic:MiniCPM-S-1B",
        help="model that gives the shape and hybrid's weights (default: synthetic:MiniCPM-S-1B)",
    )
    add(
        "--quant",
        choices=("q4", "q8", "bf16"),
        default="q4",
        help="weight format of both engines (default: q4)",
    )
    add("-t", "--threads", type=int, default=2, help="threads of each engine (default: 2)")
    add("-n", "--tokens", type=int, default=64, help="tokens decoded in each run (default: 64)")
    add("--runs", type=int, default=7, help="rounds that count (default: 7)")
    add("--transformers", action="store_true", help="also compare transformers (needs torch)")
    add(
        "--predictor",
        default="exact",
        help="also measure hybrid with this predictor: auto, or a file (default: exact, none)",
    )
    add("--recall", type=float, default=0.99, help="recall of the predictor (default: 0.99)")
    add(
        "--preview-head",
        action="store_true",
        help="also preview the head in the run with the predictor (default: off)",
    )
    add("--folder", type=Path, help="folder to keep the GGUF file in (default: a temporary one)")
    return parser.parse_args()


class HybridWorker:
    """hybrid's part of the comparison; each measuring method is one task of `serve`."""

    def __init__(
        self,
        args: argparse.Namespace,
        gguf_path: Path,
        predictor: str | Path = "exact",
        preview_head: bool = False,
    ) -> None:
        self.engine = load(
            args.model,
            quant=args.quant,
            threads=args.threads,
            predictor=predictor,  # type: ignore[arg-type]
            recall=args.recall,
            preview_head=preview_head,
        )
        self.engine.wait_for_weights()
        vocab_size = self.engine.config.vocab_size
        self.ids = np.random.default_rng(0).integers(0, vocab_size, max(PREFILL, args.tokens) + 16)
        self.n = args.tokens
        self.sessions = {dense: self.engine.open_session(dense=dense) for dense in (False, True)}
        self.about = f"hybrid, {active_isa()}, {args.threads} threads, weights in huge pages"

    def decode(self, dense: bool = False) -> dict[str, float]:
        session = self.sessions[dense]
        session.reset()
        session.prefill(self.ids[:SHORT_CONTEXT])
        session.reset_counts()
        started = time.perf_counter()
        for token in self.ids[SHORT_CONTEXT : SHORT_CONTEXT + self.n].tolist():
            session.decode(token)
        seconds = time.perf_counter() - started
        config = self.engine.config
        return {
            "tps": self.n / seconds,
            "bytes": sum(session.decode_bytes.values()) / self.n,
            "active": sum(session.active_counts) / (self.n * config.n_layers * config.n_neurons),
        }

    def decode_dense(self) -> dict[str, float]:
        return self.decode(dense=True)

    def prefill(self) -> dict[str, float]:
        session = self.sessions[False]
        session.reset()
        started = time.perf_counter()
        session.prefill(self.ids[:PREFILL])
        return {"tps": PREFILL / (time.perf_counter() - started)}

    def stream(self) -> dict[str, float]:
        return {"gbs": self.engine.measure_stream_gbs()}


class PredictingWorker(HybridWorker):
    """hybrid with the predictor of --predictor."""

    def __init__(self, args: argparse.Namespace, gguf_path: Path) -> None:
        predictor = args.predictor if args.predictor == "auto" else Path(args.predictor)
        super().__init__(args, gguf_path, predictor, args.preview_head)
        prediction = self.engine.prediction
        if prediction is None:
            raise RuntimeError(f"no predictor in use: {'; '.join(self.engine.notices)}")
        self.about = f"hybrid, predictor at recall {prediction.recall:g} ({prediction.path.name})"
        self.about += ", head previewed" * self.engine.previews_head


class LlamaWorker:
    """llama.cpp, by llama-cpp-python, on the dense GGUF file."""

    def __init__(self, args: argparse.Namespace, gguf_path: Path) -> None:
        import llama_cpp

        self.api: Any = llama_cpp
        silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
        self.keep = silent  # ctypes does not keep it alive
        llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        model = llama_cpp.llama_model_default_params()
        model.use_mmap = False  # weights in memory, as in hybrid
        self.model = llama_cpp.llama_model_load_from_file(str(gguf_path).encode(), model)
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot load {gguf_path}")
        context = llama_cpp.llama_context_default_params()
        self.choose_context(context, args)
        context.n_threads = context.n_threads_batch = args.threads
        self.context = llama_cpp.llama_init_from_model(self.model, context)
        n = max(PREFILL, args.tokens) + 16
        self.ids = np.random.default_rng(0).integers(0, 1000, n).astype(np.int32)
        self.n = args.tokens
        flags = llama_cpp.llama_print_system_info().decode().strip()
        self.about = (
            f"llama-cpp-python {llama_cpp.__version__}, {args.threads} threads, no mmap, {flags}"
        )

    def choose_context(self, context: Any, args: argparse.Namespace) -> None:
        """Set the sizes of llama.cpp's context in its parameters."""
        context.n_ctx = context.n_batch = context.n_ubatch = 1024

    def evaluate(self, ids: np.ndarray) -> None:
        tokens = (self.api.llama_token * len(ids))(*ids.tolist())
        if self.api.llama_decode(self.context, self.api.llama_batch_get_one(tokens, len(ids))):
            raise RuntimeError("llama_decode failed")
        self.api.llama_synchronize(self.context)

    def reset(self) -> None:
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)

    def decode(self) -> dict[str, float]:
        self.reset()
        self.evaluate(self.ids[:SHORT_CONTEXT])
        started = time.perf_counter()
        for i in range(SHORT_CONTEXT, SHORT_CONTEXT + self.n):
            self.evaluate(self.ids[i : i + 1])
        return {"tps": self.n / (time.perf_counter() - started)}

    def prefill(self) -> dict[str, float]:
        self.reset()
        started = time.perf_counter()
        self.evaluate(self.ids[:PREFILL])
        return {"tps": PREFILL / (time.perf_counter() - started)}


class TransformersWorker:
    """Hugging Face transformers in bf16, for prefill only."""

    def __init__(self, args: argparse.Namespace, gguf_path: Path) -> None:
        import torch
        import transformers

        self.torch = torch
        torch.set_num_threads(args.threads)
        config = open_checkpoint(resolve(args.model), Format[args.quant]).config
        torch.set_default_dtype(torch.bfloat16)  # only this process; weights are created in it
        self.model = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=config.vocab_size,
                hidden_size=config.hidden_size,
                intermediate_size=config.n_neurons,
                num_hidden_layers=config.n_layers,
                num_attention_heads=config.n_heads,
                num_key_value_heads=config.n_kv_heads,
                tie_word_embeddings=config.has_tied_head,
            )
        ).eval()
        self.ids = torch.randint(0, config.vocab_size, (1, PREFILL))
        self.about = (
            f"transformers {transformers.__version__}, torch {torch.__version__}, bf16, "
            f"{args.threads} threads"
        )

    def prefill(self) -> dict[str, float]:
        started = time.perf_counter()
        with self.torch.inference_mode():
            self.model(self.ids, logits_to_keep=1)
        return {"tps": PREFILL / (time.perf_counter() - started)}


Worker = HybridWorker | PredictingWorker | LlamaWorker | TransformersWorker


def serve(
    make: Callable[[argparse.Namespace, Path], Worker],
    args: argparse.Namespace,
    path: Path,
    pipe: Connection,
) -> None:
    """Do one task at a time in this process, while the other engines' threads sleep."""
    try:
        worker = make(args, path)
        pipe.send(worker.about)
        while True:
            task, values = pipe.recv()
            pipe.send(getattr(worker, task)(*values))
    except EOFError:
        pass  # the comparison has ended
    except Exception as error:
        pipe.send(error)


class Process:
    """A worker's process, as the comparison sees it."""

    def __init__(self, make: type[Worker], args: argparse.Namespace, path: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        context.Process(target=serve, args=(make, args, path, theirs), daemon=True).start()
        self.about: str = self.receive()
        self.n_threads: int = args.threads
        self.n_repeated = self.n_disturbed = 0

    def measure(self, task: str, *values: int) -> dict[str, float]:
        """Repeat a run until no hypervisor disturbs it, and return its result.

        If all MOST_TRIES runs are disturbed, the last one counts.
        """
        for attempt in range(MOST_TRIES):
            self.n_repeated += attempt > 0
            time.sleep(0.3)  # until the other engine's spinning threads sleep
            stolen = StolenTime()
            result = self.ask(task, *values)
            if stolen.share(self.n_threads) <= MOST_STOLEN:
                return result
        self.n_disturbed += 1
        return result

    def ask(self, task: str, *values: int) -> dict[str, float]:
        self.pipe.send((task, values))
        return self.receive()

    def receive(self) -> Any:
        answer = self.pipe.recv()
        if isinstance(answer, Exception):
            raise SystemExit(f"error: {answer}")
        return answer


def compare(args: argparse.Namespace, path: Path, config: ModelConfig) -> dict[str, Any]:
    ours, theirs = Process(HybridWorker, args, path), Process(LlamaWorker, args, path)
    print(f"{ours.about}\n{theirs.about}")
    tasks = [(ours, "decode"), (theirs, "decode"), (ours, "decode_dense")]
    tasks += [(ours, "prefill"), (theirs, "prefill")]
    if args.predictor != "exact":
        predicting = Process(PredictingWorker, args, path)
        print(predicting.about)
        tasks.insert(1, (predicting, "decode"))
    if args.transformers:
        third = Process(TransformersWorker, args, path)
        print(third.about)
        tasks.append((third, "prefill"))
    print()
    results: dict[tuple[int, str], list[dict[str, float]]] = {}
    streams = []
    for run in range(-1, args.runs):
        for process, task in tasks:
            result = process.measure(task)
            if run >= 0:  # the first round does not count: its caches and pages are cold
                results.setdefault((id(process), task), []).append(result)
        streams.append(ours.ask("stream")["gbs"])
    stream = max(streams)
    processes = {process for process, _ in tasks}
    n_repeated = sum(process.n_repeated for process in processes)
    n_disturbed = sum(process.n_disturbed for process in processes)

    def rates(process: Process, task: str) -> list[float]:
        return [result["tps"] for result in results[id(process), task]]

    decode = results[id(ours), "decode"]
    n_bytes = {
        "hybrid": statistics.median(result["bytes"] for result in decode),
        "hybrid, all neurons": results[id(ours), "decode_dense"][0]["bytes"],
        "llama.cpp": bytes_per_token(config, args.quant),
    }
    print(f"memory streams {stream:.1f} GB/s ({min(streams):.1f} to {stream:.1f})")
    if n_repeated:
        print(
            f"{n_repeated} runs were repeated, first round included, because a hypervisor took "
            f"the processors; {n_disturbed} runs count although they were disturbed"
        )
    print(f"hybrid: {decode[0]['active']:.2%} of neurons active; KV cache and norms left out\n")
    print(f"{'':30}{'tok/s [min - max]':>24}{'MB/token':>10}{'GB/s':>7}{'of bandwidth':>14}")
    rows = [("hybrid", ours, "decode"), ("llama.cpp", theirs, "decode")]
    rows += [("hybrid, all neurons", ours, "decode_dense")]
    if args.predictor != "exact":
        n_bytes["hybrid, predicting"] = results[id(predicting), "decode"][0]["bytes"]
        rows.insert(1, ("hybrid, predicting", predicting, "decode"))
    for name, process, task in rows:
        gbs = n_bytes[name] * statistics.median(rates(process, task)) / 1e9
        share = share_of_stream(rates(process, task), n_bytes[name], streams)
        print(
            f"decode, {name:22}{spread(rates(process, task)):>24}{n_bytes[name] / 1e6:>10.1f}"
            f"{gbs:>7.1f}{share:>14.0%}"
        )
    for name, process in (("hybrid", ours), ("llama.cpp", theirs)):
        print(f"prefill {PREFILL}, {name:17}{spread(rates(process, 'prefill')):>24}")
    ratios = {
        "decode": ratio(rates(ours, "decode"), rates(theirs, "decode")),
        "dense_decode": ratio(rates(ours, "decode_dense"), rates(theirs, "decode")),
        "sparse_over_dense": ratio(rates(ours, "decode"), rates(ours, "decode_dense")),
        "prefill": ratio(rates(ours, "prefill"), rates(theirs, "prefill")),
    }
    if args.predictor != "exact":
        rates_of = rates(predicting, "decode")
        ratios["predicting"] = ratio(rates_of, rates(theirs, "decode"))
        ratios["predicting_over_exact"] = ratio(rates_of, rates(ours, "decode"))
    if args.transformers:
        print(f"prefill {PREFILL}, {'transformers':17}{spread(rates(third, 'prefill')):>24}")
        ratios["prefill_transformers"] = ratio(rates(ours, "prefill"), rates(third, "prefill"))
    print("\nratios, median of the alternations [min - max]")
    for name, (median, low, high) in ratios.items():
        print(f"{name.replace('_', ' '):30}{median:.2f} [{low:.2f} - {high:.2f}]")
    return {
        "model": args.model,
        "quant": args.quant,
        "threads": args.threads,
        "hybrid": ours.about,
        "llama_cpp": theirs.about,
        "stream_gbs": round(stream, 2),
        "repeated_runs": n_repeated,
        "disturbed_runs": n_disturbed,
        "decode_mbu": round(share_of_stream(rates(ours, "decode"), n_bytes["hybrid"], streams), 4),
        "bytes_per_token": {name: round(n) for name, n in n_bytes.items()},
        "decode_tps": round(statistics.median(rates(ours, "decode")), 2),
        "llama_decode_tps": round(statistics.median(rates(theirs, "decode")), 2),
        "prefill_tps": round(statistics.median(rates(ours, "prefill")), 2),
        "llama_prefill_tps": round(statistics.median(rates(theirs, "prefill")), 2),
        "ratios": {name: round(median, 3) for name, (median, _, _) in ratios.items()},
    }


def share_of_stream(rates: list[float], n_bytes: float, streams: list[float]) -> float:
    """Return the median over the rounds of the share of the bandwidth.

    The bandwidth of a round is the higher one of those measured before and after it.
    """
    return statistics.median(
        n_bytes * tps / 1e9 / max(around)
        for tps, around in zip(rates, itertools.pairwise(streams), strict=True)
    )


def ratio(ours: list[float], theirs: list[float]) -> tuple[float, float, float]:
    """Return the median, smallest and largest ratio of runs of the same round."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return statistics.median(ratios), min(ratios), max(ratios)


def dense_file(folder: Path, config: ModelConfig, quant: str) -> Path:
    """Return the GGUF file of this shape in a folder, and write it if there is none."""
    path = folder / f"dense-{quant}.gguf"
    if not path.exists():
        print(f"writing {path}", file=sys.stderr)
        write_dense_gguf(path, config, quant)
    return path


def main() -> int:
    args = parse_arguments()
    try:
        import llama_cpp  # noqa: F401
    except ImportError:
        print("error: llama-cpp-python is not installed; see --help", file=sys.stderr)
        return 1
    config = open_checkpoint(resolve(args.model), Format[args.quant]).config
    with tempfile.TemporaryDirectory() as temporary:
        path = dense_file(args.folder or Path(temporary), config, args.quant)
        print(json.dumps(compare(args, path, config)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
