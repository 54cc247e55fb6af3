"""The card on top of a hub's repository, against a recorded one, and that no text of others becomes markup."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from loramgr.remotes.hub_card import CardFacts, hub_name, model_card, read_own_card

GOLDEN = Path(__file__).with_name("golden") / "hub_card.md"
FACTS: dict[str, Any] = {
    "repository": "org/sql",
    "name": "sql",
    "number": 3,
    "digest": "sha256:" + "ab" * 32,
    "method": "lora",
    "parameters": 1234567,
}
FULL: dict[str, Any] = {
    **FACTS,
    "base_model": "org/base-1.0",
    "base": "sha256:" + "cd" * 32,
    "rank": 16,
    "alpha": 32.0,
    "targets": ["q_proj", "v_proj"],
    "dtype": "BF16",
    "license": "apache-2.0",
    "message": "second run | *with* <b>markup</b>\n# and a heading",
    "metrics": {"loss": 0.12345678901234, "acc|x": 1e-20},
    "tags": ["prod"],
    "text": "# What people wrote\n\nas they wrote it",
}


def parts(card: bytes) -> tuple[dict[str, Any], str]:
    _, metadata, text = card.decode().split("---\n", 2)
    return yaml.safe_load(metadata), text


def test_a_card() -> None:
    assert model_card(CardFacts(**FULL)).decode() == GOLDEN.read_text()


def test_a_card_of_what_is_not_known() -> None:
    metadata, text = parts(model_card(CardFacts(**FACTS)))
    assert metadata == {"library_name": "peft", "tags": ["lora", "loramgr"]}
    assert "None" not in text


@given(st.text(), st.text(), st.dictionaries(st.text(min_size=1), st.floats(allow_nan=False), max_size=3))
def test_texts_of_others_stay_texts(word: str, message: str, metrics: dict[str, float]) -> None:
    given_ = {**FULL, "license": word, "method": word, "message": message, "metrics": metrics, "text": ""}
    metadata, text = parts(model_card(CardFacts(**given_)))
    if word and word.isprintable() and "\ufffd" not in word:
        assert metadata["license"] == word
        assert metadata["tags"][1] == word
    assert set(metadata) <= {"base_model", "library_name", "license", "tags"}
    headings = [line for line in text.splitlines() if line.startswith("#")]
    assert headings == ["# sql v3", *(["## Metrics"] if metrics else []), "## Use"]


@pytest.mark.parametrize(
    ("data", "license", "text"),
    [
        (b"", None, ""),
        (b"# only text\n", None, "# only text"),
        (b"---\nlicense: mit\nbase_model: x\n---\n# T\n", "mit", "# T"),
        (b"---\r\nlicense: 'cc-by-4.0'\r\n---\r\nT", "cc-by-4.0", "T"),
        (b"---\nlicense: other: x\n---\n", None, ""),
        (b"---\nlicense: mit\n---\n[More Information Needed]\n", "mit", ""),
        (b"---\nno end", None, "---\nno end"),
        (b"\xff\xfe", None, "\ufffd\ufffd"),
    ],
)
def test_what_a_card_of_its_own_says(data: bytes, license: str | None, text: str) -> None:
    own = read_own_card(data)
    assert (own.license, own.text) == (license, text)


@pytest.mark.parametrize("name", ["gpt2", "org/name", "meta-llama/Llama-3.1-8B"])
def test_names_on_the_hub(name: str) -> None:
    assert hub_name(name) == name


@pytest.mark.parametrize("name", [None, 3, "", "/home/x/model", "./model", "a/b/c", "a b", "../x", "a/..", "x\ny"])
def test_what_is_no_name_on_the_hub(name: object) -> None:
    assert hub_name(name) is None
