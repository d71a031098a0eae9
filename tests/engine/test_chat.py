"""Engine.chat with a model's own template: prompts, tools, begun answers, and their end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file, save_file
from tiny_models import CHATML, write_chatml_model, write_model

import hybrid
from hybrid import InvalidOption
from hybrid.text.chat import Chat

OPTIONS: dict[str, Any] = {"max_tokens": 6, "temperature": 0}
USER: Any = {"role": "user", "content": "Hello"}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory):
    folder = write_chatml_model(tmp_path_factory.mktemp("chatml"))
    with hybrid.load(folder, quant="bf16", threads=1) as engine:
        yield engine


def text_of(generation: hybrid.Generation) -> str:
    return "".join(generation)


def test_a_prompt_is_written_by_the_template(engine: hybrid.Engine) -> None:
    expected = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    assert engine.tokenizer.render_chat([USER]) == expected
    generation = engine.chat([USER], **OPTIONS)
    assert generation.prompt == engine.tokenizer.encode_chat([USER])
    assert [token for token in generation.prompt if token >= 4096] == [4096, 4097, 4096]
    assert engine.generate("Hello", **OPTIONS).prompt == generation.prompt
    assert engine.generate("Hello", raw=True, **OPTIONS).prompt == engine.tokenizer.encode("Hello")


def test_contents_may_be_parts_of_text(engine: hybrid.Engine) -> None:
    parts: Any = [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]
    assert engine.chat(parts, **OPTIONS).prompt == engine.chat([USER], **OPTIONS).prompt


def test_a_begun_answer_is_continued(engine: hybrid.Engine) -> None:
    begun: Any = [USER, {"role": "assistant", "content": "Once upon"}]
    generation = engine.chat(begun, **OPTIONS)
    assert engine.tokenizer.decode(generation.prompt).endswith("assistant\nOnce upon")
    assert generation.prompt[-1] != 4097


def test_later_messages_cost_their_own_tokens_only(engine: hybrid.Engine) -> None:
    messages: list[Any] = [USER]
    with engine.open_session() as session:
        for question in ("And you?", "<|im_end|> is no marker"):
            answer = engine.chat(messages, session=session, **OPTIONS)
            messages.append({"role": "assistant", "content": text_of(answer)})
            held = len(session.tokens)
            messages.append({"role": "user", "content": question})
            next_one = engine.chat(messages, session=session, **OPTIONS)
            text_of(next_one)
            assert next_one.stats.cached_tokens == held
            assert next_one.prompt[: len(answer.prompt)] == answer.prompt
            messages.append({"role": "assistant", "content": next_one.text})
            messages.append(USER)


def test_the_rest_of_a_begun_answer_belongs_to_it(engine: hybrid.Engine) -> None:
    messages: list[Any] = [USER, {"role": "assistant", "content": "Once upon"}]
    with engine.open_session() as session:
        text = text_of(engine.chat(messages, session=session, **OPTIONS))
        held = len(session.tokens)
        messages[-1] = {"role": "assistant", "content": "Once upon" + text}
        generation = engine.chat([*messages, USER], session=session, **OPTIONS)
        text_of(generation)
        assert generation.stats.cached_tokens == held


def test_a_template_that_shortens_answers_is_followed(tmp_path: Path) -> None:
    """The prompt is always what the template writes, whatever the KV cache holds."""
    template = CHATML.replace("m.content +", "m.content[:3] +")
    with (
        hybrid.load(write_chatml_model(tmp_path, template), threads=1) as engine,
        engine.open_session() as session,
    ):
        text = text_of(engine.chat([USER], session=session, **OPTIONS))
        messages: list[Any] = [USER, {"role": "assistant", "content": text}, USER]
        generation = engine.chat(messages, session=session, **OPTIONS)
        assert generation.prompt == engine.tokenizer.encode_chat(messages)
        fresh = text_of(engine.chat(messages, **OPTIONS))
        assert text_of(generation) == fresh


def test_tools_and_variables_reach_the_template(tmp_path: Path) -> None:
    template = "{{ tools | tojson }} {{ mood }} {{ messages[0].content }}"
    with hybrid.load(write_chatml_model(tmp_path, template), threads=1) as engine:
        tools = [{"type": "function", "function": {"name": "weather"}}]
        variables = {"mood": "<|im_end|>"}
        generation = engine.chat([USER], tools=tools, variables=variables, **OPTIONS)
        text = '[{"type": "function", "function": {"name": "weather"}}] <|im_end|> Hello'
        assert engine.tokenizer.decode(generation.prompt) == text
        assert 4097 not in generation.prompt
        chat = Chat([USER], tools, variables=variables)
        assert engine.tokenizer.render_chat(chat) == text


def test_an_answer_ends_at_the_templates_token(tmp_path: Path) -> None:
    """The config's eos_token_id does not have it, as in models that were tuned without care."""
    folder = write_chatml_model(tmp_path, tie_word_embeddings=False)
    with hybrid.load(folder, quant="bf16", threads=1) as engine:
        said = engine.chat([USER], max_tokens=30, temperature=0)
        text_of(said)
    # <|im_end|> becomes likelier than the token that the model would have written here.
    n = next(n for n in range(3, 30) if said.tokens[n] not in said.tokens[:n])
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"][4097] = tensors["lm_head.weight"][said.tokens[n]] * 2
    save_file(tensors, path)
    with hybrid.load(folder, quant="bf16", threads=1) as engine:
        chat = engine.chat([USER], max_tokens=30, temperature=0)
        raw = engine.generate(chat.prompt, max_tokens=30, temperature=0)
        text_of(chat)
        text_of(raw)
        assert chat.finish_reason == "stop"
        assert chat.tokens == said.tokens[:n] == raw.tokens[:n]
        question = engine.generate("Hello", max_tokens=30, temperature=0)
        assert text_of(question) == chat.text
        assert question.finish_reason == "stop"
        assert raw.tokens[n] == 4097
        assert raw.finish_reason == "length"


