"""HybridLM: a model that lm-evaluation-harness runs by the name `hybrid`.

Importing this module registers the name. The harness (0.4.13) imports no models of other packages,
so `python -m hybrid.lm_eval` imports this module and then starts the harness.
"""

from __future__ import annotations

import logging
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from tqdm import tqdm

from hybrid.engine.options import GenerationOptions, LoadKeywords
from hybrid.errors import InvalidOption, MissingPackage
from hybrid.evaluation.likelihood import Scorer, prefix_token
from hybrid.hub.loading import load

try:
    from lm_eval import utils
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
except ImportError as error:
    raise MissingPackage(
        f"this needs lm-evaluation-harness ({error}): pip install 'hybrid-inference[eval]'"
    ) from error

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from typing_extensions import Unpack

_LOG = logging.getLogger("lm_eval.models.hybrid")  # the harness shows what is below "lm_eval"

_DEFAULT_DEVICE = "cuda:0"  # of the harness
_Tokens = list[int]
_Pair = tuple[tuple[str, str] | None, _Tokens, _Tokens]  # texts or None, context, continuation
_NEUTRAL = {"num_beams": 1}  # values of other engines' options that change nothing


@register_model("hybrid")
class HybridLM(TemplateLM):
    """A hybrid engine as the harness sees it: one sequence at a time, whatever the batch size.

    Contexts that are too long lose tokens at their start, and a warning says so, as in the
    harness's own models. A text's tokens are ordinary ones, even if it contains the name of a
    special token. The harness's chat templates are not supported.
    """

    def __init__(
        self,
        pretrained: str = "stories",
        *,
        batch_size: object = None,
        max_batch_size: object = None,
        **options: Unpack[LoadKeywords],
    ) -> None:
        """Load the model that `pretrained` names, with the options of `hybrid.load`.

        The harness passes a device even if the user names none. Its default leaves the choice to
        hybrid, which uses a GPU if there is a `vram_budget` or a plan.

        Raises the errors of `hybrid.load`, InvalidOption for an option that it lacks, and
        InvalidArtifact if the file of packed weights is damaged.
        """
        super().__init__()
        given: dict[str, Any] = dict(options)
        if given.get("device") == _DEFAULT_DEVICE:
            del given["device"]
        for name in given.keys() - LoadKeywords.__annotations__.keys():
            expected = ", ".join(LoadKeywords.__annotations__)
            raise InvalidOption(f"model_args: unknown option {name}; expected one of {expected}")
        for name in ("profile", "predictor", "plan"):
            if given.get(name) not in (None, "auto", "exact", "none"):
                given[name] = Path(given[name])
        self.engine = load(pretrained, **given)
        self.engine.wait_for_weights()  # the harness keeps answers: none is of damaged weights
        for notice in self.engine.notices:
            _LOG.warning("%s", notice)
        self._name = pretrained
        # Tokens that begin every text: BOS, or none.
        self._n_bos = len(self.engine.tokenizer.encode(""))

    @property
    def eot_token_id(self) -> int:
        eos_ids = self.engine.config.eos_ids
        return eos_ids[0] if eos_ids else self.prefix_token_id

    @property
    def prefix_token_id(self) -> int:
        return prefix_token(self.engine)

    @property
    def max_length(self) -> int:
        """Tokens that the context holds."""
        return self.engine.n_context

    @property
    def tokenizer_name(self) -> str:
        """A name for the harness's cache of requests."""
        return f"hybrid:{self._name}"

    def get_model_info(self) -> dict[str, Any]:
        """Return what the harness adds to its results: how the model was computed."""
        engine, prediction = self.engine, self.engine.prediction
        return {
            "quant": engine.quant,
            "kv": engine.kv,
            "add_bos": self._n_bos > 0,
            "model_hash": engine.model_hash,
            "recall": None if prediction is None else prediction.recall,
            "previews_head": engine.previews_head,
            "synthetic": engine.is_synthetic,
        }

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: object
    ) -> _Tokens:
        """Return the text's tokens, after BOS if the model has one and it is not declined."""
        ids = self.engine.tokenizer.encode(string)
        return ids[self._n_bos :] if add_special_tokens is False else ids

    def _loglikelihood_tokens(
        self, requests: list[_Pair], disable_tqdm: bool = False, **kwargs: object
    ) -> list[tuple[float, bool]]:
        answers: dict[int, tuple[float, bool]] = {}
        # Sorted, so that requests with a common beginning follow each other.
        order = sorted(range(len(requests)), key=lambda index: requests[index][1:])
        with self.engine.open_session() as session:
            scorer = Scorer(session)
            for index in tqdm(order, desc="log-likelihoods", disable=disable_tqdm):
                texts, context, continuation = requests[index]
                room = self.max_length + 1 - len(continuation)  # the last token is not read
                likelihood = scorer.score(self._end_of(context, room), continuation)
                answers[index] = likelihood.logprob, likelihood.is_greedy
                if texts is not None:
                    self.cache_hook.add_partial("loglikelihood", texts, answers[index])
        return [answers[index] for index in range(len(requests))]

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Return the log-likelihood of whole texts, each of their tokens predicted once.

        A text begins after `prefix_token_id`, which is not predicted itself.
        """
        totals = []
        for request in tqdm(requests, desc="texts", disable=disable_tqdm):
            (text,) = request.args
            windows = utils.get_rolling_token_windows(
                self.tok_encode(text, add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            pairs = [(None, *utils.make_disjoint_window(window)) for window in windows]
            scores = self._loglikelihood_tokens(pairs, disable_tqdm=True)
            totals.append(sum(logprob for logprob, _ in scores))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, totals[-1])
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return the texts that continue the contexts, each up to its first stop string.

        A text begins with the space that separates it from its context, if there is one.
        """
        texts = []
        with self.engine.open_session() as session:
            for request in tqdm(requests, desc="texts", disable=disable_tqdm):
                context, gen_kwargs = request.args
                options = generation_options(gen_kwargs)
                assert isinstance(options.max_tokens, int)  # the harness always says how many
                room = self.max_length - options.max_tokens
                ids = self._end_of(self.tok_encode(context) or [self.prefix_token_id], room)
                texts.append("".join(self.engine.generate(ids, session=session, options=options)))
                self.cache_hook.add_partial("generate_until", request.args, texts[-1])
        return texts

    def chat_template(self, chat_template: bool | str = False) -> str:
        """Raise InvalidOption if a chat template is requested: hybrid's is not text."""
        return self.apply_chat_template() if chat_template else ""

    def apply_chat_template(self, *args: object, **kwargs: object) -> NoReturn:
        raise InvalidOption(
            "apply_chat_template: not supported by the model `hybrid`; leave it out"
        )

    def _end_of(self, context: _Tokens, room: int) -> _Tokens:
        """Return the last `room` tokens. Raises InvalidOption if there is no room for any."""
        if room < 1:
            raise InvalidOption(
                f"the task needs a context of more than {self.max_length} tokens, which is what "
                "this model has; pass a larger context_size in --model_args, if it can have one"
            )
        if len(context) > room:
            _LOG.warning(
                "a context has %d tokens; the first %d are cut off",
                len(context),
                len(context) - room,
            )
        return context[-room:]


def generation_options(gen_kwargs: dict[str, Any]) -> GenerationOptions:
    """Return what a task's `generation_kwargs` mean. Raises InvalidOption for unknown ones.

    Without `do_sample` or a temperature, generation is greedy. Random numbers follow the harness's
    seed, which it gives to Python's `random`.
    """
    values = normalize_gen_kwargs(gen_kwargs)
    is_sampled = values.pop("do_sample")
    given = {name: values.pop(name, None) for name in ("temperature", "top_k", "top_p", "min_p")}
    # Also if it is 1, since the model's own penalty would apply otherwise.
    repeat_penalty = values.pop("repetition_penalty", None)
    max_tokens, stop = values.pop("max_gen_toks"), values.pop("until")
    others = [f"{name}={value}" for name, value in values.items() if _NEUTRAL.get(name) != value]
    if others:
        raise InvalidOption(f"generation_kwargs: hybrid does not have {', '.join(others)}")
    if not is_sampled:
        given = {"temperature": 0.0}
    return GenerationOptions(
        **given,
        repeat_penalty=repeat_penalty,
        max_tokens=max_tokens,
        stop=[text for text in stop if text],
        seed=random.getrandbits(32),
    )
