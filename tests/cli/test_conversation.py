"""`hybrid.run -i` handles messages, commands, Ctrl-C and a context that fills up."""

from __future__ import annotations

import builtins
import io
import signal
import subprocess
import sys
from collections.abc import Iterable
from typing import Any

import pytest
from tiny_models import write_chat_model

import hybrid
from hybrid.cli.conversation import Conversation, Display
from hybrid.cli.kept_session import KeptSession

OPTIONS: dict[str, Any] = {"max_tokens": 6, "temperature": 0}


@pytest.fixture(scope="module")
def chat_engine(tmp_path_factory: pytest.TempPathFactory):
    folder = write_chat_model(tmp_path_factory.mktemp("chat"))
    with hybrid.load(folder, quant="bf16", context_size=120) as engine:
        yield engine


@pytest.fixture(scope="module")
def engine():
    with hybrid.load("stories") as engine:
        yield engine


def converse(
    monkeypatch: pytest.MonkeyPatch,
    engine: hybrid.Engine,
    lines: Iterable[str | type[BaseException]],
    *,
    is_chat: bool = True,
    system: str | None = None,
    first: str = "",
    **options: Any,
) -> Conversation:
    """Run a conversation whose input is `lines`, then the end of the input.

    An exception class in `lines` is raised instead of returning a line.
    """
    inputs = iter(lines)

    def read(prompt: str = "") -> str:
        line = next(inputs, EOFError)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr(builtins, "input", read)
    conversation = Conversation(
        KeptSession(engine),
        hybrid.GenerationOptions(**OPTIONS | options),
        system=system,
        is_chat=is_chat,
        display=Display(lambda engine, generation: "described"),
    )
    conversation.run(first)
    assert next(inputs, None) is None  # all lines were read
    return conversation


def test_a_message_costs_its_own_tokens_only(monkeypatch, chat_engine):
    before = chat_engine.stats
    questions = ["Hello there", "How are you?", "Bye"]
    conversation = converse(monkeypatch, chat_engine, questions, system="Be kind.")
    after, tokenizer = chat_engine.stats, chat_engine.tokenizer
    n_prefilled = (after.prompt_tokens - before.prompt_tokens) - (
        after.cached_tokens - before.cached_tokens
    )
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": questions[0]},
    ]
    said = conversation.messages
    following = [tokenizer.encode_after_answer(said[: n + 2], n) for n in (2, 4)]
    # Each later message also prefills the last token of the answer before it, which was never run.
    assert n_prefilled == len(tokenizer.encode_chat(messages)) + sum(len(t) + 1 for t in following)
    assert [m["role"] for m in conversation.messages] == ["system"] + ["user", "assistant"] * 3


def test_without_chat_user_and_model_write_one_text(monkeypatch, capsys, engine):
    conversation = converse(monkeypatch, engine, ["Once upon a time", "The dog"], is_chat=False)
    ids = conversation.text_ids
    text = engine.tokenizer.decode(ids)
    assert text.startswith("Once upon a time")
    assert " The dog" in text
    n_message_tokens = len(engine.tokenizer.encode("Once upon a time")) + len(
        engine.tokenizer.encode_continuation(" The dog")
    )
    assert len(ids) == n_message_tokens + 2 * OPTIONS["max_tokens"]
    assert capsys.readouterr().out.strip()


def test_the_prompt_of_the_command_line_is_the_first_message(monkeypatch, chat_engine):
    conversation = converse(monkeypatch, chat_engine, ["And?"], first="Hello")
    assert [m["content"] for m in conversation.messages[::2]] == ["Hello", "And?"]


def test_commands_are_obeyed(monkeypatch, capsys, chat_engine):
    lines = ["Hello", "/stats", "/reset", "/stats", "/what", "/help", "  ", "/quit"]
    conversation = converse(monkeypatch, chat_engine, lines, system="Be kind.")
    error = capsys.readouterr().err
    assert "last: described" in error
    assert "context: 0 of 120 tokens" in error
    assert "/what is not a command" in error
    assert error.count("/reset  start again") == 2
    assert conversation.messages == [{"role": "system", "content": "Be kind."}]


