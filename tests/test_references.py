"""References and names: what a person writes, read exactly or refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loramgr.errors import UsageError
from loramgr.references import Reference, check_name, check_tag, is_path, parse_reference, parse_weighted

NAMES = st.from_regex(r"[a-z0-9][a-z0-9._-]{0,95}", fullmatch=True)


@pytest.mark.parametrize(
    ("text", "reference"),
    [
        ("sql", Reference("sql")),
        ("sql@latest", Reference("sql")),
        ("sql@v3", Reference("sql", number=3)),
        ("sql@prod", Reference("sql", tag="prod")),
        ("sql@v3-rc", Reference("sql", tag="v3-rc")),
        ("sql@sha256:ab12", Reference("sql", digest="sha256:ab12")),
        ("sha256:ab12", Reference(None, digest="sha256:ab12")),
        ("a" * 96, Reference("a" * 96)),
    ],
)
def test_reference(text: str, reference: Reference) -> None:
    assert parse_reference(text) == reference


@pytest.mark.parametrize(
    "text",
    [
        *("", "@v1", "SQL", "sql@", "sql@V1", "sql@v01", "sql@a@b", "a/b", "../x", ".x", "a" * 97, "sql\n"),
        *("sha256:", "sha256:xy", "sql@sha256:", "sha256:" + "a" * 65, "sql@v" + "9" * 30),
    ],
)
def test_malformed_reference_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_reference(text)


@pytest.mark.parametrize("tag", ["latest", "v1", "v007", "", "Prod", "a b", "a/b", "-a"])
def test_reserved_or_malformed_tag_is_refused(tag: str) -> None:
    with pytest.raises(UsageError):
        check_tag(tag)


@given(NAMES, st.integers(0, 10**9))
def test_names_and_numbers_come_back(name: str, number: int) -> None:
    assert parse_reference(check_name(name)) == Reference(name)
    assert parse_reference(f"{name}@v{number}") == Reference(name, number=number)


@given(NAMES, st.floats(allow_nan=False, allow_infinity=False))
def test_weights_come_back(name: str, weight: float) -> None:
    assert parse_weighted(f"{name}={weight!r}") == (name, weight)


@pytest.mark.parametrize(
    ("text", "pair"),
    [
        ("sql", ("sql", 1.0)),
        ("sql@v1=-0.3", ("sql@v1", -0.3)),
        ("./a=b/c=0.5", ("./a=b/c", 0.5)),
        ("./lr=high/run", ("./lr=high/run", 1.0)),
    ],
)
def test_weight_stands_after_the_last_equals_sign(text: str, pair: tuple[str, float]) -> None:
    assert parse_weighted(text) == pair


@pytest.mark.parametrize("text", ["sql=", "sql=x", "sql=nan", "sql=inf", "sql=-inf", "./a=nan"])
def test_weight_that_is_no_finite_number_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_weighted(text)


@pytest.mark.parametrize(("text", "path"), [("a/b", True), ("./a", True), (".", True), ("sql", False), ("a.b", False)])
def test_path(text: str, path: bool) -> None:
    assert is_path(text) is path
