"""Which tensors of a fine-tune are which of its base."""

from __future__ import annotations

import pytest
from memory_adapters import specs

from loramgr.checkpoints.alignment import align
from loramgr.checkpoints.families import TieGroup
from loramgr.errors import IncompatibleError

LAYERS = {f"encoder.layer.{at}.dense.weight": (4, 4) for at in (0, 1)}
BERT = {"embeddings.word_embeddings.weight": (9, 4), **LAYERS}


def prefixed(shapes: dict[str, tuple[int, ...]], prefix: str) -> dict[str, tuple[int, ...]]:
    return {prefix + name: shape for name, shape in shapes.items()}


@pytest.mark.parametrize(("ours", "theirs"), [("", ""), ("bert.", ""), ("", "bert."), ("model.bert.", "bert.")])
def test_one_change_of_prefix_pairs_all(ours: str, theirs: str) -> None:
    tuned = prefixed(BERT, ours) | {"classifier.weight": (2, 4)}
    base = prefixed(BERT, theirs) | {"cls.predictions.bias": (9,)}
    found = align(specs(tuned), specs(base), [], "ft")
    assert found.pairs == {ours + name: theirs + name for name in BERT}
    assert found.new == ("classifier.weight",)
    assert found.missing == ("cls.predictions.bias",)


def test_a_tied_name_has_the_tensor_that_it_is_tied_to() -> None:
    base = {"model.embed_tokens.weight": (9, 4), "model.layers.0.q.weight": (4, 4)}
    ties = [TieGroup("model.embed_tokens.weight", ("lm_head.weight",))]
    found = align(specs(base | {"lm_head.weight": (9, 4)}), specs(base), ties, "ft")
    assert found.pairs["lm_head.weight"] == "lm_head.weight"
    assert found.sources["lm_head.weight"] == "model.embed_tokens.weight"
    assert found.new == found.missing == ()


def test_a_resized_vocabulary_and_head_are_paired() -> None:
    tuned = BERT | {"embeddings.word_embeddings.weight": (11, 4), "classifier.weight": (3, 4)}
    found = align(specs(tuned), specs(BERT | {"classifier.weight": (2, 4)}), [], "ft")
    assert found.new == found.missing == ()


@pytest.mark.parametrize(
    ("tuned", "said"),
    [
        ({"other.weight": (4, 4)}, "no matrix of it is the base's"),
        (
            prefixed(BERT, "") | {"encoder.layer.1.dense.weight": (4, 5)},
            r"encoder\.layer\.1\.dense\.weight is \[4, 5\]",
        ),
        (
            {**BERT, "encoder.layer.2.dense.weight": (4, 4)},
            "ft has encoder.layer.2.dense.weight, a layer that the base",
        ),
        ({name: BERT[name] for name in list(BERT)[:2]}, "ft lacks encoder.layer.1.dense.weight, a layer of the base"),
        ({name: (8, 8) for name in BERT}, "no matrix of it is the base's"),
    ],
)
def test_another_architecture_is_refused_by_name(tuned: dict[str, tuple[int, ...]], said: str) -> None:
    with pytest.raises(IncompatibleError, match=said):
        align(specs(tuned), specs(BERT), [], "ft")
