"""Decoding a token allocates no memory and calls no Python function."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import hybrid

COUNTER = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stddef.h>
static long n_calls;
long count_calls(void) { return __atomic_load_n(&n_calls, __ATOMIC_SEQ_CST); }
extern void* __libc_malloc(size_t);
extern void* __libc_calloc(size_t, size_t);
extern void* __libc_realloc(void*, size_t);
extern void* __libc_memalign(size_t, size_t);
static void count(void) { __atomic_fetch_add(&n_calls, 1, __ATOMIC_SEQ_CST); }
void* malloc(size_t n) { count(); return __libc_malloc(n); }
void* calloc(size_t n, size_t size) { count(); return __libc_calloc(n, size); }
void* realloc(void* p, size_t n) { count(); return __libc_realloc(p, n); }
void* aligned_alloc(size_t a, size_t n) { count(); return __libc_memalign(a, n); }
"""

# Both calls have the same shape, so that the bindings allocate equally for both. One decodes; the
# other only checks its argument. Medians count, because Python itself allocates now and then.
PROGRAM = """
import ctypes, statistics
import numpy as np
import hybrid

count = ctypes.CDLL(None).count_calls
count.restype = ctypes.c_long
with hybrid.load("stories", threads=3) as engine:
    session = engine.open_session()
    session.prefill(np.arange(300))
    native = session._native
    counts = {}
    for name, call in (("truncate", lambda: native.truncate(300)),
                       ("decode", lambda: native.decode(7))):
        counts[name] = []
        for _ in range(50):
            before = count()
            call()
            counts[name].append(count() - before)
before = count()
kept = [ctypes.create_string_buffer(5000) for _ in range(10)]
assert count() - before >= 10, "the counter does not count"
print(statistics.median(counts["decode"]) - statistics.median(counts["truncate"]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts calls of glibc's malloc")
def test_decoding_allocates_nothing(tmp_path):
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None or os.environ.get("LD_PRELOAD"):
        pytest.skip("needs a C compiler, and no other LD_PRELOAD")
    source, library = tmp_path / "count.c", tmp_path / "count.so"
    source.write_text(COUNTER)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], check=True)
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True,
        text=True,
        env=os.environ | {"LD_PRELOAD": str(library)},
        cwd=Path(hybrid.__file__).parents[1],
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) == 0


def test_decoding_calls_no_python():
    with hybrid.load("stories", threads=2) as engine:
        session = engine.open_session()
        session.prefill(np.arange(5))
        native = session._native
        assert native is not None
        events: list[str] = []
        sys.setprofile(lambda frame, event, argument: events.append(event))
        try:
            native.decode(7)
        finally:
            sys.setprofile(None)
        # One call into C, and the call of setprofile itself.
        assert events == ["c_call", "c_return", "c_call"]
