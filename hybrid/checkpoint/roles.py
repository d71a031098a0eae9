"""Finds the tensor of each role in a model's files, and checks its type and shape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from hybrid.checkpoint import foreign
from hybrid.checkpoint.names import MatchedNames, match_names
from hybrid.checkpoint.tensor import Tensor, WeightFile
from hybrid.errors import InvalidCheckpoint, UnsupportedModel
from hybrid.model.config import ModelConfig
from hybrid.model.families import ExpectedTensor, expected_tensors
from hybrid.notices import Notices, short_list

TensorsByRole = dict[tuple[str, int | None], Tensor]


class FoundTensors(NamedTuple):
    config: ModelConfig  # says whether the head is really tied
    tensors: TensorsByRole
    unused: tuple[str, ...]  # names in the files that the family lacks


def find_tensors(
    folder: Path, config: ModelConfig, weights: WeightFile, notices: Notices
) -> FoundTensors:
    """Find every tensor of the model.

    `notices` receives a line for other names than the family's, for a tied head that is stored, and
    for tensors that are not used. Raises InvalidCheckpoint, UnsupportedModel.
    """
    stored = weights.names
    if config.n_layers > len(stored):  # before names are listed that would fill the memory
        raise InvalidCheckpoint(
            f"{folder}: has {len(stored):,} tensors, too few for the {config.n_layers:,} layers of "
            "its config; a file is missing, or the config is of another model"
        )
    expected = list(expected_tensors(replace(config, has_tied_head=False)))
    try:
        names = match_names({tensor.name for tensor in expected}, stored)
    except InvalidCheckpoint as error:
        raise InvalidCheckpoint(f"{folder}: {error}") from None
    if names.renamed:
        (stored, name), *_ = names.renamed
        notices.add(
            f"tensors have other names than the family's, such as {stored!r:.100} for {name!r}; "
            "they are read all the same"
        )
    if names.unused:
        notices.add(unused_notice(names.unused))
    is_tied = config.has_tied_head
    has_head = any(tensor.role == "head" and tensor.name in names.stored for tensor in expected)
    tensors = {}
    for tensor in expected:
        # A tied model needs only one of both.
        is_optional = is_tied and tensor.role == ("embedding" if has_head else "head")
        if tensor.name in names.stored or not is_optional:
            tensors[tensor.role, tensor.layer] = _find_tensor(folder, weights, names, tensor)
    if is_tied:
        config = _tie_head(config, tensors, notices)
    return FoundTensors(config, tensors, tuple(names.unused))


def unused_notice(unused: Sequence[str]) -> str:
    """Return the line that names tensors which are not used."""
    return "tensors for which config.json has no place are not used: " + short_list(unused)


def _find_tensor(
    folder: Path, weights: WeightFile, names: MatchedNames, expected: ExpectedTensor
) -> Tensor:
    role, _, name, shape = expected
    if name not in names.stored:
        if tool := foreign.quantised_by(name, names.unused):
            raise UnsupportedModel(
                f"{folder}: has no tensor {name!r}: the weights are quantised by {tool}, which "
                "this engine does not run; get the model before it was quantised"
            )
        if role == "head":
            raise InvalidCheckpoint(
                f"{folder}: has no tensor {name!r}, and tie_word_embeddings is false: a file is "
                "missing, or the model was saved without its head. If the head is the embedding, "
                "write tie_word_embeddings true into config.json"
            )
    tensor = weights.tensor(names.stored.get(name, name))  # raises if it is missing
    if tensor.shape != shape:
        raise InvalidCheckpoint(
            f"{folder}: tensor {name!r} has shape {tensor.shape}, expected {shape} from "
            "config.json; the files are of different models, or broken"
        )
    return tensor


def _tie_head(config: ModelConfig, tensors: TensorsByRole, notices: Notices) -> ModelConfig:
    """Decide about a head that config.json ties and the files hold too, as transformers 5 does.

    A stored head that differs from the embedding is used (`tie_weights` in
    transformers/modeling_utils.py). If only one of both is stored, it serves as both.
    """
    head = tensors.get(("head", None))
    if head is None:
        return config
    embedding = tensors.setdefault(("embedding", None), head)
    if embedding is head:
        notices.add("the files hold the head and no embedding; it serves as both")
    elif not head.has_values_of(embedding):
        notices.add(
            f"config.json says tie_word_embeddings, but {head.name!r:.100} differs from the "
            "embedding; the stored head is used, as in transformers"
        )
        return replace(config, has_tied_head=False)
    del tensors["head", None]
    return config
