"""The public API: names are documented, options are keyword-only, and importing it is cheap."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import hybrid
from hybrid import errors


def test_all_names_exist_and_are_sorted_and_documented():
    assert hybrid.__all__ == sorted(hybrid.__all__)
    for name in hybrid.__all__:
        assert inspect.getdoc(getattr(hybrid, name)), name


def test_all_other_public_names_are_modules():
    public = {name for name in vars(hybrid) if not name.startswith("_")}
    others = public - set(hybrid.__all__)
    assert all(inspect.ismodule(getattr(hybrid, name)) for name in others), others


def test_options_are_keyword_only():
    for function in (hybrid.load, hybrid.Engine.generate, hybrid.Engine.chat):
        parameters = list(inspect.signature(function).parameters.values())
        options = [p for p in parameters if p.default is not p.empty and p.name != "model"]
        assert options
        assert all(p.kind is p.KEYWORD_ONLY for p in options)
        assert all(p.kind is not p.VAR_KEYWORD for p in parameters)


def test_all_exceptions_have_one_root():
    classes = [c for _, c in inspect.getmembers(errors, inspect.isclass)]
    assert all(issubclass(c, hybrid.HybridError) for c in classes)
    tree = inspect.getdoc(errors) or ""
    assert all(c.__name__ in tree for c in classes)


def test_importing_hybrid_loads_neither_torch_nor_numba():
    code = "import sys, hybrid; print({'torch', 'numba', 'transformers'} & set(sys.modules))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "set()"


def test_the_engine_is_imported_when_one_of_its_names_is_used():
    code = (
        "import sys, hybrid\n"
        "assert 'load' in dir(hybrid) and not hasattr(hybrid, 'no_such_name')\n"
        "print({'numpy', 'tokenizers', 'hybrid.public'} & set(sys.modules))\n"
        "print(hybrid.load.__module__, hybrid.load is hybrid.load)\n"
        "names = {}; exec('from hybrid import *', names)\n"
        "assert set(hybrid.__all__) <= set(names)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.splitlines() == ["set()", "hybrid.hub.loading True"]


def test_loading_and_running_a_model_loads_no_torch():
    code = (
        "import sys, hybrid\n"
        "with hybrid.load() as engine: list(engine.generate('a', max_tokens=2))\n"
        "print('torch' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "False"


def test_the_package_is_typed():
    assert (Path(hybrid.__file__).parent / "py.typed").exists()
