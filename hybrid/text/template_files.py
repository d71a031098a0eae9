"""Which chat template a model uses: the user's choice, one of its own files, or a built-in one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from hybrid.checkpoint.json_file import read_text
from hybrid.checkpoint.name import model_name
from hybrid.errors import InvalidCheckpoint, InvalidOption
from hybrid.text.built_in_templates import BUILT_IN
from hybrid.text.chat_template import ChatTemplate
from hybrid.text.vocabulary import Vocabulary

MAX_BYTES = 4 << 20  # of a template's file
_ALONE = "chat_template.jinja"  # newer exports put templates there
NAMED = "additional_chat_templates"  # a folder of templates with names, such as tool_use
MAX_NAMED = 20
_RAW = "text is completed raw, without a template"


class Templates(NamedTuple):
    """The templates of a model. None: it has none."""

    default: ChatTemplate | None
    with_tools: ChatTemplate | None = None  # for conversations with tools, if that is another one
    notices: tuple[str, ...] = ()  # one line each
    own: tuple[str, ...] = ()  # names of the model's own


def choose_templates(
    folder: Path,
    settings: Mapping[str, Any],
    vocabulary: Vocabulary,
    tokens: Mapping[str, str],
    wish: str | Path | None,
) -> Templates:
    """Return a model's templates.

    `wish` names one of the model's own, a built-in one or a file; None takes the model's own, as
    transformers does. `settings` is the content of tokenizer_config.json, `tokens` are what
    templates may name. Raises InvalidOption for a wish that is none of them, and InvalidCheckpoint
    if a file or the wished template is broken.
    """

    def compiled(source: str, name: str) -> ChatTemplate:
        return ChatTemplate(source, tokens, vocabulary.special, vocabulary.ordinary, name)

    own = own_templates(folder, settings)
    chosen = _choose(folder, vocabulary, own, wish, compiled)
    return chosen._replace(own=tuple(sorted(own)))


def _choose(
    folder: Path,
    vocabulary: Vocabulary,
    own: Mapping[str, str],
    wish: str | Path | None,
    compiled: Callable[[str, str], ChatTemplate],
) -> Templates:
    if wish is not None:
        source, name, needed = _wished(wish, own)
        missing = [token for token in needed if vocabulary.token_id(token) is None]
        notices = [
            f"{model_name(folder)}: the vocabulary has no token {token!r}, so the model was hardly "
            f"trained on the chat template {name}"
            for token in missing[:1]
        ]
        return Templates(compiled(source, name), notices=tuple(notices))
    if not own:
        return _without_own(folder, vocabulary, compiled)
    if "default" not in own:
        names = ", ".join(sorted(own))
        return Templates(
            None, None, (f"{model_name(folder)}: chat_template names one of {names}; {_RAW}",)
        )
    try:
        default = compiled(own["default"], "the model's chat template")
        if "tool_use" not in own:
            return Templates(default)
        return Templates(default, compiled(own["tool_use"], "the model's chat template tool_use"))
    except InvalidCheckpoint as error:
        return Templates(None, None, (f"{model_name(folder)}: {error}; {_RAW}",))


def _wished(wish: str | Path, own: Mapping[str, str]) -> tuple[str, str, tuple[str, ...]]:
    """Return a template's source, its name and the tokens that it needs. Raises InvalidOption."""
    if isinstance(wish, str) and wish in own:
        return own[wish], f"chat template {wish}", ()
    if isinstance(wish, str) and wish in BUILT_IN:
        return BUILT_IN[wish].source, wish, BUILT_IN[wish].tokens
    path = Path(wish)
    if not path.exists():
        names = ", ".join([*sorted(own), *BUILT_IN])
        raise InvalidOption(f"chat_template: {str(wish)!r} is neither a file nor one of {names}")
    return read_text(path, MAX_BYTES), str(path), ()


def _without_own(
    folder: Path, vocabulary: Vocabulary, compiled: Callable[[str, str], ChatTemplate]
) -> Templates:
    """Choose for a model that ships no template, or say which one may fit."""
    for name, template in BUILT_IN.items():
        if template.tokens and None not in map(vocabulary.token_id, template.tokens):
            notice = (
                f"{model_name(folder)}: it comes without a chat template; by its special tokens, "
                f"chat_template {name} may fit; {_RAW}"
            )
            return Templates(None, notices=(notice,))
    # MiniCPM's first exports have no template. Only their vocabularies have its word for user.
    if not vocabulary.has_piece("用户"):
        return Templates(None)
    return Templates(compiled(BUILT_IN["minicpm"].source, "minicpm"))


def own_templates(folder: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """Return the sources of the model's templates by name. Raises InvalidCheckpoint."""
    files = {"default": folder / _ALONE} if (folder / _ALONE).exists() else {}
    if (folder / NAMED).is_dir():
        paths = sorted((folder / NAMED).glob("*.jinja"))[:MAX_NAMED]
        files |= {path.stem: path for path in paths}
    if files:
        return {name: read_text(path, MAX_BYTES) for name, path in files.items()}
    template = settings.get("chat_template")
    if template is None:
        return {}
    if isinstance(template, str):
        return {"default": template}
    if isinstance(template, list):
        entries = [entry for entry in template if isinstance(entry, dict)]
        named = {str(entry.get("name")): entry.get("template") for entry in entries}
        sources = {name: source for name, source in named.items() if isinstance(source, str)}
        if len(sources) == len(template):
            return sources
    raise InvalidCheckpoint(
        f"{folder / 'tokenizer_config.json'}: chat_template: expected a string, or a list of names "
        f"and templates, found {template!r:.60}"
    )
