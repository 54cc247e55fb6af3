"""URLs of remotes: what they mean, and that none with a secret in it is taken or repeated."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loramgr.errors import IncompatibleError, LoramgrError, UsageError
from loramgr.remotes.opening_store import open_keystore
from loramgr.remotes.urls import RemoteUrl, parse_url

SECRET = "wJalrXUtnFEMIK7MDENGbPxRfiCY"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("s3://bucket/some/prefix", RemoteUrl("s3", "bucket", "some/prefix")),
        ("s3:bucket/prefix/", RemoteUrl("s3", "bucket", "prefix")),
        ("S3://bucket", RemoteUrl("s3", "bucket")),
        ("gs://my-bucket/a b", RemoteUrl("gs", "my-bucket", "a b")),
        ("az://container/p?account=ours", RemoteUrl("az", "container", "p", (("account", "ours"),))),
        ("hf:org", RemoteUrl("hf", "org")),
        ("hf://org/name", RemoteUrl("hf", "org", "name")),
        (
            "s3://b?region=eu-west-1&profile=work",
            RemoteUrl("s3", "b", "", (("profile", "work"), ("region", "eu-west-1"))),
        ),
        (
            "s3://b/p?endpoint=http%3A%2F%2F127.0.0.1%3A9000&timeout=2.5",
            RemoteUrl("s3", "b", "p", (("endpoint", "http://127.0.0.1:9000"), ("timeout", "2.5"))),
        ),
    ],
)
def test_a_url_says_kind_place_prefix_and_options(text: str, expected: RemoteUrl) -> None:
    assert parse_url(text) == expected
    assert parse_url(str(expected)) == expected


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("file:/srv/adapters", "/srv/adapters"),
        ("file:///srv/ad apters", "/srv/ad apters"),
        ("file://localhost/srv", "/srv"),
        ("/srv/a@b:c?d", "/srv/a@b:c?d"),
    ],
)
def test_a_folder_is_a_url_or_a_path(text: str, path: str) -> None:
    assert parse_url(text) == RemoteUrl("file", path)
    assert parse_url(str(parse_url(text))) == parse_url(text)


@pytest.mark.parametrize("text", ["file:remote", "remote", "./remote", "file:./remote"])
def test_a_relative_folder_is_made_absolute(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Path(parse_url(text).place).resolve() == (tmp_path / "remote").resolve()
    assert parse_url(text).place.startswith("/")


def test_the_home_folder_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert parse_url("file:~/remote").place == str(tmp_path / "remote")


@pytest.mark.parametrize(
    ("text", "way"),
    [
        (f"s3://AKIAEXAMPLE:{SECRET}@bucket/prefix", "AWS_SECRET_ACCESS_KEY"),
        (f"s3:AKIAEXAMPLE:{SECRET[:9]}/{SECRET[9:]}@bucket", "AWS_SECRET_ACCESS_KEY"),
        (f"s3://{SECRET}@bucket", "profile="),
        (f"s3://bucket?aws_secret_access_key={SECRET}", "AWS_SECRET_ACCESS_KEY"),
        (f"s3://bucket?{SECRET}/x=1", "AWS_SECRET_ACCESS_KEY"),
        (f"s3://bucket?endpoint=https://user:{SECRET}@host", "AWS_SECRET_ACCESS_KEY"),
        (f"s3://bucket?endpoint=https://host/?X-Amz-Signature={SECRET}", "AWS_SECRET_ACCESS_KEY"),
        (f"gs://bucket?token={SECRET}", "GOOGLE_APPLICATION_CREDENTIALS"),
        (f"az://container?sv=2021&sig={SECRET}", "AZURE_STORAGE_SAS_TOKEN"),
        (f"az://container?account_key={SECRET}", "AZURE_STORAGE_ACCOUNT_KEY"),
        (f"hf://user:{SECRET}@org/name", "HF_TOKEN"),
        (f"hf:org/name?token={SECRET}", "HF_TOKEN"),
    ],
)
def test_credentials_are_refused_and_never_repeated(text: str, way: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_url(text)
    shown = f"{caught.value.message} {caught.value.hint}"
    assert way in shown
    assert SECRET not in shown
    assert SECRET[:9] not in shown
    assert "AKIAEXAMPLE" not in shown


@pytest.mark.parametrize(
    "text",
    [
        "",
        "s3:",
        "s3://",
        "s3://bucket/../other",
        "s3://bucket/a//b",
        "s3://bucket/per%20cent",
        "s3://bucket\n/x",
        "s3://bucket?nonsense=1",
        "s3://bucket?region",
        "s3://bucket?region=a&region=b",
        "s3://bucket?timeout=soon",
        "s3://bucket?timeout=0",
        "s3://bucket?timeout=nan",
        "s3://bucket?timeout=1e9",
        "s3://bucket?anonymous=maybe",
        "s3://bucket?endpoint=host:9000",
        "s3://bucket?endpoint=ftp://host",
        "s3://bucket?endpoint=http://host:port",
        "gs://bucket?profile=work",
        "hf:org/name/more",
        "file:",
        "file://host/path",
        "https://host/path",
        "ssh://host",
    ],
)
def test_what_is_no_url_of_a_remote_is_refused(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_url(text)
    assert caught.value.hint or "value of" in caught.value.message or "endpoint" in caught.value.message


@pytest.mark.parametrize("text", ["oci://registry/name", "sftp://host/path"])
def test_kinds_that_loramgr_does_not_speak_are_named(text: str) -> None:
    with pytest.raises(IncompatibleError, match=text[:3]) as caught:
        parse_url(text)
    assert "s3://BUCKET/PREFIX" in str(caught.value.hint)


@given(st.text(max_size=60))
def test_any_text_is_a_url_or_an_error_of_ours(text: str) -> None:
    try:
        parsed = parse_url(text)
    except LoramgrError:
        return
    assert parse_url(str(parsed)) == parsed


@given(st.sampled_from(["s3", "gs", "az", "hf"]), st.text(max_size=40), st.text(max_size=20))
def test_what_follows_an_at_sign_or_a_secret_option_is_never_kept(kind: str, before: str, after: str) -> None:
    for text in (f"{kind}://{before}{SECRET}@{after}", f"{kind}://place?{before}secret={SECRET}{after}"):
        with pytest.raises(LoramgrError) as caught:
            parse_url(text)
        if "?" not in before:
            assert SECRET not in f"{caught.value.message} {caught.value.hint}"


def test_a_hub_is_not_a_store_of_keys() -> None:
    with pytest.raises(UsageError, match="hf:org"):
        open_keystore("hf:org")
