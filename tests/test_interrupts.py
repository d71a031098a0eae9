"""Ctrl-C ends a command without a traceback at any moment. Host applications keep their signals."""

from __future__ import annotations

import importlib.machinery
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from isa_note import without_isa_note
from tiny_models import write_model

from hybrid import lm_eval, run
from predictors import interrupts

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")

# Each is imported after the handler has been set. The first are early, the last is late.
MARKS = ["hybrid.errors", "numpy", "tokenizers", "hybrid.hub.loading", "hybrid.cli.progress_bar"]


def start(arguments: list[str | Path], mark: str) -> subprocess.Popen[bytes]:
    """Start Python and return when it has imported the module `mark`."""
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        # A shell's background job ignores SIGINT, and its children would do so too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    watchdog = threading.Timer(60, process.kill)
    watchdog.daemon = True
    watchdog.start()
    assert process.stderr is not None
    for line in process.stderr:
        if line.split(b"|")[-1].strip() == mark.encode():
            return process
    process.communicate()
    raise AssertionError(f"{mark} was not imported; exit code {process.returncode}")


def check_end(process: subprocess.Popen[bytes], codes: tuple[int, ...] = (130,)) -> None:
    """Interrupt the process. It must end with one of `codes` and print nothing but its imports."""
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    lines = [line for line in err.decode().splitlines() if not line.startswith("import time:")]
    assert "Traceback" not in err.decode()
    assert all(line.startswith(("note: ", "[prompt ")) for line in lines), lines
    assert process.returncode in codes


def module(name: str) -> list[str | Path]:
    return ["-m", name]


def script() -> list[str | Path]:
    """Return the file that the shell runs for the command `hybrid`."""
    found = Path(sys.executable).with_name("hybrid")
    if not found.is_file():
        pytest.skip("the command hybrid is not installed beside this Python")
    return [found]


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> list[str | Path]:
    """Return the options of a run that writes random text for minutes."""
    folder = tmp_path_factory.mktemp("endless")
    write_model(folder, vocab_size=4096, max_position_embeddings=200_000)
    config = folder / "config.json"  # no token may end the text
    config.write_text(config.read_text().replace('"eos_token_id": 2', '"eos_token_id": null'))
    options = ["-p", "a", "--temp", "3", "-n", "190000", "-c", "200000"]
    return ["-m", folder, *options]


@pytest.mark.parametrize(
    "mark", [MARKS[0], *(pytest.param(m, marks=pytest.mark.slow) for m in MARKS[1:])]
)
def test_an_interrupt_during_imports_prints_nothing(endless, mark):
    check_end(start([*module("hybrid.run"), *endless], mark))


@pytest.mark.parametrize(
    "mark", ["numpy", *(pytest.param(m, marks=pytest.mark.slow) for m in MARKS[2:])]
)
def test_an_interrupt_of_the_script_during_imports_prints_nothing(endless, mark):
    check_end(start([*script(), "run", *endless], mark))


@pytest.mark.slow
@pytest.mark.parametrize("mark", ["errors", "numpy"])
@pytest.mark.parametrize(
    "name",
    [
        *("hybrid.bench", "hybrid.eval", "hybrid.plan", "hybrid.selfcheck", "hybrid.setup"),
        *("hybrid.lm_eval", "profiler.record", "profiler.report", "profiler.sparsity"),
        *("predictors.train", "predictors.evaluate"),
    ],
)
def test_an_interrupt_of_any_command_prints_nothing(name, mark):
    if mark == "errors":
        mark = f"{'predictors' if name.startswith('predictors') else 'hybrid'}.errors"
    check_end(start([*module(name), "--help"], mark), (130, 0))  # 0: it ended before


@pytest.mark.parametrize("name", ["predictors.train", "predictors.evaluate"])
def test_an_interrupt_of_a_leaf_command_prints_nothing(name):
    check_end(start([*module(name), "--help"], "predictors.errors"))


