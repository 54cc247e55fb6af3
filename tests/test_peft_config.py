from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft_files import write_adapter

from loramgr.adapter import LowRank
from loramgr.errors import IncompatibleError
from loramgr.formats import read_adapter
from loramgr.formats.configuration import Fields
from loramgr.formats.peft_config import matching, parse_settings

WORDS = st.sampled_from(["q", "q_proj", "proj", "layers", "0", "1", "self_attn", "k|q", ".*", r"\d", "attn"])
PATHS = st.lists(WORDS, min_size=1, max_size=4).map(".".join)


def _settings(**content: object) -> object:
    return parse_settings(Fields(Path("c"), {"peft_type": "LORA", "r": 8, "lora_alpha": 16, **content}))


@given(
    patterns=st.lists(PATHS, max_size=4, unique=True), module=PATHS.filter(lambda path: not re.search(r"[|*\\]", path))
)
def test_patterns_match_as_in_peft(patterns: list[str], module: str) -> None:
    from peft.utils.other import get_pattern_key

    assert (matching(patterns, module) or [module])[0] == get_pattern_key(patterns, module)


@given(rank=st.integers(1, 512), alpha=st.integers(0, 512), rslora=st.booleans())
def test_the_scaling_is_the_quotient(rank: int, alpha: int, rslora: bool) -> None:
    lora = parse_settings(
        Fields(Path("c"), {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "use_rslora": rslora})
    ).lora
    assert lora is not None
    assert lora.scaling(lora.alpha, rank) == (alpha / math.sqrt(rank) if rslora else alpha / rank)


def test_patterns_that_contradict_each_other(tmp_path: Path) -> None:
    """PEFT sorts the patterns when it saves: the tensors tell the rank, and for alpha a person is told."""
    patterns = {"m.q": 1, "q": 2}
    adapter = read_adapter(write_adapter(tmp_path, r=8, rank_pattern=patterns, alpha_pattern={"m.q": 6, "q": 4}))
    update = adapter.updates["m.q.weight"]
    assert isinstance(update, LowRank)
    assert (update.rank, update.alpha, update.scaling) == (2, 6.0, 3.0)
    assert adapter.warnings == (
        "alpha_pattern gives m.q more than one alpha (6, 4); 6 is used, as PEFT does when it loads the file, "
        "but training may have used another.",
    )


def test_the_heads_that_a_task_implies() -> None:
    settings = parse_settings(
        Fields(
            Path("c"), {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "task_type": "SEQ_CLS", "modules_to_save": ["x"]}
        )
    )
    assert settings.saved_modules == ("x", "classifier", "score")


@pytest.mark.parametrize(
    "content",
    [
        {"trainable_token_indices": "all"},
        {"trainable_token_indices": {"embed": 3}},
        {"trainable_token_indices": [1.0]},
        {"target_modules": "("},
        {"modules_to_save": {"a": 1}},
        {"task_type": ["CAUSAL_LM"]},
        {"ensure_weight_tying": "yes"},
    ],
)
def test_values_that_mean_nothing(content: dict[str, object]) -> None:
    with pytest.raises(IncompatibleError, match=next(iter(content))):
        _settings(**content)
