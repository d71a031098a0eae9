"""Runs damaged models in a process of their own, and keeps those that end as no model may.

A model may be used or refused with a HybridError of one line. It may need two seconds of processor
time, and memory for its files and 64 MB. Everything else is a finding.
"""

from __future__ import annotations

import contextlib
import json
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import IO, Any

import psutil
from fuzz.mutations import damaged
from fuzz.seeds import Seed, seeds_of

MAX_SECONDS = 2.0  # of processor time
MAX_WAIT = 60.0  # seconds, for a process that waits and does not compute
PROGRAM = Path(__file__).with_name("worker.py")
MAX_GROWTH = 64 << 20  # bytes beyond the size of the files


@dataclass(frozen=True)
class Finding:
    target: str
    number: int  # of the input
    problem: str
    place: str  # what tells findings from each other
    details: str = ""


@dataclass
class Outcome:
    """What a run came to."""

    n_inputs: int = 0
    refused: Counter[str] = field(default_factory=Counter)  # by the class of the error; "": used
    findings: list[Finding] = field(default_factory=list)
    growth: int = 0  # the most memory that an input took
    seconds: float = 0.0  # the most processor time

    def count(self, target: str, number: int, answer: dict[str, Any]) -> bool:
        """Count an input. Return whether it is a finding unlike those before."""
        self.n_inputs += 1
        self.refused[answer.get("refused", "")] += 1
        self.growth = max(self.growth, answer.get("growth", 0))
        self.seconds = max(self.seconds, answer.get("seconds", 0.0))
        if "problem" not in answer or answer["place"] in {f.place for f in self.findings}:
            return False
        details = answer.get("traceback", "")
        self.findings.append(Finding(target, number, answer["problem"], answer["place"], details))
        return True


class Worker:
    """A process that opens models. It is started again after each one that it does not survive."""

    def __init__(self, printed: IO[str], command: Sequence[str]) -> None:
        self._command = command
        self._process: subprocess.Popen[str] | None = None
        self._printed = printed  # by libraries, and the place of a hang

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _stopped_at(self, process: subprocess.Popen[str]) -> dict[str, str]:
        """End a process that does not end itself. Return where it was."""
        self._printed.truncate(0)
        process.send_signal(signal.SIGUSR1)
        time.sleep(0.5)
        self.stop()
        self._printed.seek(0)
        stack = self._printed.read().replace("\0", "")[-4000:]
        at = next((line.strip() for line in stack.splitlines() if "File" in line), "unknown")
        return {"place": f"no end: {at}", "traceback": stack}

    def run(self, folder: Path, seed: Seed, *, use_mmap: bool = True) -> dict[str, Any]:
        """Open the files in a folder. Return the worker's answer, or how it ended without one."""
        self.start(seed)
        assert self._process is not None
        request = {"path": str(folder / seed.opens), "n_ids": seed.n_ids, "use_mmap": use_mmap}
        return self._answer(self._process, request)

    def start(self, sound: Seed) -> None:
        """Start the process if need be. It opens a sound model, for which it loads libraries."""
        if self._process is not None:
            return
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._printed,
            text=True,
        )
        with written(sound.files) as folder:
            request = {"path": str(folder / sound.opens), "n_ids": sound.n_ids, "use_mmap": True}
            answer = self._answer(self._process, request, MAX_WAIT)
        assert "problem" not in answer, answer

    def _answer(
        self, process: subprocess.Popen[str], request: dict[str, Any], limit: float = MAX_SECONDS
    ) -> dict[str, Any]:
        assert process.stdin is not None
        assert process.stdout is not None
        times = psutil.Process(process.pid)
        began, used = time.monotonic(), sum(times.cpu_times()[:2])
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while not selector.select(0.25):
                spent = sum(times.cpu_times()[:2]) - used
                if spent > limit or time.monotonic() - began > MAX_WAIT:
                    problem = f"no end after {spent:.1f} s of processor time"
                    return {"problem": problem} | self._stopped_at(process)
        line = process.stdout.readline()
        if line:
            found: dict[str, Any] = json.loads(line)
            return found
        code = process.wait()
        self.stop()
        name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return {"problem": f"the process ended: {name}", "place": name}


@contextlib.contextmanager
def started_worker(program: Path = PROGRAM) -> Iterator[Worker]:
    with tempfile.TemporaryFile("w+") as printed:
        worker = Worker(printed, [sys.executable, "-P", str(program)])
        try:
            yield worker
        finally:
            worker.stop()


@contextlib.contextmanager
def written(files: dict[str, bytes]) -> Iterator[Path]:
    """Write files into a folder, which exists within the `with` statement."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        folder = Path(name)
        for file, content in files.items():
            (folder / file).write_bytes(content)
        yield folder


def inputs(target: str, first: int = 0) -> Iterator[tuple[int, Seed, bool]]:
    """Yield damaged models without end: the number, the files, and whether they are mapped."""
    seeds = seeds_of(target)
    number = first
    while True:
        draw = Random(f"{target} {number}")
        seed = draw.choice(seeds)
        files = seed.files
        for _ in range(draw.choice((1, 1, 1, 2))):
            files = damaged(files, draw)
        yield number, seed._replace(files=files), draw.random() < 0.5
        number += 1


def fuzz(
    target: str,
    seconds: float,
    *,
    n_inputs: int | None = None,
    first: int = 0,
    keep: Path | None = None,
) -> Outcome:
    """Run inputs for so long, or so many. `keep` is the folder for those that are findings."""
    outcome = Outcome()
    end = time.monotonic() + seconds
    with started_worker() as worker:
        for number, seed, use_mmap in inputs(target, first):
            if time.monotonic() > end or outcome.n_inputs == n_inputs:
                return outcome
            worker.start(seeds_of(target)[0])
            with written(seed.files) as folder:
                answer = checked(worker.run(folder, seed, use_mmap=use_mmap), seed)
                found = outcome.count(target, number, answer)
                if found and keep is not None:
                    shutil.copytree(folder, keep / f"{target}-{number}", dirs_exist_ok=True)
    raise AssertionError("inputs never end")


def checked(answer: dict[str, Any], seed: Seed) -> dict[str, Any]:
    """Return the answer, with a problem if it names too much time or memory."""
    allowed = sum(map(len, seed.files.values())) + MAX_GROWTH
    if "problem" in answer:
        return answer
    if answer["growth"] > allowed:
        problem = f"took {answer['growth'] >> 20} MB of memory, {allowed >> 20} MB are allowed"
        return answer | {"problem": problem, "place": f"memory, {answer['refused']}"}
    if answer["seconds"] > MAX_SECONDS:
        return answer | {"problem": f"took {answer['seconds']:.1f} s", "place": "time"}
    return answer
