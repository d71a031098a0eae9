"""A GGUF model of a repository is fetched by its type or its file's name, and nothing else is."""

from __future__ import annotations

from pathlib import Path

import pytest
from gguf_files import vocabulary_of, write_gguf
from local_hub import LocalHub
from tiny_models import STORIES, write_model

import hybrid
from hybrid.checkpoint.json_file import read_object
from hybrid.errors import InvalidOption, ModelNotFound, UnsupportedModel
from hybrid.hub.catalog import resolve
from hybrid.hub.gguf_files import choose

REPO = "someone/tiny-gguf"
NAMES = ["Tiny.Q4_0.gguf", "Tiny.Q4_K_M.gguf", "Tiny.Q4_K_S.gguf", "Tiny-f16.gguf"]
NAMES += [f"Big-Q8_0-0000{n}-of-00002.gguf" for n in (1, 2)]
NAMES += ["Lost-Q6_K-00002-of-00002.gguf", "folder/Tiny.Q8_0.gguf", "README.md"]


@pytest.mark.parametrize(
    ("wish", "expected"),
    [
        ("Q4_0", NAMES[:1]),
        ("q4_k_m", NAMES[1:2]),
        ("F16", NAMES[3:4]),
        ("Tiny.Q4_K_S.gguf", NAMES[2:3]),
        ("Q8_0", NAMES[4:6]),
        ("Big-Q8_0-00001-of-00002.gguf", NAMES[4:6]),
    ],
)
def test_a_type_or_a_name_means_one_model(wish: str, expected: list[str]) -> None:
    assert choose(REPO, NAMES, wish) == expected


@pytest.mark.parametrize(
    ("wish", "problem"),
    [
        ("Q4_K", "has no GGUF model 'Q4_K'; its GGUF models: 'Big-Q8_0-00001"),
        ("Tiny", "has 4 GGUF models 'Tiny'"),
        ("Q6_K", "has no GGUF model 'Q6_K'"),
        ("4_0", "has no GGUF model"),
    ],
)
def test_anything_else_lists_the_models(wish: str, problem: str) -> None:
    with pytest.raises(InvalidOption, match=problem):
        choose(REPO, NAMES, wish)
    with pytest.raises(InvalidOption, match="its GGUF models: none"):
        choose(REPO, ["config.json"], wish)


@pytest.fixture
def files(hub: LocalHub, tmp_path: Path) -> dict[str, bytes]:
    changes = {"architectures": ["LlamaForCausalLM"], "hidden_act": "silu"}
    model = write_model(tmp_path / "model", vocab_size=4096, hidden_act_param=None, **changes)
    layout = read_object(STORIES / "tokenizer.json")
    for at in range(2):
        vocabulary = vocabulary_of(layout) if at == 0 else None
        name = f"Big-F32-0000{at + 1}-of-00002.gguf"
        write_gguf(tmp_path / name, model, vocabulary=vocabulary, split=(at, 2))
    whole = write_gguf(tmp_path / "Tiny.F16.gguf", model, "F16", vocabulary=vocabulary_of(layout))
    found = {path.name: path.read_bytes() for path in tmp_path.glob("*.gguf")}
    assert whole.name in found
    hub.repos[REPO] = found | {"README.md": b"# tiny"}
    return found


@pytest.mark.parametrize("prefix", ["", "hf://"])
def test_a_model_is_fetched_once(hub: LocalHub, files: dict[str, bytes], prefix: str) -> None:
    path = resolve(f"{prefix}{REPO}:F16")
    assert path.read_bytes() == files["Tiny.F16.gguf"]
    assert [entry.name for entry in path.parent.iterdir()] == ["Tiny.F16.gguf"]
    hub.requests.clear()
    assert resolve(f"{REPO}:Tiny.F16.gguf") == resolve(f"{REPO}:f16", offline=True) == path
    assert hub.requests == []
    with pytest.raises(ModelNotFound, match="GGUF model 'F32' is not on this machine"):
        resolve(f"{REPO}:F32", offline=True)


def test_a_model_in_several_files_is_fetched_whole(hub: LocalHub, files: dict[str, bytes]) -> None:
    with hybrid.load(f"{REPO}:F32", threads=1) as engine:
        assert engine.folder.name == "Big-F32-00001-of-00002.gguf"
        assert len(list(engine.folder.parent.iterdir())) == 2
        assert len("".join(engine.generate("Once", max_tokens=3)))
    (engine.folder.parent / "Big-F32-00002-of-00002.gguf").unlink()
    assert resolve(f"{REPO}:F32") == engine.folder  # what is missing is fetched again
    assert len(list(engine.folder.parent.iterdir())) == 2


def test_a_fetched_model_hides_no_older_copy_of_the_repository(
    hub: LocalHub, files: dict[str, bytes]
) -> None:
    path = resolve(f"{REPO}:F16")
    ref = path.parents[2] / "refs" / "main"
    ref.write_text("a" * 40)  # of an older copy, which is whole
    assert len(resolve(f"{REPO}:F32").parent.name) == 40
    assert ref.read_text() == "a" * 40


@pytest.mark.parametrize("name", ["hf://../..:Q4_0", "hf://a--b/c:Q4_0"])
def test_what_is_no_repository_is_never_fetched(hub: LocalHub, name: str) -> None:
    with pytest.raises(ModelNotFound):
        resolve(name)
    assert hub.requests == []


def test_a_repository_without_a_type_lists_its_models(
    hub: LocalHub, files: dict[str, bytes]
) -> None:
    with pytest.raises(UnsupportedModel, match=rf"name one as {REPO}:TYPE or :FILE, of 'Big-F32"):
        resolve(REPO)
    with pytest.raises(InvalidOption, match=r"has no GGUF model 'Q2_K'; its GGUF models: 'Big-F32"):
        resolve(f"{REPO}:Q2_K")
    assert not hub.seen("GET", "/resolve/")


def test_a_blob_of_another_programs_cache_is_a_model(
    tmp_path: Path, files: dict[str, bytes]
) -> None:
    blob = tmp_path / "blobs" / f"sha256-{'0' * 64}"
    blob.parent.mkdir()
    blob.write_bytes(files["Tiny.F16.gguf"])
    assert resolve(str(blob)) == blob
    with hybrid.load(blob, threads=1) as engine:
        assert "".join(engine.generate("Once", max_tokens=3))


def test_a_folder_with_several_models_is_refused_with_their_names(
    tmp_path: Path, files: dict[str, bytes]
) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    (folder / "Tiny.F16.gguf").write_bytes(files["Tiny.F16.gguf"])
    (folder / "config.json").write_text("{}")  # repositories of GGUF files often hold one
    assert resolve(str(folder)) == folder / "Tiny.F16.gguf"
    (folder / "other.gguf").write_bytes(files["Tiny.F16.gguf"])
    with pytest.raises(ModelNotFound, match=r"holds 2 GGUF models: 'Tiny.F16.gguf', 'other.gguf'"):
        resolve(str(folder))
