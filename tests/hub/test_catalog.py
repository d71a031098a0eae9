"""A model's name leads to a checked folder, which is downloaded if it is not on this machine.

`local_hub` imitates the Hugging Face Hub.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub.utils
import pytest
from huggingface_hub import constants
from local_hub import (
    CHUNK,
    COMMIT,
    REPO,
    SMALL,
    UNWANTED,
    WEIGHTS,
    Handler,
    LocalHub,
    blobs,
    contents,
    spoil,
)
from tiny_models import STORIES, added_token, write_chat_model, write_model

import hybrid
from hybrid.checkpoint.name import model_name
from hybrid.errors import (
    DownloadFailed,
    InvalidCheckpoint,
    InvalidOption,
    ModelNotFound,
    UnsupportedModel,
)
from hybrid.hub.cache import PartialFile
from hybrid.hub.catalog import catalog, hybrid_home, resolve
from hybrid.notices import Notices

MINICPM = "openbmb/MiniCPM-S-1B-sft"


# Fetching


def test_a_repository_is_fetched_without_the_files_that_no_model_needs(hub: LocalHub) -> None:
    assert contents(resolve(REPO)) == {**SMALL, "model.safetensors": WEIGHTS}
    for name in UNWANTED:
        assert not hub.seen("GET", name)
        assert not hub.seen("HEAD", name)


def test_a_complete_copy_costs_no_request(hub: LocalHub) -> None:
    first = resolve(REPO)
    hub.requests.clear()
    assert resolve(REPO) == first
    assert resolve(REPO, offline=True) == first
    assert hub.requests == []


def test_a_copy_fetched_by_huggingface_hub_is_taken_and_checked(
    hub: LocalHub, tmp_path: Path
) -> None:
    for name in [*SMALL, "model.safetensors"]:
        file = huggingface_hub.hf_hub_download(REPO, name)
    hub.requests.clear()
    assert resolve(REPO) == Path(file).parent
    assert hub.requests == []
    assert len(list((tmp_path / "home" / "verified").iterdir())) == len(SMALL) + 1


def test_everything_that_decides_text_is_fetched(hub: LocalHub, tmp_path: Path) -> None:
    """A model of the Hub and the same folder have the same template, and so the same ids."""
    local = write_chat_model(tmp_path / "local")
    shutil.copy(STORIES / "generation_config.json", local)
    (local / "chat_template.jinja").write_text("{{ '<用户>' }}<AI>", encoding="utf-8")
    (local / "tokenizer_config.json").write_text('{"chat_template": "{{ \'[INST]\' }}"}')
    (local / "special_tokens_map.json").write_text('{"bos_token": "<s>"}')
    (local / "added_tokens.json").write_text('{"<extra>": 4150}')
    named = {f"additional_chat_templates/{n}.jinja": b"{{ 'named' }}" for n in ("tool_use", "x y")}
    hub.repos[REPO] = contents(local) | UNWANTED | named
    folder = resolve(REPO)
    assert contents(folder) == contents(local)
    (template,) = (folder / "additional_chat_templates").iterdir()
    assert (template.name, template.read_bytes()) == ("tool_use.jinja", b"{{ 'named' }}")
    resolve(REPO, offline=True)
    messages: list[hybrid.ChatMessage] = [{"role": "user", "content": "Hello"}]
    with hybrid.load(REPO) as fetched, hybrid.load(local) as opened:
        ids = opened.tokenizer.encode_chat(messages)
        assert fetched.tokenizer.encode_chat(messages) == ids
        assert fetched.default_sampling == opened.default_sampling


def test_tokenizer_model_is_fetched_only_where_there_is_no_tokenizer_json(
    hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hybrid.hub.catalog._check_all_but_weights", CHECK)
    good = contents(write_model(tmp_path / "local", vocab_size=4096))
    hub.repos["someone/both"] = {**good, "tokenizer.model": b"pieces"}
    assert contents(resolve("someone/both")) == good
    hub.repos["someone/old"] = {**good, "tokenizer.model": b"pieces"}
    del hub.repos["someone/old"]["tokenizer.json"]
    with pytest.raises(InvalidCheckpoint, match=r"tokenizer\.model: not a SentencePiece model"):
        resolve("someone/old")
    (folder,) = tmp_path.glob("hf/hub/models--someone--old/snapshots/*")
    fetched = contents(folder)
    assert fetched["tokenizer.model"] == b"pieces"
    assert "model.safetensors" not in fetched  # the refusal came first


def fetch_in_part(hub: LocalHub, *names: str) -> Path:
    """Fetch the weights and some other files with huggingface_hub."""
    for name in [*names, "model.safetensors"]:
        file = huggingface_hub.hf_hub_download(REPO, name)
    hub.requests.clear()
    return Path(file).parent


def test_what_another_programs_copy_lacks_is_fetched_once(hub: LocalHub) -> None:
    """It is of the copy's own commit, whatever the newest one is."""
    del hub.repos[REPO]["added_tokens.json"]
    folder = fetch_in_part(hub, "config.json", "tokenizer.json")
    notices = Notices()
    assert resolve(REPO, notices=notices) == folder
    names = set(hub.repos[REPO]) - set(UNWANTED)
    assert contents(folder) == {name: hub.repos[REPO][name] for name in names}
    assert len(hub.seen("GET", f"/api/models/{REPO}/revision/{COMMIT}")) == 1
    hub.requests.clear()
    assert resolve(REPO, notices=notices) == folder
    assert hub.requests == []
    assert list(notices) == []
    template = huggingface_hub.try_to_load_from_cache(REPO, "added_tokens.json")
    assert template is huggingface_hub.file_download._CACHED_NO_EXIST  # for other programs too


