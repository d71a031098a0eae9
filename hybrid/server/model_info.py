"""What a server says of its model, and what it does with texts without generating any."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from hybrid import __version__
from hybrid.engine.options import checked_ids
from hybrid.server.api_error import wrong
from hybrid.server.fields import Fields
from hybrid.server.openai.tools import read_conversation
from hybrid.server.service import Model
from hybrid.text.chat import Chat

MAX_TEXT = 1 << 20  # characters that are encoded at once
MAX_PIECES = 50_000
MAX_IDS = 1 << 20  # that are decoded at once


def list_models(model: Model) -> dict[str, Any]:
    engine = model.engine
    entry = {
        "id": engine.name,
        "object": "model",
        "created": 0,
        "owned_by": "hybrid",
        "max_model_len": engine.n_context,
    }
    return {"object": "list", "data": [entry]}


def props(model: Model) -> dict[str, Any]:
    engine, loop = model
    config, tokenizer = engine.config, engine.tokenizer
    return {
        "model": engine.name,
        "build_info": f"hybrid {__version__}",
        "total_slots": loop.stats.n_sequences,
        "default_generation_settings": {
            "n_ctx": engine.n_context,
            "params": asdict(engine.default_sampling),
        },
        "has_chat_template": tokenizer.has_chat_template,
        "chat_template": tokenizer.summary.template,
        "quant": engine.quant,
        "kv": engine.kv,
        "threads": engine.n_threads,
        "device": engine.device_name,
        "is_synthetic": engine.is_synthetic,
        "n_layers": config.n_layers,
        "n_neurons": config.n_neurons,
        "is_sparse": config.is_sparse,
        "vocab_size": config.vocab_size,
        "notices": [*engine.notices, *loop.notices],
    }


def slots(model: Model) -> list[dict[str, Any]]:
    """Return what each sequence does, and nothing of any text."""
    engine, loop = model
    running = loop.running
    found = []
    for index in range(max(loop.stats.n_sequences, len(running))):
        slot = {"id": index, "n_ctx": engine.n_context, "is_processing": index < len(running)}
        if index < len(running):
            stats = running[index].stats
            slot |= {
                "n_prompt_tokens": stats.prompt_tokens,
                "n_prompt_tokens_cache": stats.cached_tokens,
                "n_prompt_tokens_processed": stats.prefilled_tokens,
                "n_decoded": stats.generated_tokens,
            }
        found.append(slot)
    return found


def tokenize(model: Model, fields: Fields) -> dict[str, Any]:
    """Return the ids of a text; with `add_special` behind BOS, if the model's texts have it."""
    tokenizer = model.engine.tokenizer
    text = fields.text("content")
    if text is None:
        raise fields.needs("content")
    if len(text) > MAX_TEXT:
        raise wrong("content", f"at most {MAX_TEXT:,} characters", len(text))
    ids = tokenizer.encode(text)
    if not fields.boolean("add_special"):
        ids = ids[len(tokenizer.bos) :]
    if not fields.boolean("with_pieces"):
        return {"tokens": ids}
    if len(ids) > MAX_PIECES:
        raise wrong("content", f"at most {MAX_PIECES:,} tokens if with_pieces is true", len(ids))
    pieces: list[dict[str, Any]] = []
    for token in ids:
        data = tokenizer.token_bytes(token)
        try:
            pieces.append({"id": token, "piece": data.decode()})
        except UnicodeDecodeError:
            pieces.append({"id": token, "piece": list(data)})
    return {"tokens": pieces}


def detokenize(model: Model, fields: Fields) -> dict[str, Any]:
    engine = model.engine
    ids = checked_ids(fields.needed_items("tokens", MAX_IDS), engine.config.vocab_size)
    return {"content": engine.tokenizer.decode(ids)}


def apply_template(model: Model, fields: Fields) -> dict[str, Any]:
    tokenizer = model.engine.tokenizer
    chat = tokenizer.with_tools(Chat(**read_conversation(fields)))
    return {"prompt": tokenizer.render_chat(chat)}
