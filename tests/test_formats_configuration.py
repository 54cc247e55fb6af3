from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loramgr.errors import IncompatibleError, IntegrityError, NotFoundError
from loramgr.formats.configuration import Fields, load_configuration

NUMBERS = st.integers(-(2**53) + 1, 2**53 - 1) | st.floats(allow_nan=False, allow_infinity=False, width=32)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)


@given(content=st.dictionaries(TEXTS, VALUES, max_size=6))
def test_every_configuration_comes_back_as_it_was(
    tmp_path_factory: pytest.TempPathFactory, content: dict[str, object]
) -> None:
    path = tmp_path_factory.mktemp("config") / "adapter_config.json"
    path.write_text(json.dumps(content))
    assert load_configuration(path) == content


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"  \n",
        b"{",
        b'{"r": 8,}',
        b'{"r": NaN}',
        b'{"lora_alpha": Infinity}',
        b'{"r": 8, "r": 16}',
        b'{"a": {"b": 1, "b": 1}}',
        b"\xff\xfe\x00",
        b"\x93NUMPY",
        b"[" * 100_000,
    ],
)
def test_what_is_not_json_is_damaged(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "adapter_config.json").write_bytes(data)
    with pytest.raises(IntegrityError, match=r"adapter_config\.json"):
        load_configuration(tmp_path / "adapter_config.json")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"[]", "a list, not a JSON object"),
        (b"null", "a NoneType, not"),
        (b'{"lora_alpha": 1e999}', "no canonical JSON form"),
        (b'{"r": 9007199254740993}', "no canonical JSON form"),
        (b'{"a": "\\ud800"}', "no canonical JSON form"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", "Git LFS pointer"),
    ],
)
def test_what_has_no_meaning_is_refused(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "adapter_config.json").write_bytes(data)
    with pytest.raises(IncompatibleError, match=message):
        load_configuration(tmp_path / "adapter_config.json")


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no such file"):
        load_configuration(tmp_path / "adapter_config.json")


@pytest.mark.parametrize(
    ("method", "good", "bad"),
    [
        ("flag", [None, True, False], [0, 1, "true", []]),
        ("text", [None, "", "x"], [1, True, []]),
        ("names", [None, "q", [], ["q", "v"]], [1, [1], {"q": 1}, [""]]),
        ("rank", [1, 8], [None, 0, -1, 8.0, True, "8"]),
        ("number", [0, -1, 2.5], [None, True, "8", []]),
        ("mapping", [None, {}, {"q": 1}], [1, [], "q"]),
    ],
)
def test_keys_have_their_types(method: str, good: list[object], bad: list[object]) -> None:
    for value in good:
        getattr(Fields(Path("c"), {"key": value}), method)("key")
    for value in bad:
        with pytest.raises(IncompatibleError, match=r"c: key is .*, it must be "):
            getattr(Fields(Path("c"), {"key": value}), method)("key")


def test_defaults_and_values() -> None:
    empty = Fields(Path("c"), {})
    assert (empty.flag("x"), empty.text("x"), empty.names("x"), empty.mapping("x")) == (False, None, (), {})
    fields = Fields(Path("c"), {"f": True, "t": "", "n": "q", "l": ["q", "v"], "r": 8, "a": 16})
    assert (fields.flag("f"), fields.text("t"), fields.names("n"), fields.names("l")) == (
        True,
        None,
        ("q",),
        ("q", "v"),
    )
    assert (fields.rank("r"), fields.number("a")) == (8, 16.0)
