"""Fixtures shared by all tests: instruction sets, formats, tiny models."""

from __future__ import annotations

import os

# Torch and NumPy compute on one thread each, because their threads would take the cores from ours.
# Both read these variables when they are loaded.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from slow import slow_except

from hybrid import kernels
from hybrid.kernels import Format

ROOT = Path(__file__).parents[1]

hypothesis.settings.register_profile("default", deadline=None, max_examples=40)
hypothesis.settings.register_profile("ci", deadline=None, max_examples=40, derandomize=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "default")


@pytest.fixture(scope="session", autouse=True)
def _elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Run the tests in an empty folder.

    In the checkout, `python -m hybrid.run` would import the sources, not the installed package.
    """
    before = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("elsewhere"))
    yield
    os.chdir(before)


ISAS = kernels.available_isas()


@pytest.fixture(params=slow_except(ISAS, ISAS[-1]))
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test once per instruction set that this machine has.

    The default run takes only the best one; that of the kernels' own tests also takes scalar.
    """
    with kernels.using_isa(request.param):
        assert kernels.active_isa() == request.param
        yield request.param


@pytest.fixture(params=list(Format), ids=lambda format: format.name)
def format(request: pytest.FixtureRequest) -> Format:
    return request.param


@pytest.fixture
def no_threads() -> Iterator[pytest.MonkeyPatch]:
    """Refuse further threads of Python, as a limit of processes does, until it is undone."""

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        yield patch


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of texts and tokenizers that only development machines have. Skips without it."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"the development data is not on this machine: no folder {folder}")
    return folder


@pytest.fixture
def config() -> dict[str, Any]:
    """Content of the config.json of a tiny MiniCPM."""
    return {
        "architectures": ["MiniCPMForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "fatrelu",
        "hidden_act_param": 0.03,
        "hidden_size": 32,
        "intermediate_size": 48,
        "max_position_embeddings": 128,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "rope_scaling": None,
        "vocab_size": 10,
        "scale_emb": 12,
        "scale_depth": 1.4,
        "dim_model_base": 16,
    }
