"""Files of our own that are damaged or hostile raise one type of error, and kept ones fall back."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from placement.test_plan import PLAN
from placement.test_profile import random_profile
from placement.test_solver import MACHINE
from predictor_files import trace_about, write_predictor
from safetensors.numpy import load_file, save_file
from tiny_models import write_model

import hybrid
from hybrid.cli.command_line import read_text
from hybrid.engine.loading.planning import plan_path
from hybrid.engine.loading.prediction import predictor_path
from hybrid.errors import HybridError, InvalidArtifact, InvalidOption
from hybrid.evaluation.choices import read_questions
from hybrid.files import open_file, read_bytes
from hybrid.kernels import Format, ThreadPool
from hybrid.notices import Notices
from hybrid.placement import measurement
from hybrid.placement.machine import load_machine, read_overrides
from hybrid.placement.plan import load_plan
from hybrid.placement.profile import FILE_NAME, load_profile
from predictors.errors import PredictorError
from predictors.file import load_predictor_file
from predictors.schema import Malformed, integer, list_of, mapping, number, read_json, record, text
from predictors.trace import TraceSizes, TraceWriter, load_trace
from profiler.corpus import TextFile

NESTED = "[" * 200_000 + "]" * 200_000
HOSTILE = [NESTED, "", "null", "3", '"text"', "[]", "{", '{"a": NaN}', '{"a": 1, "a": 1}', "1e999"]
HOSTILE += ["9" * 5000, '{"version": Infinity}', "{}", "\ud800"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "model", vocab_size=4096)


def write_trace(folder: Path) -> None:
    writer = TraceWriter(folder, TraceSizes(2, 8, 4), capacity=10)
    writer.add(np.zeros((2, 5, 4), np.float16), np.zeros((2, 5, 1), np.uint8))
    writer.finish([np.zeros((8, 4), np.float16)] * 2, trace_about())


class Artifact:
    """A sound file: its JSON, a way to write other JSON into it, and its reader."""

    def __init__(self, folder: Path, model: Path, kind: str) -> None:
        self.kind, self.path = kind, folder / kind
        if kind == "plan":
            PLAN.save(self.path)
        elif kind == "machine":
            MACHINE.save(self.path)
        elif kind == "trace":
            write_trace(self.path)
        else:
            with hybrid.load(model, profile="none") as engine:
                if kind == "profile":
                    random_profile(engine).save(self.path)
                else:
                    write_predictor(self.path, engine)
        self.file = self.path / "trace.json" if kind == "trace" else self.path
        self.load: Callable[[Path], Any] = {
            "plan": load_plan,
            "machine": load_machine,
            "profile": load_profile,
            "predictor": load_predictor_file,
            "trace": load_trace,
        }[kind]
        if kind in ("profile", "predictor"):
            content = self.file.read_bytes()
            header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
            [(self.key, self.text)] = header["__metadata__"].items()
            self.tensors = load_file(self.file)
        else:
            self.text = self.file.read_text()

    def write(self, text: str) -> None:
        if self.kind in ("profile", "predictor"):
            text = text.encode("utf-8", errors="replace").decode()
            save_file(self.tensors, self.file, {self.key: text})
        else:
            self.file.write_bytes(text.encode("utf-8", errors="surrogatepass"))

    def refuses(self, text: str) -> None:
        self.write(text)
        with pytest.raises((InvalidArtifact, PredictorError)) as raised:
            self.load(self.path)
        message = str(raised.value)
        assert str(self.file) in message
        assert "\n" not in message
        assert len(message) < len(str(self.file)) + 400


KINDS = ["plan", "machine", "trace", "profile", "predictor"]


@pytest.fixture(scope="module", params=KINDS)
def artifact(tmp_path_factory: pytest.TempPathFactory, model: Path, request: Any) -> Artifact:
    return Artifact(tmp_path_factory.mktemp("artifacts"), model, request.param)


def paths_in(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the place of every field that is checked; lists are entered at their first element."""
    if isinstance(value, dict):
        for key, element in value.items():
            yield (*path, key)
            yield from paths_in(element, (*path, key))
    elif isinstance(value, list) and value:
        yield from paths_in(value[0], (*path, 0))


def changed(about: Any, path: tuple[Any, ...], change: Callable[[Any], Any]) -> str:
    """Return the JSON with the field at `path` changed, or removed if the change returns ...."""
    about = json.loads(json.dumps(about))
    holder = about
    for key in path[:-1]:
        holder = holder[key]
    value = change(holder[path[-1]])
    if value is ...:
        del holder[path[-1]]
    else:
        holder[path[-1]] = value
    return json.dumps(about)


def other_type(value: Any) -> Any:
    return 7 if isinstance(value, str | list | dict | bool) else "7"


