"""How records look to a person."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loramgr.cli.views import names, render, size, table
from loramgr.records import (
    BaseRecord,
    BaseReference,
    FileRecord,
    InspectReport,
    MergedAdapter,
    MergeReport,
    ModuleRecord,
    Removal,
    SchemaReport,
    VersionRecord,
)

DIGEST = "sha256:" + "0123456789abcdef" * 4
BASE = BaseRecord(
    "minilm", DIGEST, "models/minilm", None, 101, 22_713_216, 90_852_864, "F32", "BertModel", "2026-01-01"
)
VERSION = {
    "name": "lic",
    "version": 3,
    "digest": DIGEST,
    "weights_digest": DIGEST,
    "base": BaseReference("minilm", DIGEST),
    "method": "lora",
    "format": "peft",
    "rank": 8,
    "ranks": {"query": 8},
    "alpha": 16.0,
    "scaling": 2.0,
    "target_modules": ["query", "value"],
    "parameters": 75_268,
    "bytes": 304_600,
    "dtype": "F32",
    "files": [FileRecord("adapter_model.safetensors", DIGEST, 304_600)],
    "parents": ["lic@v2"],
    "tags": ["prod"],
    "labels": {},
    "metrics": {"accuracy": 0.9375},
    "message": "step 100",
    "created_at": "2026-01-01T00:00:00Z",
}
MODULE = ModuleRecord("encoder.query", "linear", 8, 16.0, 2.0, 384, 384, "F32", 4.25, 6.5, [3.0, 1.5])


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (304_600, "297 KiB"),
        (90_868_376, "86.7 MiB"),
        (2**50, "1024 TiB"),
    ],
)
def test_sizes_have_three_figures(count: int, text: str) -> None:
    assert size(count) == text


def test_columns_are_aligned_and_numbers_stand_on_the_right() -> None:
    rows = [["lic", 8, None], ["longer", 16, "x\ny"]]
    assert table(["NAME", "RANK", "TAGS"], rows) == ["NAME    RANK  TAGS", "lic        8  -", "longer    16  x y"]


@given(st.lists(st.tuples(st.text("abc", max_size=9), st.integers()), min_size=1))
def test_every_column_of_a_table_starts_at_one_place(rows: list[tuple[str, int]]) -> None:
    lines = table(["A", "B"], rows)
    assert {len(line) for line in lines} == {max(map(len, lines))}


def test_a_list_of_versions_is_a_table_with_short_digests() -> None:
    headings, row = render([VersionRecord(**VERSION)])
    assert headings.split()[:2] == ["VERSION", "DIGEST"]
    assert row.startswith("lic@v3   0123456789ab  lora")
    assert "297 KiB" in row
    assert "minilm (0123456789ab)" in row
    assert "accuracy=0.9375" in row


def test_a_list_of_bases_is_a_table_and_an_empty_list_is_nothing() -> None:
    assert "minilm" in render([BASE])[1]
    assert render([]) == []


def test_one_version_shows_whole_digests_and_no_empty_fields() -> None:
    lines = render(VersionRecord(**VERSION))
    assert f"digest          {DIGEST}" in lines
    assert "bytes           297 KiB (304,600 bytes)" in lines
    assert not any(line.startswith(("labels", "ranks")) for line in lines)


def test_an_inspection_ends_with_its_modules_and_their_spectra() -> None:
    report = InspectReport(
        **VERSION, modules=[MODULE], warnings=["seen on stderr"], mergeable=True, reason=None, share_of_base=0.0033
    )
    lines = render(report)
    assert "share of base   0.330%" in lines
    assert "mergeable       yes" in lines
    assert lines[-2:] == [lines[-2], "encoder.query: 3 1.5"]
    assert lines[-2].split() == ["encoder.query", "linear", "8", "16", "2", "384", "384", "F32", "4.25", "6.5"]
    assert "seen on stderr" not in "\n".join(lines)


def test_a_merge_shows_each_adapter_with_its_weight() -> None:
    adapters = [MergedAdapter("lic@v3", DIGEST, 0.7), MergedAdapter("py@v1", DIGEST, -0.3)]
    report = MergeReport("out", DIGEST, adapters, "exact", 12, 12, [], 101, 10, 10, "cpu", "torch", 1.234, DIGEST)
    lines = render(report)
    assert "adapters         lic@v3  0123456789ab  weight 0.7" in lines
    assert "                 py@v1  0123456789ab  weight -0.3" in lines
    assert "seconds          1.23" in lines


@pytest.mark.parametrize(
    ("record", "lines"),
    [
        (VersionRecord(**VERSION), ["lic@v3"]),
        ([BASE], ["minilm"]),
        (Removal(["lic@v1", "lic@v2"]), ["lic@v1", "lic@v2"]),
        (SchemaReport("0001", "0001"), ["0001"]),
        (SchemaReport(None, "0001"), []),
    ],
)
def test_quiet_shows_what_a_script_needs(record: object, lines: list[str]) -> None:
    assert names(record) == lines