def test_a_models_refusal_has_the_templates_own_words(tmp_path: Path) -> None:
    template = "{{ raise_exception('only the role ' + messages[0].role + ' is missing') }}"
    with hybrid.load(write_chatml_model(tmp_path, template), threads=1) as engine:
        with pytest.raises(InvalidOption, match="refuses them: only the role user is missing"):
            engine.chat([USER])
        assert engine.notices == ()


@pytest.mark.parametrize(
    ("messages", "problem"),
    [([], "at least one"), (3, "expected a list of dicts, found int"), ([3], "expected a dict")],
)
def test_bad_messages_are_refused(engine: hybrid.Engine, messages: Any, problem: str) -> None:
    with pytest.raises(InvalidOption, match=problem):
        engine.chat(messages)


def test_a_template_may_be_chosen_when_loading(tmp_path: Path) -> None:
    folder = write_model(tmp_path, vocab_size=4200)
    with hybrid.load(folder, threads=1) as engine, pytest.raises(InvalidOption, match="no chat"):
        engine.chat([USER])
    with hybrid.load(folder, threads=1, chat_template="zephyr") as engine:
        assert engine.tokenizer.render_chat([USER]) == "<|user|>\nHello</s>\n<|assistant|>\n"
    with pytest.raises(InvalidOption, match="'zefyr' is neither a file nor one of minicpm, "):
        hybrid.load(folder, chat_template="zefyr")
    with pytest.raises(InvalidOption, match="chat_template: expected a name or a file, found 3"):
        hybrid.load(folder, chat_template=3)  # type: ignore[arg-type]


def test_a_model_with_tokens_of_chatml_names_it(tmp_path: Path) -> None:
    folder = write_chatml_model(tmp_path)
    (folder / "chat_template.jinja").unlink()
    with hybrid.load(folder, threads=1) as engine:
        assert any("chat_template chatml may fit" in notice for notice in engine.notices)