# Only for the reader: nothing computes with them.
INFORMATIVE = {"model", "texts", "seed", "costs", "window", "about"}
OPTIONAL = {"gpu", "is_modelled", "version", "mechanism", "torch_bytes", "hand_offs"}
OPTIONAL |= {"vram_budget", "vram_bytes", "context_bytes", "is_head_on_gpu"}
OPTIONAL |= {"is_on_gpu", "n_gate", "n_hot"}


def test_every_field_that_is_null_missing_or_of_another_type_is_refused(artifact):
    about = json.loads(artifact.text)
    artifact.write(artifact.text)
    artifact.load(artifact.path)
    n_refused = 0
    for path in paths_in(about):
        if artifact.kind != "trace" and INFORMATIVE & set(path):
            continue
        artifact.refuses(changed(about, path, other_type))
        if path[-1] != "gpu":
            artifact.refuses(changed(about, path, lambda _: None))
        if path[-1] not in OPTIONAL and path[:1] != ("costs",):
            artifact.refuses(changed(about, path, lambda _: ...))
        n_refused += 1
    assert n_refused >= 3
    artifact.write(artifact.text)


def test_every_number_that_is_not_one_is_refused(artifact):
    about = json.loads(artifact.text)
    for path in paths_in(about):
        value = about
        for key in path:
            value = value[key]
        if type(value) not in (int, float) or (INFORMATIVE & set(path)):
            continue
        for wrong in (float("nan"), float("inf"), -1e300, 10**400, True):
            artifact.refuses(changed(about, path, lambda _, wrong=wrong: wrong))
    artifact.write(artifact.text)


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: f"{text!a:.20}")
def test_what_is_not_such_a_file_is_refused(artifact, text):
    if artifact.kind == "machine" and text == "{}":
        artifact.refuses('{"version": 1}')
    else:
        artifact.refuses(text)
    artifact.write(artifact.text)


def test_deep_nesting_within_a_field_is_refused(artifact):
    about = json.loads(artifact.text)
    for path in [(name,) for name in about]:
        artifact.refuses(changed(about, path, lambda _: "@").replace('"@"', NESTED))
    artifact.write(artifact.text)


@pytest.mark.parametrize(
    ("field", "value"),
    [("margin", 1e30), ("margin", -1e9), ("recall", 2.0), ("recall", -0.1), ("precision", 1.1)]
    + [("rank", 13), ("rank", 0), ("rank", -4), ("rank", 2**40), ("cost_ns", -1.0)],
)
def test_values_of_a_predictor_beyond_their_range_are_refused(tmp_path, model, field, value):
    artifact = Artifact(tmp_path, model, "predictor")
    about = json.loads(artifact.text)
    artifact.refuses(changed(about, ("choices", "0.99", 0, field), lambda _: value))


@pytest.mark.parametrize("recall", ["nan", "inf", "0", "2", "-1", "", "high"])
def test_a_predictor_for_a_recall_that_is_none_is_refused(tmp_path, model, recall):
    artifact = Artifact(tmp_path, model, "predictor")
    about = json.loads(artifact.text)
    artifact.refuses(changed(about, ("choices",), lambda choices: {recall: choices["0.99"]}))


def test_files_of_the_earlier_versions_say_what_to_do(artifact):
    about = json.loads(artifact.text)
    key = "hybrid_trace" if artifact.kind == "trace" else "version"
    artifact.write(changed(about, (key,), lambda version: version - 1))
    with pytest.raises((InvalidArtifact, PredictorError), match=r"again|a new one"):
        artifact.load(artifact.path)
    artifact.write(artifact.text)


# Fallbacks: a file that hybrid found or keeps never makes a load fail.


@pytest.mark.parametrize("text", [NESTED, "", "{}", "null"], ids=["nested", "empty", "{}", "null"])
def test_broken_files_that_are_found_become_notices(tmp_path, model, monkeypatch, text):
    home = tmp_path / "home"
    monkeypatch.setenv("HYBRID_HOME", str(home))
    folder = write_model(tmp_path / "model", vocab_size=4096)
    with hybrid.load(folder) as engine:
        spec = engine.spec
        kept = predictor_path(home, engine.model_hash, "q8")
        plan = plan_path(home, spec)
        random_profile(engine).save(folder / FILE_NAME)
        kept.parent.mkdir(parents=True)
        write_predictor(kept, engine)
    for path, key in ((folder / FILE_NAME, "hybrid_profile"), (kept, "hybrid_predictor")):
        save_file(load_file(path), path, {key: text})
    plan.parent.mkdir(parents=True)
    plan.write_text(text)
    with hybrid.load(folder, predictor="auto") as engine:
        notices = "\n".join(engine.notices)
        assert engine.neuron_orders is None
        assert engine.prediction is None
        assert engine.device_name == "cpu"
    for path in (folder / FILE_NAME, kept, plan):
        assert str(path) in notices


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize("what", ["pipe", "folder", "device", "dangling link"])
def test_what_is_no_file_in_place_of_a_profile_becomes_a_notice(tmp_path, what):
    folder = write_model(tmp_path / "model", vocab_size=4096)
    put(folder / FILE_NAME, what)
    with hybrid.load(folder) as engine:
        assert any(FILE_NAME in notice for notice in engine.notices)