def test_a_copy_of_the_whole_repository_costs_no_request(hub: LocalHub) -> None:
    hub.repos[REPO] = {
        "config.json": SMALL["config.json"],
        "tokenizer.json": SMALL["tokenizer.json"],
        "model.safetensors": WEIGHTS,
        ".gitattributes": b"*.safetensors filter=lfs",
    }
    folder = fetch_in_part(hub, "config.json", "tokenizer.json", ".gitattributes")
    assert resolve(REPO) == folder
    assert hub.requests == []


@pytest.mark.parametrize("trouble", ["offline", "no network", "another commit"])
def test_a_notice_says_what_another_programs_copy_may_lack(
    hub: LocalHub, monkeypatch: pytest.MonkeyPatch, trouble: str
) -> None:
    folder = fetch_in_part(hub, *[name for name in SMALL if name != "chat_template.jinja"])
    if trouble == "no network":
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    elif trouble == "another commit":
        hub.status["/revision/"] = 404
    notices = Notices()
    assert resolve(REPO, offline=trouble == "offline", notices=notices) == folder
    (notice,) = notices
    assert "also has chat_template.jinja is not known" in notice
    assert "\n" not in notice


def test_a_copy_works_without_a_file_that_is_too_long(hub: LocalHub) -> None:
    def announce(handler: Handler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", str((16 << 20) + 1))
        handler.send_header("ETag", f'"{"0" * 40}"')
        handler.end_headers()

    folder = fetch_in_part(hub, "config.json", "tokenizer.json")
    hub.answers["HEAD", "/added_tokens.json"] = announce
    notices = Notices()
    assert resolve(REPO, notices=notices) == folder
    (notice,) = notices
    assert "added_tokens.json" in notice
    assert "expected at most 16,777,216: it is not used, and the text may differ" in notice
    names = set(hub.repos[REPO]) - {*UNWANTED, "added_tokens.json"}
    assert set(contents(folder)) == names  # the others are fetched


def test_a_notice_about_the_copy_reaches_the_engine(hub: LocalHub, tmp_path: Path) -> None:
    hub.repos[REPO] = contents(write_model(tmp_path / "local", vocab_size=4096))
    fetch_in_part(hub, "config.json", "tokenizer.json")
    with hybrid.load(REPO, offline=True) as engine:
        assert any("is not known (offline)" in notice for notice in engine.notices)


def test_a_fetched_model_has_its_repositorys_name(hub: LocalHub, tmp_path: Path) -> None:
    hub.repos[REPO] = contents(write_model(tmp_path / "local", vocab_size=4096))
    hub.repos[REPO] |= {
        "chat_template.jinja": b"{% for %}",
        "generation_config.json": b'{"num_beams": 4}',
        "tokenizer_config.json": b'{"add_bos_token": false}',
        "added_tokens.json": b'{"<extra>": 9999}',
    }
    layout = json.loads(hub.repos[REPO]["tokenizer.json"])
    layout["added_tokens"].append(added_token("<pad>", id=4096, special=True))
    hub.repos[REPO]["tokenizer.json"] = json.dumps(layout).encode()
    with hybrid.load(REPO) as engine:
        assert engine.name == REPO
        assert engine.folder.name == COMMIT
        for part in ("chat template", "num_beams 4", "add_bos_token false", "'<extra>'", "<pad>"):
            (notice,) = [notice for notice in engine.notices if part in notice]
            assert notice.startswith(f"{REPO}: ")
        assert not any(COMMIT in notice for notice in engine.notices)


def test_the_name_of_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert model_name(Path("/a/models--gpt2/snapshots/c0ffee")) == "gpt2"
    assert model_name(Path("/a/models--owner--a-b/snapshots/c0ffee")) == "owner/a-b"
    assert model_name(Path("/a/snapshots/c0ffee")) == "c0ffee"
    assert model_name(Path("/a/b/")) == "b"
    folder = tmp_path / "models--owner--name" / "snapshots" / "c0ffee"
    (folder / "inner").mkdir(parents=True)
    (tmp_path / "mine").symlink_to(folder)
    assert model_name(tmp_path / "mine") == "mine"
    monkeypatch.chdir(folder)
    assert model_name(Path()) == model_name(Path("inner/..")) == "owner/name"


def test_a_copy_fetched_here_is_taken_by_huggingface_hub(hub: LocalHub) -> None:
    folder = resolve(REPO)
    file = huggingface_hub.hf_hub_download(REPO, "model.safetensors", local_files_only=True)
    assert Path(file) == folder / "model.safetensors"


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_the_shards_are_those_that_the_index_names(hub: LocalHub, suffix: str) -> None:
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    weight_map = {"a": f"{stem}-1.{suffix}", "b": f"{stem}-2.{suffix}", "c": f"{stem}-1.{suffix}"}
    files = {
        **SMALL,
        f"{stem}.{suffix}.index.json": json.dumps({"weight_map": weight_map}).encode(),
        f"{stem}-1.{suffix}": b"one",
        f"{stem}-2.{suffix}": b"two",
    }
    hub.repos[REPO] = {**files, **UNWANTED, f"{stem}-3.{suffix}": b"left over"}
    folder = resolve(REPO)
    assert contents(folder) == files

    spoil((folder / f"{stem}-2.{suffix}").resolve())
    with pytest.raises(DownloadFailed, match="corrupt"):
        resolve(REPO)
    with pytest.raises(ModelNotFound, match=rf"{stem}-2\.{suffix}"):
        resolve(REPO, offline=True)
    assert contents(resolve(REPO)) == files


def test_safetensors_are_preferred_and_bin_is_the_fallback(hub: LocalHub) -> None:
    hub.repos["someone/both"] = {**hub.repos[REPO], "pytorch_model.bin": b"pickle"}
    assert "pytorch_model.bin" not in contents(resolve("someone/both"))
    hub.repos["someone/bin"] = {**SMALL, "pytorch_model.bin": b"pickle"}
    assert contents(resolve("someone/bin"))["pytorch_model.bin"] == b"pickle"


def test_a_catalog_name_is_fetched_from_its_repository(hub: LocalHub) -> None:
    hub.repos[MINICPM] = hub.repos[REPO]
    assert resolve("minicpm-s-1b") == resolve("MiniCPM-S-1B") == resolve(MINICPM)


def test_the_token_goes_to_the_hub_and_not_to_the_host_of_the_bytes(hub: LocalHub) -> None:
    resolve(REPO)
    assert hub.seen("GET", "/api/models")[0]["authorization"] == "Bearer secret"
    (headers,) = hub.seen("GET", "/cdn")
    assert "authorization" not in headers
    assert headers["accept-encoding"] == "identity"


@pytest.mark.parametrize(
    "weight_map", [b"[]", b"{}", b"\xff", b'{"weight_map": {"a": "../../evil.bin"}}', b"[" * 99999]
)
def test_a_broken_index_is_refused(hub: LocalHub, weight_map: bytes) -> None:
    hub.repos[REPO] = {**SMALL, "model.safetensors.index.json": weight_map}
    with pytest.raises(InvalidCheckpoint, match=r"index\.json"):
        resolve(REPO)


def test_an_index_that_names_a_shard_which_is_not_there_is_refused(hub: LocalHub) -> None:
    index = b'{"weight_map": {"a": "model-1.safetensors"}}'
    hub.repos[REPO] = {**SMALL, "model.safetensors.index.json": index}
    with pytest.raises(InvalidCheckpoint, match=r"lacks model-1\.safetensors"):
        resolve(REPO)


@pytest.mark.parametrize("lacking", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_repository_that_holds_no_whole_model_is_refused(hub: LocalHub, lacking: str) -> None:
    del hub.repos[REPO][lacking]
    for name in UNWANTED:
        del hub.repos[REPO][name]
    with pytest.raises(InvalidCheckpoint, match=lacking):
        resolve(REPO)
    assert not hub.seen("GET", "/resolve/")


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (["tiny.Q4_K_M.gguf"], "it holds GGUF models: name one as someone/tiny:TYPE"),
        (["config.json", "tokenizer.json", "tiny.Q8_0.gguf"], "it holds GGUF models"),
        (["config.json", "tokenizer.json", "onnx/model.onnx"], "it is an ONNX model"),
        (
            ["adapter_config.json", "adapter_model.safetensors", "tokenizer.json"],
            "it is a LoRA adapter; merge it into its base model with peft",
        ),
    ],
)
def test_a_repository_in_another_programs_format_is_named(
    hub: LocalHub, names: list[str], kind: str
) -> None:
    hub.repos[REPO] = dict.fromkeys([*names, "README.md"], b"{}")
    with pytest.raises(UnsupportedModel, match=kind) as raised:
        resolve(REPO)
    assert str(raised.value).startswith(f"{REPO}: lacks ")
    assert "\n" not in str(raised.value)
    assert not hub.seen("GET", "/resolve/")


