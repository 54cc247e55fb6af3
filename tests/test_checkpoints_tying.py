from dataclasses import replace

import pytest
from memory_adapters import embedding, low_rank, rows, saved, shift, tensor

from loramgr.adapter import LowRank, Replacement, Rows, Update
from loramgr.checkpoints.binding import BoundUpdate
from loramgr.checkpoints.tying import keep_tied
from loramgr.errors import IncompatibleError

EMBED, HEAD = "wte.weight", "lm_head.weight"


def pair(head: Update, table: Update) -> list[BoundUpdate]:
    return [BoundUpdate(HEAD, HEAD, head, "saved", tied_source=EMBED), BoundUpdate(EMBED, EMBED, table, "saved")]


HEAD_FACTORS = LowRank("linear", tensor(2, 4), tensor(10, 2), 2, 4.0, 2.0)
SAME: list[tuple[Update, Update]] = [
    (HEAD_FACTORS, embedding(10, 4)),
    (replace(HEAD_FACTORS, table=tensor(10, 4)), embedding(10, 4, table=tensor(10, 4))),
    (replace(HEAD_FACTORS, table=tensor(10, 4)), embedding(10, 4)),
    (saved(10, 4), saved(10, 4)),
    (rows((1, 2), 4), rows((1, 2), 4)),
]
DIFFERENT: list[tuple[Update, Update]] = [
    (replace(HEAD_FACTORS, scaling=1.0), embedding(10, 4)),
    (replace(HEAD_FACTORS, lora_A=tensor(2, 4, value=0.25)), embedding(10, 4)),
    (replace(HEAD_FACTORS, table=tensor(10, 4)), embedding(10, 4, table=tensor(10, 4, value=1))),
    (replace(HEAD_FACTORS, magnitude=tensor(10)), embedding(10, 4)),
    (low_rank(10, 4), low_rank(10, 4)),
    (Replacement(tensor(10, 4, value=1)), saved(10, 4)),
    (Rows((1, 2), tensor(2, 4, value=1)), rows((1, 2), 4)),
    (rows((1, 3), 4), rows((1, 2), 4)),
    (saved(10, 4), embedding(10, 4)),
    (shift(4), shift(4)),
]


@pytest.mark.parametrize(("head", "table"), SAME)
def test_one_update_is_kept_of_two_that_are_the_same(head: Update, table: Update) -> None:
    (kept,) = keep_tied(pair(head, table))
    assert (kept.name, kept.target, kept.update) == (EMBED, EMBED, table)


@pytest.mark.parametrize(("head", "table"), DIFFERENT)
def test_updates_that_differ_are_refused(head: Update, table: Update) -> None:
    with pytest.raises(IncompatibleError, match=r"lm_head\.weight and wte\.weight are one tensor"):
        keep_tied(pair(head, table))


def test_the_only_update_moves_to_the_tensor_of_the_file() -> None:
    other = BoundUpdate("norm.weight", "norm.weight", saved(4), "saved")
    head = pair(HEAD_FACTORS, saved(10, 4))[0]
    kept = keep_tied([head, other])
    assert kept == [other, replace(head, target=EMBED, tied_source=None)]