def test_a_message_that_begins_with_a_path_is_not_a_command(monkeypatch, chat_engine):
    conversation = converse(monkeypatch, chat_engine, ["/usr/bin is a folder"])
    assert conversation.messages[0]["content"] == "/usr/bin is a folder"


def test_ctrl_c_at_the_prompt_does_not_leave(monkeypatch, capsys, chat_engine):
    conversation = converse(monkeypatch, chat_engine, [KeyboardInterrupt, "Hello"])
    assert len(conversation.messages) == 2
    assert "/quit or Ctrl-D leaves" in capsys.readouterr().err


class InterruptingStream(io.StringIO):
    """Standard output that simulates Ctrl-C at its fourth write."""

    n_writes = 0

    def write(self, text: str) -> int:
        self.n_writes += 1
        if self.n_writes == 4:
            signal.raise_signal(signal.SIGINT)
        return super().write(text)


def test_ctrl_c_stops_the_answer_and_the_conversation_goes_on(monkeypatch, capsys, engine):
    stream = InterruptingStream()
    monkeypatch.setattr(sys, "stdout", stream)
    before = signal.getsignal(signal.SIGINT)
    conversation = converse(
        monkeypatch, engine, ["Once upon a time", "The end"], is_chat=False, max_tokens=200
    )
    assert signal.getsignal(signal.SIGINT) is before
    assert "(stopped)" in capsys.readouterr().err
    assert conversation.last is not None
    assert conversation.last.finish_reason in ("stop", "length")
    first = engine.tokenizer.decode(conversation.last.prompt)
    assert len(conversation.last.prompt) < 40, "the first answer went on after Ctrl-C"
    assert first.endswith("The end")


def test_a_full_context_is_reported_and_reset_empties_it(monkeypatch, capsys, chat_engine):
    lines = ["word " * 40, "again " * 30, "/reset", "Hello"]
    conversation = converse(monkeypatch, chat_engine, lines, max_tokens=100)
    error = capsys.readouterr().err
    assert "the context is full; /reset starts again" in error
    assert "the context holds 120" in error
    assert [m["content"] for m in conversation.messages[::2]] == ["Hello"]


def run(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "hybrid.run", *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        check=False,
    )


def test_lines_may_come_from_a_pipe():
    result = run("-i", "-n", "5", "--seed", "1", stdin="A cat\n/stats\nA dog\n")
    assert result.returncode == 0
    assert len(result.stdout.splitlines()) >= 2
    assert "> " not in result.stdout
    assert "(stopped after --max-tokens 5)" in result.stderr
    assert "context: " in result.stderr


@pytest.mark.parametrize("option", [["--chat"], ["--system", "Be kind.", "-p", "Hello"]])
def test_a_model_without_a_template_cannot_chat(option):
    result = run(*option)
    assert result.returncode == 2
    assert "no chat template" in result.stderr
    assert option[0] in result.stderr


@pytest.mark.parametrize(
    "options",
    [["--raw", "--chat"], ["--raw", "--system", "x"], ["--json", "-i"], ["-i", "--logprobs", "0"]],
)
def test_options_that_exclude_each_other_are_refused(options):
    result = run(*options)
    assert result.returncode == 2
    assert "exclude each other" in result.stderr


def test_a_line_that_is_not_text_does_not_end_the_conversation(monkeypatch, capsys, chat_engine):
    conversation = converse(monkeypatch, chat_engine, ["caf\udce9", "Hello"])
    assert "lone surrogate" in capsys.readouterr().err
    assert [m["content"] for m in conversation.messages[::2]] == ["Hello"]


def test_options_are_refused_before_a_model_is_looked_for():
    for options in (["--temp", "-1"], ["-t", "0"], ["--logprobs", "-1"], ["--stop", ""]):
        result = run("-m", "./no such model", "-i", *options)
        assert result.returncode == 2, options
        assert "no such model" not in result.stderr