def test_another_format_beside_a_model_that_lacks_its_tokenizer_is_not_blamed(
    hub: LocalHub,
) -> None:
    del hub.repos[REPO]["tokenizer.json"]
    with pytest.raises(InvalidCheckpoint, match=f"^{REPO} lacks a tokenizer"):
        resolve(REPO)


CHECK = hybrid.hub.catalog._check_all_but_weights


@pytest.mark.parametrize(
    ("name", "body", "error", "message"),
    [
        ("config.json", b'{"architectures": ["GPT2LMHeadModel"]}', UnsupportedModel, "GPT2"),
        ("config.json", b"{", InvalidCheckpoint, r"config\.json"),
        ("tokenizer.json", b'{"model": {"type": "WordPiece"}}', UnsupportedModel, "WordPiece"),
        ("tokenizer.json", None, InvalidCheckpoint, "not a SentencePiece model"),
    ],
)
def test_a_model_that_hybrid_cannot_use_is_refused_before_its_weights_are_fetched(
    hub: LocalHub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    body: bytes | None,
    error: type[Exception],
    message: str,
) -> None:
    monkeypatch.setattr("hybrid.hub.catalog._check_all_but_weights", CHECK)
    good = contents(write_model(tmp_path / "local", vocab_size=4096))
    hub.repos[REPO] = {**good, "tokenizer.model": b"pieces"}
    if body is None:
        del hub.repos[REPO][name]
    else:
        hub.repos[REPO][name] = body
    with pytest.raises(error, match=message):
        resolve(REPO)
    assert not hub.seen("GET", "model.safetensors")

    hub.repos["someone/good"] = good
    assert contents(resolve("someone/good")) == good


# Interruptions, corruption, concurrency


def test_a_cut_connection_is_resumed(hub: LocalHub) -> None:
    hub.cut_after = 3 * CHUNK
    assert contents(resolve(REPO))["model.safetensors"] == WEIGHTS
    assert hub.seen("GET", "/cdn")[-1]["range"] == f"bytes={3 * CHUNK}-"