def test_broken_speeds_of_the_machine_are_measured_again_with_a_notice(
    tmp_path, model, monkeypatch
):
    with hybrid.load(model) as engine:
        config = engine.config
    monkeypatch.setattr(measurement, "measure_cpu", lambda *_: MACHINE.cpu)
    path = measurement.machine_path(tmp_path, config, Format.q8, 1)
    path.parent.mkdir()
    path.write_text('{"cpu": {"stream_gbs": NaN}}')
    notices = Notices()
    machine = measurement.measured_machine(config, Format.q8, ThreadPool(1), tmp_path, notices)
    assert asdict(machine.cpu) == asdict(MACHINE.cpu)
    assert any("measured again" in notice and str(path) in notice for notice in notices)


# The opener


def put(path: Path, what: str) -> None:
    if what == "pipe":
        os.mkfifo(path)
    elif what == "link to a pipe":
        os.mkfifo(path.with_name("pipe"))
        path.symlink_to(path.with_name("pipe"))
    elif what == "folder":
        path.mkdir()
    elif what == "device":
        path.symlink_to("/dev/zero")
    elif what == "dangling link":
        path.symlink_to(path.with_name("nothing"))
    elif what == "huge":
        with path.open("wb") as file:
            file.truncate(1 << 40)  # sparse: it takes no disk space


READERS: dict[str, Callable[[Path], Any]] = {
    "plan": load_plan,
    "machine": load_machine,
    "overrides": read_overrides,
    "profile": load_profile,
    "predictor": load_predictor_file,
    "trace": lambda path: load_trace(path.parent),
    "text": read_text,
    "questions": read_questions,
}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    "what", ["pipe", "link to a pipe", "folder", "device", "dangling link", "huge"]
)
def test_no_reader_waits_or_reads_without_end(tmp_path, reader, what):
    path = tmp_path / "trace.json"
    put(path, what)
    with pytest.raises((HybridError, PredictorError), match=r"trace\.json"):
        READERS[reader](path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize("what", ["pipe", "folder", "device"])
def test_texts_to_record_are_files(tmp_path, what):
    put(tmp_path / "text", what)
    with pytest.raises(InvalidOption, match="--text"):
        TextFile(tmp_path / "text")


def test_a_file_that_grows_is_read_within_its_limit(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"x" * 100)
    assert read_bytes(path, 100) == b"x" * 100
    with pytest.raises(OSError, match="has 100 bytes, expected at most 99"):
        read_bytes(path, 99)
    if Path("/proc/self/status").exists():  # its size is said to be 0
        with pytest.raises(OSError, match="expected at most 10"):
            read_bytes(Path("/proc/self/status"), 10)


def test_no_file_stays_open_after_a_refusal(tmp_path):
    fds = Path("/proc/self/fd")
    if not fds.exists():
        pytest.skip("needs /proc")
    before = len(list(fds.iterdir()))
    for _ in range(5):
        with pytest.raises(OSError, match="directory"):
            open_file(tmp_path)
    assert len(list(fds.iterdir())) == before


# The schema


SCHEMA = record(
    {"name": text(5), "sizes": list_of(integer(1, 9), most=3)},
    {"shares": mapping(str, number(0.0, 1.0))},
)


def test_a_sound_value_passes_unchanged():
    value = {"name": "a", "sizes": [1, 9], "shares": {"x": 0.5, "y": 1}}
    assert read_json(json.dumps(value), SCHEMA) == value


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"name": "a"}, "lacks sizes"),
        ({"name": "a", "sizes": [], "colour": 3}, "unknown field 'colour'"),
        ({"name": "abcdef", "sizes": []}, "^name: expected text, found 'abcdef'"),
        ({"name": "a", "sizes": [1, 2, "3"]}, r"^sizes\[2\]: expected an integer from 1 to 9"),
        ({"name": "a", "sizes": [1, 2, 10]}, r"^sizes\[2\]: .*found 10"),
        ({"name": "a", "sizes": [1] * 4}, "^sizes: expected a list of 0 to 3"),
        ({"name": "a", "sizes": [], "shares": {"x": 1.5}}, r"^shares\.x: expected a number"),
        ({"name": "a", "sizes": [10**5000]}, "huge integer"),
    ],
)
def test_a_message_says_where_and_what(value, message):
    with pytest.raises(Malformed, match=message):
        SCHEMA(value)


def test_the_arrays_of_a_profile_are_its_own(tmp_path, model):
    """A count beyond int64, or of another type, is no profile."""
    artifact = Artifact(tmp_path, model, "profile")
    artifact.tensors["counts"] = artifact.tensors["counts"].astype(np.int32)
    artifact.refuses(artifact.text)
