"""`hybrid.run -i`: a chat in the terminal, or a text that the user and the model write together.

With a chat template each line is a message. Without one each line continues the text so far, and
the model continues from there. In both cases the KV cache is kept, so a message costs only its own
tokens.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NamedTuple

import psutil

from hybrid import (
    ChatMessage,
    ContextOverflow,
    Engine,
    Generation,
    GenerationOptions,
    InvalidOption,
    Progress,
)
from hybrid.cli.kept_session import KeptSession

HELP = """\
/reset  start again         /stats  show tokens, speeds and memory
/quit   leave (or Ctrl-D)   Ctrl-C  stop the answer"""


class Display(NamedTuple):
    """How answers are shown."""

    describe: Callable[[Engine, Generation], str]  # one line of figures
    streams: bool = True  # piece by piece, not at once
    is_verbose: bool = False  # the figures after each answer
    progress: Progress | None = None  # of context shifts


class Conversation:
    """The messages so far, and the session that holds their keys and values."""

    def __init__(
        self,
        kept: KeptSession,
        options: GenerationOptions,
        *,
        system: str | None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        is_chat: bool,
        display: Display,
    ) -> None:
        self.kept, self.engine, self.session = kept, kept.engine, kept.session
        self.options = options
        self.is_chat, self.display, self.tools = is_chat, display, tools
        self.opening: list[ChatMessage] = []
        if system is not None:
            self.opening = [{"role": "system", "content": system}]
        self.messages = list(self.opening)
        self.text_ids: list[int] = []  # without a chat: the text so far
        self.last: Generation | None = None

    def run(self, first: str = "") -> None:
        """Answer `first`, if it is not empty, then read lines until /quit or the input's end."""
        with suppress(ImportError):
            import readline  # noqa: F401 - arrow keys and history in input()
        if sys.stdin is None:
            raise InvalidOption("-i: standard input is closed")
        is_terminal = sys.stdin.isatty()
        if is_terminal:
            kind = "Chat" if self.is_chat else "Write a text together: you begin"
            print(f"{kind}. /help shows the commands.", file=sys.stderr)
        if first:
            if not self.is_chat:
                print(first, end="", flush=True)  # prompt and continuation are one text
            self.answer(first)
        while True:
            try:
                line = read_line("> " if is_terminal else "")
            except EOFError:
                return
            except KeyboardInterrupt:
                print("\n(/quit or Ctrl-D leaves)", file=sys.stderr)
                continue
            if line.strip() == "/quit":
                return
            self.obey(line)

    def obey(self, line: str) -> None:
        """Handle one line of input: a command or a message."""
        command = line.strip()
        if not command:
            return
        if command == "/reset":
            self.session.reset()
            self.messages, self.text_ids, self.last = list(self.opening), [], None
            print("(started again)", file=sys.stderr)
        elif command == "/stats":
            print(self.stats(), file=sys.stderr)
        elif command == "/help":
            print(HELP, file=sys.stderr)
        elif command.startswith("/") and " " not in command and "/" not in command[1:]:
            print(f"({command} is not a command)\n{HELP}", file=sys.stderr)
        else:
            self.answer(line)

    def answer(self, line: str) -> None:
        try:
            generation = self.begin(line)
        except ContextOverflow as error:
            print(f"({error}; /reset starts again)", file=sys.stderr)
            return
        except InvalidOption as error:  # such as a line that is not UTF-8
            print(f"({error})", file=sys.stderr)
            return
        self.last = generation
        if self.display.progress is not None:
            generation.progress = self.display.progress
        with interrupts(generation):
            for piece in generation:
                if self.display.streams:
                    print(piece, end="", flush=True)
        print("" if self.display.streams else generation.text, flush=True)
        if self.is_chat:
            self.messages += [
                {"role": "user", "content": line},
                {"role": "assistant", "content": generation.text},
            ]
        else:
            self.text_ids = generation.sequence
        for notice in generation.notices:
            print(f"({notice})", file=sys.stderr)
        if generation.finish_reason == "cancelled":
            print("(stopped)", file=sys.stderr)
        elif generation.context_is_full:
            print("(stopped: the context is full; /reset starts again)", file=sys.stderr)
        elif generation.finish_reason == "length":
            n = len(generation.tokens)
            own = f"{n} tokens, the model's own limit; -n changes it"
            limit = own if generation.limit_is_models else f"--max-tokens {n}"
            print(f"(stopped after {limit})", file=sys.stderr)
        self.kept.tell(generation)
        if self.display.is_verbose:
            print(self.display.describe(self.engine, generation), file=sys.stderr)

    def begin(self, line: str) -> Generation:
        engine, tokenizer = self.engine, self.engine.tokenizer
        if self.is_chat:
            message: ChatMessage = {"role": "user", "content": line}
            return engine.chat(
                [*self.messages, message],
                tools=self.tools,
                session=self.session,
                options=self.options,
            )
        ids = tokenizer.encode(line)
        if self.text_ids:
            ids = self.text_ids + tokenizer.encode_continuation(" " + line)
        return engine.generate(ids, session=self.session, options=self.options)

    def stats(self) -> str:
        totals, session = self.engine.stats, self.session
        lines = [
            f"context: {session.position} of {session.n_context} tokens",
            f"so far: {totals.n_generations} answers, {totals.generated_tokens} tokens in "
            f"{totals.decode_s:.1f} s; prompts {totals.prompt_tokens} tokens, "
            f"{totals.cached_tokens} of them cached",
            f"memory: {psutil.Process().memory_info().rss / 1e6:.0f} MB, of which weights "
            f"{totals.weight_bytes / 1e6:.0f} MB",
        ]
        if self.last is not None:
            lines.append("last: " + self.display.describe(self.engine, self.last))
        return "\n".join(lines)


def read_line(prompt: str) -> str:
    """Like `input`, but the prompt is never written into a file that receives the text."""
    if prompt and not sys.stdout.isatty():
        print(prompt, end="", file=sys.stderr, flush=True)
        prompt = ""
    return input(prompt)


@contextmanager
def interrupts(generation: Generation) -> Iterator[None]:
    """Make Ctrl-C end the answer between two tokens, and nothing else.

    On another thread than the main one this does nothing, since signals belong to the main thread.
    """
    before = signal.getsignal(signal.SIGINT)
    # A handler that was not set from Python is None, and could not be restored.
    if threading.current_thread() is not threading.main_thread() or before is None:
        yield
        return

    def cancel(signal_number: int, frame: FrameType | None) -> None:
        generation.cancel()

    signal.signal(signal.SIGINT, cancel)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