def test_the_harness_runs_with_interrupts_that_raise(monkeypatch):
    """Its arguments are those that were given, and the process keeps its own."""
    seen = []

    def cli_evaluate() -> None:
        seen.append(list(sys.argv))
        signal.raise_signal(signal.SIGINT)

    harness = ModuleType("lm_eval.__main__")
    harness.cli_evaluate = cli_evaluate  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lm_eval", ModuleType("lm_eval"))
    monkeypatch.setitem(sys.modules, "lm_eval.__main__", harness)
    monkeypatch.setitem(sys.modules, "hybrid.evaluation.harness", ModuleType("harness"))
    arguments = list(sys.argv)
    before = signal.signal(signal.SIGINT, interrupts._end)
    try:
        assert lm_eval.main(["--tasks", "piqa"]) == 130
        assert signal.getsignal(signal.SIGINT) is interrupts._end
    finally:
        signal.signal(signal.SIGINT, before)
    assert seen == [["hybrid.lm_eval", "--tasks", "piqa"]]
    assert sys.argv == arguments


@pytest.mark.slow
@pytest.mark.parametrize("delay_s", [0.0, 0.02, 0.05, 0.1, 0.2, 0.3, 0.45, 0.7, 1.0])
def test_an_interrupt_at_any_time_prints_no_traceback(endless, delay_s):
    """The model is loaded in some of the delays, and text is written in others."""
    process = start([*module("hybrid.run"), *endless], MARKS[0])
    time.sleep(delay_s)
    check_end(process)


def test_ignored_interrupts_stay_ignored():
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "from predictors import interrupts; interrupts.end_on_interrupt()\n"
        "with interrupts.raising_interrupts(): signal.raise_signal(signal.SIGINT)\n"
        "print(signal.getsignal(signal.SIGINT) is signal.SIG_IGN)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert result.stdout.strip() == b"True"


def test_interrupts_raise_only_while_a_command_runs(monkeypatch):
    monkeypatch.setattr(
        interrupts.os, "_exit", lambda code: (_ for _ in ()).throw(SystemExit(code))
    )
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        interrupts.end_on_interrupt()
        with pytest.raises(SystemExit) as ended:
            signal.raise_signal(signal.SIGINT)
        assert ended.value.code == 130
        with pytest.raises(KeyboardInterrupt), interrupts.raising_interrupts():
            signal.raise_signal(signal.SIGINT)
        with pytest.raises(SystemExit):
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("spec", "argv", "orig_argv", "expected"),
    [
        ("hybrid.run", ["/x/run.py"], ["python", "-m", "hybrid.run"], True),
        ("hybrid.__main__", ["/x/__main__.py"], ["python", "-m", "hybrid"], True),
        (None, ["-m"], ["python", "-m", "profiler.record"], True),
        (None, ["-m"], ["python", "-m", "predictors.train"], True),
        (None, ["-m", "-m"], ["python", "-m", "hosts.app", "-m", "hybrid.run"], False),
        (None, ["app.py", "-m", "hybrid.run"], ["python", "app.py", "-m", "hybrid.run"], False),
        ("hybridise", ["/x/hybridise.py"], ["python", "-m", "hybridise"], False),
        ("pytest.__main__", ["/x/pytest"], ["python", "-m", "pytest", "hybrid"], False),
        (None, [""], ["python"], False),
        (None, [], [], False),
    ],
)
def test_only_our_own_commands_are_recognised(monkeypatch, spec, argv, orig_argv, expected):
    main = SimpleNamespace(__spec__=spec and importlib.machinery.ModuleSpec(spec, None))
    monkeypatch.setitem(sys.modules, "__main__", main)
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(sys, "orig_argv", orig_argv)
    assert interrupts.is_our_command() is expected


# Threads and host applications


@pytest.mark.parametrize("options", [[], ["-i"]])
def test_the_command_runs_on_any_thread(capsys, monkeypatch, options):
    monkeypatch.setattr("builtins.input", lambda prompt: (_ for _ in ()).throw(EOFError))
    codes: list[int] = []
    arguments = ["-p", "Once upon", "-n", "3", "--seed", "1", *options]
    thread = threading.Thread(target=lambda: codes.append(run.main(arguments)))
    thread.start()
    thread.join()
    captured = capsys.readouterr()
    assert codes == [0], captured.err
    assert captured.out.startswith("Once upon")
    assert "Traceback" not in without_isa_note(captured.err)