def test_the_next_run_resumes_an_interrupted_download(hub: LocalHub, tmp_path: Path) -> None:
    hub.cut_after, hub.down_after_cut = 3 * CHUNK, True
    with pytest.raises(DownloadFailed, match=r"model\.safetensors of someone/tiny .*again"):
        resolve(REPO)
    assert sum(name.endswith(".incomplete") for name in blobs(tmp_path)) == 1

    hub.status.clear()
    hub.requests.clear()
    assert contents(resolve(REPO))["model.safetensors"] == WEIGHTS
    assert [headers["range"] for headers in hub.seen("GET", "/cdn")] == [f"bytes={3 * CHUNK}-"]
    assert not hub.seen("GET", "config.json")
    assert not any(name.endswith(".incomplete") for name in blobs(tmp_path))


def test_a_partial_file_longer_than_the_whole_is_fetched_anew(
    hub: LocalHub, tmp_path: Path
) -> None:
    name = hashlib.sha256(WEIGHTS).hexdigest() + ".incomplete"
    partial = tmp_path / "hf/hub/models--someone--tiny/blobs" / name
    partial.parent.mkdir(parents=True)
    partial.write_bytes(WEIGHTS + b"and more")
    assert contents(resolve(REPO))["model.safetensors"] == WEIGHTS


