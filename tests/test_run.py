"""hybrid.run prints what a user expects, and answers each mistake with one clear line."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from isa_note import without_isa_note
from tiny_models import STORIES, write_model

from hybrid import run
from hybrid.checkpoint.identity import ModelIdentity
from hybrid.text.tokenizer import Tokenizer


class Result:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, without_isa_note(err)


def hybrid_run(*arguments: str | Path, stdin: bytes = b"", **environment: str) -> Result:
    """Run the command in this process, which takes a tenth of the time of a new process."""
    streams = {name: io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for name in ("out", "err")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        for name, stream in streams.items():
            patch.setattr(sys, f"std{name}", stream)
        for name, value in environment.items():
            patch.setenv(name, value)
        try:
            code = run.main([str(argument) for argument in arguments])
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 1
    for stream in streams.values():
        stream.flush()
    out, err = (streams[name].buffer.getvalue().decode() for name in ("out", "err"))
    return Result(code, out, err)


def hybrid_process(*arguments: str, stdin: bytes = b"") -> Result:
    """Run the command in a new process."""
    completed = subprocess.run(
        [sys.executable, "-m", "hybrid.run", *arguments],
        input=stdin,
        capture_output=True,
        check=False,
    )
    return Result(completed.returncode, completed.stdout.decode(), completed.stderr.decode())


def test_a_story_goes_to_stdout_and_one_closing_line_to_stderr():
    result = hybrid_process("-p", "Once upon a time", "-n", "30", "--seed", "1")
    assert result.code == 0
    assert result.out.startswith("Once upon a time")
    assert len(result.out) > 60
    (line,) = result.err.splitlines()
    assert re.fullmatch(
        r"\[prompt 5 tokens, [\d.]+ tok/s \| generated 30 tokens, [\d.]+ tok/s, [\d.]+ GB/s"
        r"( \(\d+% of bandwidth\))? \| "
        r"[\d.]+% of FFN neurons active \| memory \d+ MB \| q8, \d+ threads, seed 1 \| "
        r"stopped: --max-tokens reached\]",
        line,
    )


def test_the_same_seed_writes_the_same_text_on_any_number_of_threads():
    texts = {hybrid_run("-p", "A dog", "-n", "40", "--seed", "5", "-t", t).out for t in "123"}
    assert len(texts) == 1


def test_the_prompt_may_come_from_a_file_or_standard_input(tmp_path):
    path = tmp_path / "a prompt; with 'odd' name.txt"
    path.write_text("The cat\n", encoding="utf-8")
    options = ("-n", "10", "--temp", "0")
    expected = hybrid_run("-p", "The cat", *options)
    assert hybrid_run("-f", path, *options).out == expected.out
    assert hybrid_run("-f", "-", *options, stdin=b"The cat\n").out == expected.out


def test_stop_texts_end_the_story():
    whole = hybrid_run("-p", "Once upon a time", "-n", "40", "--seed", "1").out
    word = whole.split()[9]
    options = ("-p", "Once upon a time", "-n", "40", "--seed", "1", "--stop", word)
    result = hybrid_run(*options, "--stop", "no such text")
    assert result.out == whole[: whole.index(word, 16)] + "\n"
    assert "stopped: --max-tokens" not in result.err


def test_stop_texts_may_have_escapes():
    options = ("-p", "Once upon a time", "-n", "200", "--seed", "1")
    whole = hybrid_run(*options).out
    first_line = whole.split("\n")[0]
    assert first_line + "\n" != whole
    assert hybrid_run(*options, "--stop", r"\n").out == first_line + "\n"
    assert hybrid_run(*options, "--stop", r"\x0a").out == first_line + "\n"


@pytest.mark.parametrize("n", ["-1", "99999"])
def test_an_answer_without_a_limit_ends_with_the_context(n):
    result = hybrid_run("-p", "Once", "-c", "40", "-n", n, "--temp", "0")
    assert "stopped: the context is full" in result.err


def test_a_random_seed_may_be_written_as_minus_one():
    answers = [json.loads(hybrid_run("-n", "1", "--seed", "-1", "--json").out) for _ in range(3)]
    assert len({answer["seed"] for answer in answers}) > 1


@pytest.mark.parametrize("options", [(), ("-i",)])
def test_a_context_shift_is_said_once(monkeypatch, capsys, options):
    monkeypatch.setattr("builtins.input", lambda prompt: "/quit")
    arguments = ["-p", "Once upon a time", "-c", "20", "-n", "40", "--temp", "0", "--stop", "zzz"]
    assert run.main([*arguments, "--context-shift", "--keep", "2", *options]) == 0
    output = capsys.readouterr()
    assert output.err.count("its first 3 tokens stayed") == 1
    assert "context is full" not in output.err


def test_speculation_changes_no_text():
    options = ("-p", "One day. One day. One day.", "-n", "40", "--temp", "0")
    plain, speculated = hybrid_run(*options), hybrid_run(*options, "--speculate", "ngram")
    assert speculated.out == plain.out
    assert "speculated" not in plain.err


def test_a_full_context_is_reported():
    result = hybrid_run("-p", "Once upon a time", "-c", "10", "-n", "50", "--seed", "1")
    assert result.code == 0
    assert "stopped: the context is full" in result.err


@pytest.mark.parametrize("option", ["--json", "-v"])
def test_a_finished_answer_needs_no_hash_of_the_model(tmp_path, monkeypatch, option):
    """Hashing takes long without a home, and fails if a file was touched meanwhile."""
    model = write_model(tmp_path / "model", vocab_size=4096)
    touched = False
    begin = run.begin

    def touching(*arguments):
        nonlocal touched
        touched = True
        os.utime(model / "model.safetensors", ns=(1, 1))
        return begin(*arguments)

    def refuse(identity) -> str:
        raise AssertionError("the model is hashed")

    monkeypatch.setattr(run, "begin", touching)
    monkeypatch.setattr(ModelIdentity, "_compute", refuse)
    result = hybrid_run("-m", model, "-n", "3", option, HYBRID_HOME=str(tmp_path / "home"))
    assert result.code == 0, result.err
    assert touched
    if option == "--json":
        assert json.loads(result.out)["vram_bytes"] == 0
    else:
        assert "generated 3 tokens" in result.err


def test_the_models_own_limit_is_not_called_an_option(tmp_path):
    model = write_model(tmp_path / "model", vocab_size=4096)
    (model / "generation_config.json").write_text('{"max_new_tokens": 3}')
    assert "stopped: the model's own limit reached]" in hybrid_run("-m", model, "-p", "A").err
    assert "stopped: --max-tokens reached]" in hybrid_run("-m", model, "-p", "A", "-n", "2").err
    together = hybrid_run("-m", model, "-i", stdin=b"A\n").err
    assert "(stopped after 3 tokens, the model's own limit; -n changes it)" in together
    together = hybrid_run("-m", model, "-i", "-n", "2", stdin=b"A\n").err
    assert "(stopped after --max-tokens 2)" in together


def test_help_says_what_a_model_may_be(capsys):
    with pytest.raises(SystemExit):
        run.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "hf://owner/name" in text
    assert "what looks like a path is never downloaded" in text


def test_a_dense_model_is_reported(tmp_path):
    folder = write_model(tmp_path, vocab_size=4096, hidden_act="silu", hidden_act_param=None)
    result = hybrid_run("-m", folder, "-n", "3")
    assert result.code == 0
    assert "note: this model's activation is SiLU" in result.err
    assert "100.0% of FFN neurons active" in result.err


def test_text_arrives_while_it_is_written(monkeypatch, capfd):
    """Every piece is flushed at once, so that a reader sees the story grow."""
    pieces: list[str] = []

    class Recorder(io.TextIOWrapper):
        def flush(self) -> None:
            super().flush()
            pieces.append(self.buffer.getvalue().decode())  # type: ignore[attr-defined]

    monkeypatch.setattr(sys, "stdout", Recorder(io.BytesIO(), encoding="utf-8"))
    assert run.main(["-p", "Once upon a time", "-n", "12", "--seed", "1"]) == 0
    assert len({piece for piece in pieces if piece}) >= 12


def test_multi_byte_characters_are_never_split(tmp_path):
    """Random weights write random bytes, but the printed text must still be valid UTF-8."""
    folder = write_model(tmp_path, vocab_size=4096)
    completed = subprocess.run(
        [sys.executable, "-m", "hybrid.run", "-m", folder, "-p", "héllo 用户 🙂", "-n", "200"]
        + ["--temp", "3", "--seed", "1"],
        capture_output=True,
        check=True,
    )
    assert completed.stdout.decode("utf-8").startswith("héllo 用户 🙂")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--temp", "nan"], "temperature"),
        (["--temp", "-1"], "temperature"),
        (["--temp", "hot"], "--temp"),
        (["--top-p", "-0.1"], "top_p"),
        (["--top-k", "-3"], "top_k"),
        (["-n", "0"], "max_tokens"),
        (["-n", "-5"], "max_tokens"),
        (["-t", "0"], "threads"),
        (["-t", "99999"], "threads"),
        (["-c", "0"], "context_size"),
        (["-c", "99999"], "context_size: expected an integer from 1 to 512, found 99999"),
        (["--seed", "-2"], "seed"),
        (["--min-p", "2"], "min_p"),
        (["--repeat-penalty", "0"], "repeat_penalty"),
        (["--presence-penalty", "3"], "presence_penalty"),
        (["--frequency-penalty", "nan"], "frequency_penalty"),
        (["--logit-bias", "3"], "'3': expected a token id and a number"),
        (["--logit-bias", "3:101"], "logit_bias"),
        (["--logit-bias=-1:1"], "logit_bias"),
        (["--stop", ""], "stop"),
        (["--stop", r"a\d"], r"\d in a\d is no escape; expected \n, \t,"),
        (["--stop", "a\\"], "is no escape"),
        (["--stop", r"\ud83d"], "lone surrogate"),
        (["--quant", "q3"], "--quant"),
        (["--colour", "red"], "--colour"),
        (["-p", "a", "-f", "b"], "not allowed with"),
        (["-f", "/no/such/file"], "No such file"),
        (["-f", "/"], "directory"),
        (["--chat-template", "chtml"], "'chtml' is neither a file nor one of minicpm, chatml"),
        (["--json-schema", "/no/such/file"], "--json-schema /no/such/file: No such file"),
        (["--json-schema", "/dev/null"], "--json-schema /dev/null: is not a regular file"),
        (["--grammar", "/no/such/file"], "--grammar /no/such/file: No such file"),
        (["--grammar", "/dev/null"], "--grammar /dev/null: is not a regular file"),
        (["--regex", "("], "regex: "),
        (["--regex", "a", "--grammar", "b"], "not allowed with argument"),
        (["--tools", "/no/such/file"], "--tools /no/such/file: No such file"),
        (["--tools", "/dev/null"], "--tools /dev/null: "),
        (["--raw", "--tools", "a.json"], "--raw and --tools exclude each other"),
        (["--system", "Be kind"], "--system: stories has no chat template, so it can only"),
        (["--system", ""], "--system: stories has no chat template, so it can only"),
    ],
)
def test_bad_options_give_one_clear_line_and_code_2(arguments, message):
    result = hybrid_run(*arguments)
    assert result.code == 2
    assert message in result.err.splitlines()[-1]
    assert "Traceback" not in result.err
    assert result.out == ""


@pytest.mark.parametrize("is_stdin", [False, True])
def test_a_byte_order_mark_and_the_last_line_end_of_a_prompt_file_are_left_out(tmp_path, is_stdin):
    path = tmp_path / "windows.txt"
    data = b"\xef\xbb\xbfThe cat\r\n"
    path.write_bytes(data)
    options = ("-n", "10", "--temp", "0")
    given = ("-f", "-" if is_stdin else path, *options)
    result = hybrid_run(*given, stdin=data) if is_stdin else hybrid_run(*given)
    assert result.out == hybrid_run("-p", "The cat", *options).out
    note, closing = result.err.splitlines()
    assert note == f"note: --file {given[1]}: begins with a byte-order mark, which is left out"
    assert "generated" in closing


def test_line_ends_within_a_prompt_file_stay_and_are_said(tmp_path):
    path = tmp_path / "windows.txt"
    path.write_bytes(b"The cat\r\nsat\n")
    result = hybrid_run("-f", path, "-n", "1")
    assert f"note: --file {path}: has lines that end in CR LF, which stay" in result.err
    assert result.code == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_gives_one_line_of_error():
    result = shell("{python} -m hybrid.run -n 3 > /dev/full")
    assert result.code == 1
    assert result.err == "hybrid.run: cannot write the text: No space left on device\n"


def test_closed_streams_give_no_traceback_and_do_not_mix():
    assert shell("{python} -m hybrid.run -n 3 >&-").err.startswith("[prompt")
    assert "[prompt" not in shell("{python} -m hybrid.run -n 3 2>&-").out
    assert "input is closed" in shell("{python} -m hybrid.run -f - <&-").err


def shell(command: str) -> Result:
    """Run a shell command in which {python} stands for this Python."""
    completed = subprocess.run(
        ["sh", "-c", command.format(python=sys.executable)], capture_output=True, check=False
    )
    return Result(completed.returncode, completed.stdout.decode(), completed.stderr.decode())


def test_a_prompt_file_that_is_not_text_is_refused(tmp_path):
    path = tmp_path / "binary"
    path.write_bytes(b"ok \xff\xfe")
    result = hybrid_run("-f", path)
    assert result.code == 2
    assert "not UTF-8 text (byte 3 is 0xff)" in result.err


@pytest.mark.parametrize(
    "content", [b"a\0b", b"", b"\n", b"</s><AI>", "<用户>x<AI>".encode(), "\u202e🙂".encode()]
)
def test_any_text_in_a_prompt_file_is_text(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "prompt.txt"
    path.write_bytes(content)
    result = hybrid_run("-f", path, "-n", "3")
    assert result.code == 0
    assert result.out.startswith(content.decode().removesuffix("\n"))
    (line,) = result.err.splitlines()
    assert "generated" in line


@pytest.mark.skipif(os.name != "posix", reason="arguments are bytes only on POSIX")
def test_a_prompt_that_is_not_unicode_is_refused() -> None:
    result = hybrid_run("-p", os.fsdecode(b"ab\xff"))
    assert result.code == 2
    assert "lone surrogate" in result.err
    assert result.out == ""


@pytest.mark.parametrize(
    "name", ["a b", "$(touch x)", "`id`; rm", "'\"\n", "-n", "模型", os.fsdecode(b"\xff\xfe")]
)
def test_a_model_folder_may_have_any_name(tmp_path: Path, name: str) -> None:
    folder = write_model(tmp_path / name, vocab_size=4096)
    assert hybrid_run("-m", folder, "-n", "2").code == 0
    (folder / "config.json").write_text("{")
    broken = hybrid_run("-m", folder, "-n", "2")
    assert broken.code == 1
    assert "Traceback" not in broken.err
    assert "config.json: is not JSON" in broken.err


@pytest.mark.parametrize(
    "options", [("--top-k", "9" * 20), ("-n", "9" * 20, "-c", "8"), ("--seed", "9" * 30, "-n", "2")]
)
def test_huge_numbers_are_accepted_if_they_have_a_meaning(options: tuple[str, ...]) -> None:
    assert hybrid_run("-p", "a", *options).code == 0


def test_a_prompt_beyond_the_context_gives_one_line_with_both_numbers() -> None:
    result = hybrid_run("-p", "a b c d e f", "-c", "3")
    assert result.code == 1
    assert "7 tokens, the context holds 3" in result.err
    assert result.out == ""


def break_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def remove_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def truncate_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def remove_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def change_activation(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(path.read_text().replace("fatrelu", "gelu"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_config, "config.json"),
        (remove_weights, "model.safetensors"),
        (truncate_weights, "model.safetensors"),
        (remove_tokenizer, "tokenizer.json"),
        (change_activation, "gelu"),
    ],
)
def test_broken_model_folders_give_one_clear_line_and_code_1(tmp_path, damage, message):
    folder = write_model(tmp_path, vocab_size=4096)
    damage(folder)
    result = hybrid_run("-m", folder)
    assert result.code == 1
    (line,) = result.err.splitlines()
    assert message in line
    assert result.out == ""


@pytest.mark.parametrize("name", ["./no-such-folder", "storys", "", "a/b/c"])
def test_models_that_do_not_exist_are_refused(name):
    result = hybrid_run("-m", name, "--offline")
    assert result.code in (1, 2)
    assert "Traceback" not in result.err
    assert result.err.startswith("hybrid.run: ")


def test_a_model_that_is_not_downloaded_gives_advice_offline(tmp_path):
    result = hybrid_run("-m", "MiniCPM-S-1B", "--offline", HF_HOME=str(tmp_path))
    assert result.code == 1
    assert "openbmb/MiniCPM-S-1B-sft" in result.err
    assert "-m" in result.err


def without_notes(err: bytes) -> bytes:
    return b"".join(line for line in err.splitlines(True) if not line.startswith(b"note: "))


def start_endless_run(folder: Path) -> subprocess.Popen[bytes]:
    """Start a run that writes random text for minutes. It is killed after a minute if it hangs."""
    write_model(folder, vocab_size=4096, max_position_embeddings=200000)
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"eos_token_id": 2', '"eos_token_id": null'))
    options = ["-p", "a", "--temp", "3", "-n", "190000", "-c", "200000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "hybrid.run", "-m", folder, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    watchdog = threading.Timer(60, process.kill)
    watchdog.daemon = True
    watchdog.start()
    return process


def test_ctrl_c_ends_with_a_closing_line_and_code_130(tmp_path):
    process = start_endless_run(tmp_path)
    assert process.stdout is not None
    assert len(process.stdout.read(20)) == 20
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 130
    assert without_notes(err).startswith(b"[prompt 2 tokens")


def test_a_closed_pipe_gives_no_traceback(tmp_path):
    process = start_endless_run(tmp_path)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(1)
    process.stdout.close()
    with process.stderr:  # the watchdog keeps the process object beyond this test
        assert without_notes(process.stderr.read()) == b""
    assert process.wait() == 1


def test_help_lists_the_models():
    result = hybrid_run("--help")
    assert result.code == 0
    for name in ("stories", "MiniCPM-S-1B", "ProSparse-7B", "--ctx-size", "--seed"):
        assert name in result.out


def test_the_console_script_is_the_same_program():
    script = Path(sys.executable).with_name("hybrid")
    if not script.exists():
        pytest.skip("the package is not installed beside this Python")
    command = [script, "run", "-n", "3"]
    completed = subprocess.run(command, capture_output=True, text=True, check=True)
    assert without_isa_note(completed.stderr).startswith("[prompt 1 tokens")


def test_the_bundled_model_is_in_the_package():
    assert {path.name for path in STORIES.iterdir()} >= {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
    }


def test_json_output_is_one_object_with_text_tokens_and_stats():
    result = hybrid_run("-p", "Once", "-n", "6", "--seed", "2", "--json", "--logprobs", "2")
    assert result.code == 0
    answer = json.loads(result.out)
    assert answer["finish_reason"] == "length"
    assert answer["seed"] == 2
    assert len(answer["tokens"]) == len(answer["logprobs"]) == 6
    assert [len(entry["top"]) for entry in answer["logprobs"]] == [2] * 6
    assert answer["stats"]["generated_tokens"] == 6
    plain = hybrid_run("-p", "Once", "-n", "6", "--seed", "2")
    assert plain.out == "Once" + answer["text"] + "\n"


def test_the_kv_cache_can_be_bf16():
    result = hybrid_run("-p", "Once", "-n", "6", "--temp", "0", "--json", "--kv", "bf16")
    assert (result.code, json.loads(result.out)["kv"]) == (0, "bf16")
    result = hybrid_run("-p", "Once", "--kv", "bf16", "--vram-budget", "1GiB")
    assert result.code == 2
    assert result.err.startswith("hybrid.run: kv bf16 is for the CPU")


def test_no_stream_writes_the_same_text():
    options = ("-p", "Once", "-n", "12", "--seed", "2")
    assert hybrid_run(*options, "--no-stream").out == hybrid_run(*options).out


def test_logprobs_are_printed_below_the_text():
    result = hybrid_run("-p", "Once", "-n", "3", "--temp", "0", "--logprobs", "1")
    *lines, closing = result.err.splitlines()
    assert len(lines) == 3
    assert all(re.match(r" +-?\d+\.\d{4} '", line) for line in lines)
    assert closing.startswith("[prompt")


def test_verbose_says_what_is_loaded():
    error = hybrid_run("-p", "Once", "-n", "2", "-v").err
    for part in ("6 layers of 1024 neurons", "q8 weights in memory", "threads", "temperature=0.8"):
        assert part in error


def test_verbose_names_the_owner_of_the_sampling_defaults(tmp_path):
    folder = write_model(tmp_path, vocab_size=4096)
    options = ("-m", folder, "-p", "Once", "-n", "2", "-v")
    own = "note: hybrid's own sampling defaults: SamplingParams(temperature=0.8, "
    assert own in hybrid_run(*options).err
    (folder / "generation_config.json").write_text('{"eos_token_id": 2}')
    assert own in hybrid_run(*options).err
    (folder / "generation_config.json").write_text('{"do_sample": true, "temperature": 0.3}')
    expected = "note: the model's sampling defaults: SamplingParams(temperature=0.3, "
    assert expected in hybrid_run(*options).err


def test_what_is_not_followed_is_one_note(tmp_path):
    folder = write_model(tmp_path, vocab_size=4096)
    (folder / "generation_config.json").write_text('{"num_beams": 4, "top_k": -1}')
    lines = hybrid_run("-m", folder, "-n", "2").err.splitlines()
    (line,) = [line for line in lines if "generation_config" in line]
    assert line.endswith("top_k -1 is taken as 0, all tokens; num_beams 4 is not followed")


def test_bos_may_be_chosen():
    counts = {
        option: json.loads(hybrid_run("-p", "Once", "-n", "1", "--json", *option).out)["stats"]
        for option in ((), ("--bos",), ("--no-bos",))
    }
    n_tokens = {option: stats["prompt_tokens"] for option, stats in counts.items()}
    assert n_tokens[()] == n_tokens["--bos",] == n_tokens["--no-bos",] + 1


def test_answers_have_the_form_of_a_schema_a_grammar_or_an_expression(tmp_path):
    schema, grammar = tmp_path / "schema.json", tmp_path / "grammar.gbnf"
    schema.write_text(
        '{"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 2, "maxItems": 2}'
    )
    grammar.write_text('root ::= ("x" | "y"){3}')
    options = ("-p", "Once", "-n", "60", "--json")
    text = json.loads(hybrid_run(*options, "--json-schema", schema).out)["text"]
    assert {*json.loads(text)} <= {"a", "b"}
    assert re.fullmatch(
        "[xy]{3}", json.loads(hybrid_run(*options, "--grammar", grammar).out)["text"]
    )
    assert re.fullmatch(
        "[0-9]{5}", json.loads(hybrid_run(*options, "--regex", "[0-9]{5}").out)["text"]
    )


def test_a_chat_template_and_tools_may_be_chosen(tmp_path):
    template, tools = tmp_path / "mine.jinja", tmp_path / "tools.json"
    template.write_text("{{ tools | length }} {{ messages | map(attribute='role') | join(' ') }}")
    tools.write_text('[{"name": "weather"}, {"name": "time"}]')
    options = ("-p", "Hi", "-n", "1", "--json", "--chat-template", template)
    given = json.loads(hybrid_run(*options, "--tools", tools, "--system", "Be kind").out)
    stories = Tokenizer.from_folder(STORIES, vocab_size=4096, bos_id=1)
    expected = len(stories.encode("2 system user"))
    assert given["stats"]["prompt_tokens"] == expected
    tools.write_text('{"name": "weather"}')
    result = hybrid_run(*options, "--tools", tools)
    assert result.code == 2
    assert "expected a list of JSON objects" in result.err
    template.write_text("{% for %}")
    result = hybrid_run(*options)
    assert result.code == 1
    assert f"{template}: line 1: " in result.err


def test_mapped_weights_write_the_same_text(tmp_path):
    options = ("-p", "Once", "-n", "12", "--seed", "2")
    home = {"HYBRID_HOME": str(tmp_path)}
    expected = hybrid_run(*options).out
    assert hybrid_run(*options, "--no-mmap", **home).out == expected
    assert not any(tmp_path.rglob("*.safetensors"))  # a small model is packed at each load
    for _ in range(2):
        assert hybrid_run(*options, "--mmap", **home).out == expected
    assert len(list(tmp_path.rglob("*.safetensors"))) == 1


@pytest.mark.parametrize("option", [["-t", "1.5"], ["--quant", "q5"], ["--nonsense"]])
def test_a_wrong_option_gives_one_line_of_error(option):
    result = hybrid_run("-p", "a", *option)
    assert result.code == 2
    assert len(result.err.splitlines()) == 1
    assert "--help" in result.err


def test_names_cannot_write_to_the_terminal(tmp_path):
    folder = write_model(tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "x\x1b[2Jy")
    result = hybrid_run("-m", folder, "-p", "a")
    assert result.code == 1
    assert "\x1b" not in result.err
    assert "x\\x1b[2Jy" in result.err


def test_an_endless_prompt_file_is_refused_and_not_read():
    result = hybrid_run("-f", "/dev/zero")
    assert result.code == 2
    assert "not a regular file but a device" in result.err


def test_a_huge_prompt_file_is_refused_and_not_read(tmp_path):
    with (tmp_path / "prompt").open("wb") as file:
        file.truncate(1 << 40)
    result = hybrid_run("-f", tmp_path / "prompt")
    assert result.code == 2
    assert "at most 4,194,304" in result.err


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_as_prompt_file_is_refused_with_the_way_to_read_it(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    result = hybrid_run("-f", tmp_path / "pipe")
    assert result.code == 2
    assert "a pipe; --file - reads a pipe" in result.err


def test_a_stop_string_that_is_not_unicode_is_refused():
    result = hybrid_run("-p", "a", "--stop", os.fsdecode(b"\xff"))
    assert result.code == 2
    assert "lone surrogate" in result.err