HOST = """
import decimal, faulthandler, gc, locale, logging, os, random, resource, signal, socket, sys
import threading, warnings
import numpy as np

locale.setlocale(locale.LC_ALL, "C")
sys.stdout.reconfigure(encoding="latin-1", errors="backslashreplace", line_buffering=True)
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda number, frame: None)
signal.signal(signal.SIGPIPE, signal.SIG_DFL)


def stream(file):
    return id(file), file.encoding, file.errors, file.line_buffering, file.write_through


def state():
    return {
        "signals": {n: repr(signal.getsignal(n)) for n in signal.valid_signals()},
        "blocked signals": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
        "timers": [signal.getitimer(t) for t in (signal.ITIMER_REAL, signal.ITIMER_PROF)],
        "locale": locale.setlocale(locale.LC_ALL),
        "streams": [stream(f) for f in (sys.stdin, sys.stdout, sys.stderr)],
        "original streams": [id(f) for f in (sys.__stdin__, sys.__stdout__, sys.__stderr__)],
        "folder": os.getcwd(),
        "environment": dict(os.environ),
        "umask": (mask := os.umask(0o22), os.umask(mask))[0],
        "limits": [resource.getrlimit(n) for n in range(16)],
        "priority": os.getpriority(os.PRIO_PROCESS, 0),
        "processors": os.sched_getaffinity(0),
        "hooks": [sys.excepthook, sys.unraisablehook, sys.displayhook, threading.excepthook],
        "arguments and paths": (list(sys.argv), list(sys.path), len(sys.meta_path)),
        "recursion, switches": (sys.getrecursionlimit(), sys.getswitchinterval()),
        "collector": (gc.isenabled(), gc.get_threshold(), gc.get_debug()),
        "tracing": (sys.gettrace(), sys.getprofile(), threading.gettrace()),
        "faults": faulthandler.is_enabled(),
        "logging": (logging.root.level, list(logging.root.handlers), logging.raiseExceptions),
        "warnings": (list(warnings.filters), warnings.showwarning),
        "random": random.getstate(),
        "numpy": (repr(np.random.get_state()), np.geterr(), str(np.get_printoptions())),
        "decimal": repr(decimal.getcontext()),
        "sockets": socket.getdefaulttimeout(),
        "floats": (np.float32(1e-40) * np.float32(0.5) > 0, 0.1 + 0.2),
    }


def use():
    with hybrid.load("stories", threads=2) as engine:
        list(engine.generate("Once upon a time", max_tokens=4, seed=1))


before = state()
import hybrid

use()  # on this thread, and then on others
threads = [threading.Thread(target=use) for _ in range(3)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
after = state()
changes = [f"{n}: {before[n]} became {after[n]}" for n in before if before[n] != after[n]]
print("\\n".join(changes) or "unchanged")
"""


def test_loading_changes_no_state_of_a_host_application(tmp_path):
    path = tmp_path / "host.py"
    path.write_text(HOST, encoding="utf-8")
    result = subprocess.run(
        [sys.executable, path],
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    assert result.stderr == ""
    assert result.stdout == "unchanged\n"


def test_the_first_use_may_be_on_any_thread():
    """Names of `hybrid` are imported when they are first used, here on several threads at once."""
    code = (
        "import threading, hybrid\n"
        "def use():\n"
        "    with hybrid.load() as engine: texts.append(''.join(engine.generate('A', seed=1)))\n"
        "texts = []\n"
        "threads = [threading.Thread(target=use) for _ in range(4)]\n"
        "for thread in threads: thread.start()\n"
        "for thread in threads: thread.join()\n"
        "print(len(texts), len(set(texts)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert (result.stdout, result.stderr) == ("4 1\n", "")
