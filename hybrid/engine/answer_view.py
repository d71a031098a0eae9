"""AnswerView: what the consumer of an answer's text may read and do, whoever computes it."""

from __future__ import annotations

from hybrid.engine.answer import Answer, FinishReason, TokenLogprobs
from hybrid.engine.stats import GenerationStats
from hybrid.text.tool_calls import ToolCall, ToolCallParser


class AnswerView:
    """An answer that is being generated, or has been."""

    prompt: list[int]  # token ids
    tokens: list[int]  # generated ids, without the end-of-sequence token
    logprobs: list[TokenLogprobs] | None  # None unless requested
    # The same for the prompt. Nothing predicts the first token, so its entry is None.
    prompt_logprobs: list[TokenLogprobs | None] | None
    # None unless requested. For each pass of decode the share of the neurons that fired, by layer;
    # in a batching loop over all tokens of the pass, those of other answers, too.
    layer_activity: list[tuple[float, ...]] | None
    limit_is_models: bool  # whether generation_config.json limits the answer, not the caller
    stats: GenerationStats
    seed: int  # the same seed repeats this generation

    def __init__(self, answer: Answer) -> None:
        self.prompt, self.tokens, self.logprobs = answer.prompt, answer.tokens, answer.logprobs
        self.prompt_logprobs = answer.prompt_logprobs
        self.layer_activity = answer.layer_activity
        self.limit_is_models = answer.request.limits.is_models
        self.stats, self.seed = answer.stats, answer.seed
        self._answer = answer

    @property
    def text(self) -> str:
        """The pieces so far, joined."""
        return self._answer.text

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why the answer ended; None before it does."""
        return self._answer.finish_reason

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        """The calls in the text so far of functions that were given as `tools`.

        They count even if their end is missing. `text` is as the model wrote it, with them.
        """
        parser = self.tool_parser()
        if parser is None:
            return ()
        return tuple(parser.finish(self.text)[1])

    def tool_parser(self) -> ToolCallParser | None:
        """Return what separates the pieces of text into content and calls; None without tools."""
        format = self._answer.request.tool_format
        return None if format is None else ToolCallParser(format)

    @property
    def stop_string(self) -> str | None:
        """Which of the `stop` strings ended the answer, if one did."""
        return self._answer.stop_string

    @property
    def context_is_full(self) -> bool:
        """Whether a full context ended the answer."""
        return self._answer.context_is_full

    @property
    def sequence(self) -> list[int]:
        """Prompt and answer as the model sees them: without what context shifts dropped."""
        return self._answer.sequence

    @property
    def notices(self) -> tuple[str, ...]:
        """Lines that a user should see after the text: what context shifts dropped."""
        n, n_kept = self.stats.n_shifts, self._answer.request.n_kept
        times = "once" if n == 1 else f"{n} times"
        kept = "its first token stayed" if n_kept == 1 else f"its first {n_kept} tokens stayed"
        half = "the oldest half of the others was dropped"
        return (f"the context was full {times}: {kept}, and {half}",) if n else ()

    def cancel(self) -> None:
        """End the generation before its next token, or its wait for the check of the weights.

        Any thread may call this.
        """
        self._answer.cancel()