def test_a_server_that_sends_more_than_it_announced_fills_no_disk(
    hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    send = Handler.send_large
    monkeypatch.setattr(
        Handler, "send_large", lambda handler, body: handler.answer(200, body + bytes(100 * CHUNK))
    )
    with pytest.raises(DownloadFailed, match=r"more than the 40,960 bytes it announced"):
        resolve(REPO)
    (partial,) = tmp_path.glob("hf/hub/models--*/blobs/*.incomplete")
    assert partial.stat().st_size <= len(WEIGHTS) + CHUNK
    monkeypatch.setattr(Handler, "send_large", send)
    assert contents(resolve(REPO))["model.safetensors"] == WEIGHTS


def test_ctrl_c_passes_through(hub: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: object, **options: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(PartialFile, "write", interrupt)
    with pytest.raises(KeyboardInterrupt):
        resolve(REPO)


def test_corrupt_bytes_are_refused_and_removed(hub: LocalHub, tmp_path: Path) -> None:
    hub.flip = True
    expected = hashlib.sha256(WEIGHTS).hexdigest()
    actual = hashlib.sha256(bytes([WEIGHTS[0] ^ 1]) + WEIGHTS[1:]).hexdigest()
    with pytest.raises(DownloadFailed, match=rf"model\.safetensors .*{expected}.*{actual}"):
        resolve(REPO)
    assert not any(name.startswith(expected) for name in blobs(tmp_path))

    hub.flip = False
    assert contents(resolve(REPO))["model.safetensors"] == WEIGHTS


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_cached_file_that_changed_is_refused_and_fetched_anew(hub: LocalHub, name: str) -> None:
    folder = resolve(REPO)
    blob = (folder / name).resolve()
    good = blob.read_bytes()
    spoil(blob)
    with pytest.raises(DownloadFailed, match=name):
        resolve(REPO, offline=True)
    assert not blob.exists()
    assert resolve(REPO) == folder
    assert blob.read_bytes() == good


def test_a_blob_that_was_there_before_the_download_is_checked(
    hub: LocalHub, tmp_path: Path
) -> None:
    blob = tmp_path / "hf/hub/models--someone--tiny/blobs" / hashlib.sha256(WEIGHTS).hexdigest()
    blob.parent.mkdir(parents=True)
    blob.write_bytes(b"something else")
    with pytest.raises(DownloadFailed, match="corrupt"):
        resolve(REPO)
    assert contents(resolve(REPO))["model.safetensors"] == WEIGHTS


def test_a_file_that_changed_but_not_its_size_and_time_is_hashed_again(hub: LocalHub) -> None:
    """`cp -p` and package stores keep or set the time of modification."""
    blob = (resolve(REPO) / "model.safetensors").resolve()
    times = (blob.stat().st_atime_ns, blob.stat().st_mtime_ns)
    blob.write_bytes(bytes([WEIGHTS[0] ^ 1]) + WEIGHTS[1:])
    os.utime(blob, ns=times)
    with pytest.raises(DownloadFailed, match="corrupt"):
        resolve(REPO)


def test_a_huge_file_in_place_of_a_stamp_is_not_read(hub: LocalHub, tmp_path: Path) -> None:
    folder = resolve(REPO)
    for stamp in (tmp_path / "home" / "verified").iterdir():
        with stamp.open("wb") as file:
            file.truncate(1 << 40)  # sparse: it takes no disk space
    assert resolve(REPO) == folder
    assert all(stamp.stat().st_size < 200 for stamp in (tmp_path / "home" / "verified").iterdir())


def test_a_stamped_file_is_not_hashed_again(hub: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    resolve(REPO)
    monkeypatch.setattr("hybrid.hub.checksum.digest", lambda path, etag: "hashed")
    resolve(REPO)
    monkeypatch.setenv("HYBRID_HOME", str(hybrid_home() / "another"))
    with pytest.raises(DownloadFailed, match="hashed"):
        resolve(REPO)


def test_a_link_into_a_store_of_shared_blobs_is_checked_by_its_etag(hub: LocalHub) -> None:
    """huggingface_hub 2 may make the blob itself a link to a file of another name."""
    link = resolve(REPO) / "model.safetensors"
    blob = link.parent / link.readlink()
    shared = blob.with_name("f" * 64)
    blob.rename(shared)
    blob.symlink_to(shared.name)
    os.utime(shared, (2e9, 2e9))  # newer than its stamp, so it is hashed again
    assert contents(resolve(REPO))["model.safetensors"] == WEIGHTS
    spoil(shared)
    with pytest.raises(DownloadFailed, match="corrupt"):
        resolve(REPO)
    assert not shared.exists()
    assert contents(resolve(REPO))["model.safetensors"] == WEIGHTS


def test_a_home_that_cannot_be_written_fails_nothing(
    hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("HYBRID_HOME", str(tmp_path / "file"))
    assert resolve(REPO) == resolve(REPO)


def test_a_disk_without_links_holds_plain_files(
    hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    hub.repos[REPO]["tokenizer_config.json"] = SMALL["special_tokens_map.json"]  # one etag, twice
    folder = resolve(REPO)
    assert contents(folder)["model.safetensors"] == WEIGHTS
    assert blobs(tmp_path) == []
    hub.requests.clear()
    assert resolve(REPO) == folder
    assert hub.requests == []


def environment_of(hub: LocalHub, tmp_path: Path) -> dict[str, str]:
    """Return the environment of other processes, which the fixture's changes do not reach."""
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(tmp_path / "hf"),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    environment.pop("HF_HUB_CACHE", None)
    return environment


STOP_HALF_WAY = """
import os, signal
from hybrid.hub import catalog, transfer
from hybrid.hub.catalog import resolve
transfer.PIECE_BYTES = 4096
catalog._check_all_but_weights = lambda folder: None
{before}
resolve("someone/tiny", progress=lambda task, done, total: done > 4 * 4096 and {then})
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs kill -9")
@pytest.mark.parametrize(
    ("before", "then", "message"),
    [
        pytest.param("", "os.kill(os.getpid(), signal.SIGKILL)", "", id="killed"),
        pytest.param(
            "signal.signal(signal.SIGINT, signal.default_int_handler)",  # background jobs ignore it
            "os.kill(os.getpid(), signal.SIGINT)",
            "KeyboardInterrupt",
            id="ctrl-c",
        ),
        pytest.param(
            "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (5 * 4096, 10**9))",
            "None",
            "cannot store someone/tiny",
            id="disk full",
        ),
    ],
)
def test_after_a_process_ended_half_way_the_next_resumes_its_download(
    hub: LocalHub, tmp_path: Path, before: str, then: str, message: str
) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", STOP_HALF_WAY.format(before=before, then=then)],
        env=environment_of(hub, tmp_path),
        capture_output=True,
        text=True,
    )
    assert ended.returncode != 0
    assert message in ended.stderr
    assert not any(name == hashlib.sha256(WEIGHTS).hexdigest() for name in blobs(tmp_path))

    record = Record()
    assert contents(resolve(REPO, progress=record))["model.safetensors"] == WEIGHTS
    assert record.done()[0] >= 2 * CHUNK  # what the process had in its buffer is lost
    assert not any(name.endswith(".incomplete") for name in blobs(tmp_path))


def test_threads_that_want_the_same_model_share_one_download(hub: LocalHub) -> None:
    with ThreadPoolExecutor(4) as pool:
        folders = list(pool.map(resolve, [REPO] * 4))
    assert contents(folders[0])["model.safetensors"] == WEIGHTS
    assert len(set(folders)) == 1
    assert len(hub.seen("GET", "/cdn")) == 1


@pytest.mark.slow
def test_processes_share_one_download_and_the_environment_is_honoured(
    hub: LocalHub, tmp_path: Path
) -> None:
    environment = environment_of(hub, tmp_path) | {"HF_HOME": str(tmp_path / "elsewhere")}
    script = (
        "from hybrid.hub import catalog; catalog._check_all_but_weights = lambda folder: None; "
        "print(catalog.resolve('someone/tiny'))"
    )

    def start(**variables: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", script],
            env={**environment, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    (first, quiet), (second, _) = [process.communicate() for process in [start(), start()]]
    assert quiet == ""  # no progress bar where stderr is not a terminal
    assert first == second
    assert first.startswith(str(tmp_path / "elsewhere"))
    assert contents(Path(first.strip()))["model.safetensors"] == WEIGHTS
    assert len(hub.seen("GET", "/cdn")) == 1

    hub.requests.clear()
    _, refusal = start(HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "empty")).communicate()
    assert "ModelNotFound" in refusal
    assert hub.requests == []


# Progress


class Record:
    """A Progress that records its calls, and checks that 0 <= done <= total in each."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int, int]] = []

    def __call__(self, task: str, done: int, total: int) -> None:
        assert 0 <= done <= total
        self.calls.append((task, done, total))

    def done(self) -> list[int]:
        return [done for _, done, _ in self.calls]


MODEL_BYTES = sum(map(len, SMALL.values())) + len(WEIGHTS)


def test_progress_counts_the_bytes_of_all_files_together(hub: LocalHub) -> None:
    record = Record()
    resolve(REPO, progress=record)
    assert {(task, total) for task, _, total in record.calls} == {("downloading tiny", MODEL_BYTES)}
    assert record.done()[0] == 0
    assert record.done()[-1] == MODEL_BYTES
    assert record.done() == sorted(set(record.done()))  # each call reports progress
    assert len(record.calls) >= len(SMALL) + len(WEIGHTS) // CHUNK

    record = Record()
    resolve(REPO, progress=record)
    assert record.calls == []  # nothing is fetched, so nothing is reported


def test_progress_knows_the_shards_from_the_beginning(hub: LocalHub) -> None:
    index = json.dumps({"weight_map": {"a": "model-1.bin", "b": "model-2.bin"}}).encode()
    files = {**SMALL, "pytorch_model.bin.index.json": index}
    hub.repos[REPO] = {**files, "model-1.bin": WEIGHTS, "model-2.bin": WEIGHTS[:-5]}
    record = Record()
    resolve(REPO, progress=record)
    total = sum(map(len, hub.repos[REPO].values()))
    assert {total for _, _, total in record.calls} == {total}
    assert record.done()[0] == len(index)  # it is read first: it names the shards
    assert record.done()[-1] == total
    assert len(hub.seen("GET", "index.json")) == 1


def test_progress_of_the_next_run_begins_with_what_is_there(hub: LocalHub) -> None:
    hub.cut_after, hub.down_after_cut = 3 * CHUNK, True
    record = Record()
    with pytest.raises(DownloadFailed):
        resolve(REPO, progress=record)
    here = sum(map(len, SMALL.values())) + 3 * CHUNK
    assert record.done()[-1] == here

    hub.status.clear()
    record = Record()
    resolve(REPO, progress=record)
    assert (record.done()[0], record.done()[-1]) == (here, MODEL_BYTES)
    assert record.done() == sorted(record.done())


def test_progress_counts_no_byte_twice_if_a_connection_is_resumed(hub: LocalHub) -> None:
    hub.cut_after = 3 * CHUNK
    record = Record()
    resolve(REPO, progress=record)
    assert record.done() == sorted(set(record.done()))
    assert record.done()[-1] == MODEL_BYTES


def test_progress_stays_within_the_total_if_a_server_cannot_resume(
    hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial = tmp_path / "hf/hub/models--someone--tiny/blobs"
    partial.mkdir(parents=True)
    (partial / (hashlib.sha256(WEIGHTS).hexdigest() + ".incomplete")).write_bytes(WEIGHTS[:CHUNK])
    monkeypatch.setattr(Handler, "send_large", lambda handler, body: handler.answer(200, body))
    record = Record()
    assert contents(resolve(REPO, progress=record))["model.safetensors"] == WEIGHTS
    assert record.done()[-1] == MODEL_BYTES


def test_progress_that_finds_the_files_of_another_program_is_complete_at_once(
    hub: LocalHub, tmp_path: Path
) -> None:
    folder = resolve(REPO)
    (folder.parent.parent / "refs" / "main").unlink()
    record = Record()
    assert resolve(REPO, progress=record) == folder
    assert record.done() == [MODEL_BYTES]


@pytest.mark.parametrize("error", [ValueError("mine"), OSError(errno.ENOSPC, "mine too")])
@pytest.mark.parametrize("at", [0, 2 * CHUNK])
def test_what_progress_raises_passes_through_and_the_bytes_stay(
    hub: LocalHub, tmp_path: Path, error: Exception, at: int
) -> None:
    def cancel(task: str, done: int, total: int) -> None:
        if done >= at:
            raise error

    with pytest.raises(type(error)) as caught:
        resolve(REPO, progress=cancel)
    assert caught.value is error
    record = Record()
    assert contents(resolve(REPO, progress=record))["model.safetensors"] == WEIGHTS
    assert record.done()[0] >= at


def test_huggingface_hub_draws_no_bar(
    hub: LocalHub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    before = dict(huggingface_hub.utils.tqdm.__dict__)
    monkeypatch.setenv("TQDM_POSITION", "-1")  # makes huggingface_hub draw anywhere
    huggingface_hub.hf_hub_download(REPO, "README.md")
    assert "README.md" in capsys.readouterr().err  # so this test would see a bar
    resolve(REPO)
    assert capsys.readouterr() == ("", "")
    assert dict(huggingface_hub.utils.tqdm.__dict__) == before


# What the user reads


def test_a_model_that_is_not_here_gives_advice_offline(hub: LocalHub) -> None:
    with pytest.raises(ModelNotFound) as caught:
        resolve("MiniCPM-S-1B", offline=True)
    assert "hf download openbmb/MiniCPM-S-1B-sft" in str(caught.value)
    assert "-m /path/to/MiniCPM-S-1B-sft" in str(caught.value)
    assert "HF_ENDPOINT" in str(caught.value)
    assert hub.requests == []


def test_a_missing_network_gives_advice(hub: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    with pytest.raises(DownloadFailed) as caught:
        resolve("MiniCPM-S-1B")
    assert "hf download openbmb/MiniCPM-S-1B-sft" in str(caught.value)
    assert "-m /path/to/MiniCPM-S-1B-sft" in str(caught.value)
    assert "HF_ENDPOINT" in str(caught.value)


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_repository_that_the_hub_refuses_is_not_found(hub: LocalHub, status: int) -> None:
    hub.status["/api/models"] = status
    with pytest.raises(ModelNotFound, match=rf"someone/tiny \(HTTP {status}\).*HF_TOKEN"):
        resolve(REPO)


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_hub_in_trouble_fails_the_download(hub: LocalHub, status: int) -> None:
    hub.status["/api/models"] = status
    with pytest.raises(DownloadFailed, match=str(status)):
        resolve(REPO)


@pytest.mark.parametrize("endpoint", ["nonsense", "http://127.0.0.1:port", "ftp://127.0.0.1"])
def test_a_nonsensical_endpoint_fails_the_download(
    hub: LocalHub, monkeypatch: pytest.MonkeyPatch, endpoint: str
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    with pytest.raises(DownloadFailed):
        resolve(REPO)


@pytest.mark.parametrize("page", [b"<html>Log in</html>", b"{}", b'{"id": "a/b", "sha": "../x"}'])
def test_a_login_page_in_place_of_the_hub_fails_the_download(
    hub: LocalHub, monkeypatch: pytest.MonkeyPatch, page: bytes
) -> None:
    monkeypatch.setattr(Handler, "list_files", lambda handler, *_: handler.answer(200, page))
    with pytest.raises(DownloadFailed):
        resolve(REPO)


def test_a_file_without_a_checksum_is_refused(
    hub: LocalHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hybrid.hub.download.is_checksum", lambda etag: len(etag) == 64)
    with pytest.raises(DownloadFailed, match=r"config\.json cannot be verified"):
        resolve(REPO)


def test_too_small_a_disk_is_reported_before_the_download(
    hub: LocalHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10))
    with pytest.raises(DownloadFailed, match=r"needs 0\.00 GB more"):
        resolve(REPO)
    assert not hub.seen("GET", "/cdn")


def test_a_disk_that_fills_up_is_reported(hub: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(*args: object, **options: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(PartialFile, "write", fill)
    with pytest.raises(DownloadFailed, match=r"No space left on device.*Make room"):
        resolve(REPO)


def test_a_cache_that_cannot_be_written_is_reported(
    hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file" / "hub"))
    with pytest.raises(DownloadFailed, match=r"cannot store someone/tiny in .*HF_HOME"):
        resolve(REPO)


# Names


@pytest.fixture
def nobody_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail on an attempt to fetch."""

    def refuse(repo_id: str, **options: object) -> Path:
        raise AssertionError(f"fetched {repo_id}")

    monkeypatch.setattr("hybrid.hub.catalog.fetch", refuse)


def test_names_are_unique_and_fractions_are_fractions() -> None:
    assert len({entry.name.casefold() for entry in catalog()}) == len(catalog())
    for entry in catalog():
        fraction = entry.expected_active_fraction
        assert fraction is None or 0 < fraction < 1


@pytest.mark.usefixtures("nobody_calls")
def test_a_catalog_name_wins_over_a_folder_unless_written_as_a_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "package" / "models" / "stories").mkdir(parents=True)
    (tmp_path / "stories").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "hybrid.hub.catalog.__file__", str(tmp_path / "package" / "hub" / "catalog.py")
    )
    bundled = tmp_path / "package" / "models" / "stories"
    assert resolve("stories") == resolve("Stories") == bundled
    assert resolve("./stories").resolve() == tmp_path / "stories"
    assert resolve(Path("stories")).resolve() == tmp_path / "stories"


def test_an_installation_without_the_bundled_model_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hybrid.hub.catalog.__file__", str(tmp_path / "hub" / "catalog.py"))
    with pytest.raises(ModelNotFound, match="install hybrid again"):
        resolve("stories")


@pytest.mark.usefixtures("nobody_calls")
def test_a_folder_wins_over_a_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "owner" / "$(name) ;模型"
    folder.mkdir(parents=True)
    (tmp_path / "owner" / "name").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("owner/name") == Path("owner/name")
    assert resolve("~/owner/name") == tmp_path / "owner" / "name"
    assert resolve(str(folder)) == folder


@pytest.mark.parametrize(
    ("typo", "meant"),
    [("MiniCPM-S1B", "MiniCPM-S-1B"), ("storys", "stories"), ("relullama7b", "ReluLLaMA-7B")],
)
def test_an_unknown_name_suggests_the_closest_and_lists_all(typo: str, meant: str) -> None:
    with pytest.raises(ModelNotFound, match=f"Did you mean '{meant}'") as caught:
        resolve(typo)
    for entry in catalog():
        assert entry.name in str(caught.value)


@pytest.mark.usefixtures("nobody_calls")
@pytest.mark.parametrize(
    "name",
    [
        *("", " ", "\t\n", "\0", "owner/na\0me", "../x/y", "./x", "/no/such/folder", "a/b/c", "a/"),
        *(
            "/a",
            "a//b",
            "a\\b",
            "C:\\models\\x",
            "~/no-such",
            "~no-such-user/x",
            "owner/..",
            "-a/b",
        ),
        *("owner/a--b", "owner/a..b", "owner/a b", "owner/name;rm", "https://huggingface.co/a/b"),
        *("owner/名", "x" * 5000, "a/" + "x" * 97, "\ud800", "owner/name\n"),
    ],
)
def test_what_is_neither_name_nor_folder_nor_repository_is_refused(name: str) -> None:
    with pytest.raises((ModelNotFound, InvalidOption)) as caught:
        resolve(name)
    str(caught.value).encode()  # so it can be printed


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory and home, with folders of models."""
    for name in ("models/minicpm", "models/Stories-2", "models/v1/minicpm", "minicpm-copy"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "models" / "minicmp.txt").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.usefixtures("nobody_calls", "shelf")
@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("./models/minicmp", "'models/minicpm'"),
        ("~/models/minicmp", "models/minicpm'"),
        ("models/v1/minicmp", "'models/v1/minicpm'"),
        ("modles/v1/minicmp", "'models'"),
        ("models/stories_2/", "'models/Stories-2'"),
        ("./minicpm-cpy", "'minicpm-copy'"),
        ("./nothing/like/it", None),
        ("x/", None),
        ("../no-such-folder", None),
        ("models\\minicpm", "'models'"),
        ("C:\\models\\minicpm", None),
        ("C:/minicpm", None),
        ("/no/such/folder", None),
    ],
)
def test_a_mistyped_folder_is_no_such_folder(name: str, meant: str | None) -> None:
    for model in (name, Path(name).expanduser()):
        with pytest.raises(ModelNotFound, match="no such folder: ") as caught:
            resolve(model)
        assert "HTTP" not in str(caught.value)
        assert isinstance(model, Path) or "hf://" not in str(caught.value)
        if meant is None:
            assert "did you mean" not in str(caught.value)
        else:
            assert re.search(rf"\(did you mean .*{re.escape(meant)}", str(caught.value))


@pytest.mark.usefixtures("shelf")
def test_a_mistyped_folder_in_a_folder_that_exists_is_not_looked_for_on_the_hub(
    hub: LocalHub,
) -> None:
    hub.repos["models/minicmp"] = hub.repos[REPO]  # somebody waits for the mistake
    with pytest.raises(
        ModelNotFound, match=r"no such folder: 'models/minicmp' \(did you mean"
    ) as c:
        resolve("models/minicmp")
    assert "write hf://models/minicmp" in str(c.value)
    assert hub.requests == []
    folder = resolve("hf://models/minicmp")
    assert contents(folder)["model.safetensors"] == WEIGHTS
    hub.requests.clear()
    assert resolve("models/minicmp") == folder  # it was downloaded before, by that name
    assert hub.requests == []


@pytest.mark.usefixtures("shelf")
def test_a_repository_whose_owner_is_no_folder_here_is_fetched(hub: LocalHub) -> None:
    Path("someone.txt").touch()
    Path("tiny").mkdir()
    assert contents(resolve(REPO))["model.safetensors"] == WEIGHTS


@pytest.mark.usefixtures("shelf")
@pytest.mark.parametrize(
    ("name", "hint"), [("modles/minicpm", " (did you mean 'models'?)"), ("a/b", "")]
)
def test_what_is_neither_folder_nor_repository_is_named_as_both(
    hub: LocalHub, name: str, hint: str
) -> None:
    with pytest.raises(ModelNotFound) as caught:
        resolve(name)
    assert str(caught.value).startswith(f"there is no folder {name!r} here{hint}; and the hub")
    assert "(HTTP 404)" in str(caught.value)


@pytest.mark.usefixtures("shelf")
def test_a_mistyped_folder_is_named_without_a_network_too(
    hub: LocalHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(
        DownloadFailed, match=r"^there is no folder 'modles/minicpm' here \(did you"
    ):
        resolve("modles/minicpm")
    with pytest.raises(DownloadFailed, match=r"^cannot fetch its list of files of a/b "):
        resolve("a/b")


@pytest.mark.usefixtures("nobody_calls", "shelf")
def test_an_unknown_name_suggests_a_folder_here() -> None:
    with pytest.raises(ModelNotFound, match=r"existing folder \(did you mean 'minicpm-copy'\?\)"):
        resolve("minicpm-copi")


@pytest.mark.usefixtures("nobody_calls")
@pytest.mark.parametrize("name", ["hf://", "hf://name", "hf://a/b/c", "hf://../x", "hf://a/b@main"])
def test_a_scheme_without_a_repository_is_refused(name: str) -> None:
    with pytest.raises(ModelNotFound, match="expected hf://owner/name"):
        resolve(name)


@pytest.mark.usefixtures("nobody_calls")
def test_a_url_is_not_taken_for_a_folder() -> None:
    with pytest.raises(ModelNotFound, match=r"is a URL; expected .* owner/name"):
        resolve("https://huggingface.co/someone/tiny")


@pytest.mark.usefixtures("nobody_calls")
def test_a_path_is_never_a_repository() -> None:
    with pytest.raises(ModelNotFound, match="no such folder: 'someone/tiny'"):
        resolve(Path("someone/tiny"))


def test_a_file_in_place_of_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    with pytest.raises(
        ModelNotFound, match=r"model\.gguf' is a file; expected the folder"
    ) as raised:
        resolve(str(tmp_path / "model.gguf"))
    assert "it does not begin as GGUF files do" in str(raised.value)


def test_links_to_folders_are_followed(tmp_path: Path) -> None:
    folder = tmp_path / "'quoted' \"twice\" `id` $(id) & # *\nnext line"
    folder.mkdir()
    for name, target in (("good", folder), ("dangling", tmp_path / "gone"), ("loop", "loop")):
        (tmp_path / name).symlink_to(target)
    assert resolve(str(folder)) == folder
    assert resolve(str(tmp_path / "good")) == tmp_path / "good"
    for name in ("dangling", "loop"):
        with pytest.raises(ModelNotFound, match=f"{name}' is a link to a folder that is not"):
            resolve(str(tmp_path / name))


def test_the_home_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.delenv("HYBRID_HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert hybrid_home() == Path("/home/someone/.cache/hybrid")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert hybrid_home() == Path("/cache/hybrid")
    monkeypatch.setenv("HYBRID_HOME", "~/mine")
    assert hybrid_home() == Path("/home/someone/mine")
    monkeypatch.setenv("HYBRID_HOME", "~no-such-user/mine")
    with pytest.raises(InvalidOption, match="HYBRID_HOME"):
        hybrid_home()


def test_importing_the_catalog_does_not_import_huggingface_hub() -> None:
    script = "import sys, hybrid.hub.catalog; sys.exit('huggingface_hub' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", script], env=environment).returncode == 0
