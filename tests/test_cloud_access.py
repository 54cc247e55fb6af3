"""Object stores and who may reach them: credentials, profiles, certificates, redirects, proxies; no secret is shown."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import object_servers as servers
import pytest

from loramgr.errors import IncompatibleError, UncheckedError, UsageError
from loramgr.remotes import cloud_client
from loramgr.remotes.opening_store import open_keystore
from loramgr.remotes.protocol import KeyStore


def read(store: KeyStore, key: str) -> bytes:
    return b"".join(store.get(key))


@pytest.mark.parametrize("kind", [kind for kind in servers.KINDS if kind != "moto"])  # it lets everybody in
def test_wrong_credentials_are_told_without_repeating_them(
    kind: str, object_servers: servers.ObjectServers, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = object_servers.get(kind)
    server.enter(monkeypatch)
    wrong = "V1JPTkctV1JPTkctV1JPTkc="
    for name, value in server.environment.items():
        if value == servers.SECRET:
            monkeypatch.setenv(name, wrong)
    store = open_keystore(server.url("x"))
    for call in (lambda: list(store.list("")), lambda: store.put_if_absent("a", b"x"), lambda: store.head("a")):
        with pytest.raises(UncheckedError, match=r"40[13]") as caught:
            call()
        assert wrong not in f"{caught.value.message}{caught.value.hint}"


def test_a_signed_address_is_never_shown(
    object_servers: servers.ObjectServers, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = object_servers.get("azurite")
    server.enter(monkeypatch)
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_KEY")
    monkeypatch.setenv("AZURE_STORAGE_SAS_TOKEN", "sv=2021-12-02&sr=c&sp=rl&se=2030-01-01&sig=SECRETSIGNATURE")
    with pytest.raises(UncheckedError, match="403") as caught:
        open_keystore(server.url("x")).head("a")
    assert "SECRETSIGNATURE" not in f"{caught.value.message}{caught.value.hint}"
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


def test_profiles_of_aws_are_used(
    object_servers: servers.ObjectServers, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    server = object_servers.get("seaweedfs")
    server.enter(monkeypatch)
    for name in servers.S3_CREDENTIALS:
        monkeypatch.delenv(name)
    keys = f"aws_access_key_id = tester\naws_secret_access_key = {servers.SECRET}\nregion = us-east-1\n"
    (tmp_path / "credentials").write_text(f"[work]\n{keys}[other]\n{keys.replace(servers.SECRET, 'wrong')}")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    assert list(open_keystore(server.url(tmp_path.name, profile="work")).list("")) == []
    monkeypatch.setenv("AWS_PROFILE", "work")
    assert list(open_keystore(server.url(tmp_path.name)).list("")) == []
    with pytest.raises(UncheckedError, match="403"):
        list(open_keystore(server.url(tmp_path.name, profile="other")).list(""))
    with pytest.raises(UsageError, match="profile absent"):
        open_keystore(server.url(tmp_path.name, profile="absent"))


def test_no_credentials_at_all_are_told_at_once(
    object_servers: servers.ObjectServers, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    server = object_servers.get("seaweedfs")
    server.enter(monkeypatch)
    for name in servers.S3_CREDENTIALS:
        monkeypatch.delenv(name)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    (port,) = servers.free_ports(1)
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", f"http://127.0.0.1:{port}")
    with pytest.raises(UncheckedError, match="no credentials"):
        open_keystore(server.url("x")).head("a")


@pytest.mark.parametrize("kind", ["az", "gs"])
def test_settings_that_cannot_be_used_are_told(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "SECRET!!")
    monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT_KEY", '{"private_key": "SECRET!!"')
    with pytest.raises(UncheckedError, match="credentials in the environment") as caught:
        open_keystore(f"{kind}://place" + ("?account=ours" if kind == "az" else ""))
    assert "SECRET" not in f"{caught.value.message}{caught.value.hint}"


def test_azure_needs_an_account(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME", raising=False)
    with pytest.raises(UsageError, match="account is missing"):
        open_keystore("az://container/x")


def test_without_the_extra_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cloud_client, "find_spec", lambda _: None)
    with pytest.raises(IncompatibleError) as caught:
        open_keystore("s3://bucket")
    assert caught.value.hint == "pip install 'loramgr[cloud]'"


def certificates(folder: Path) -> tuple[Path, Path, Path]:
    """Write an authority of our own, a certificate that it signed for 127.0.0.1, and that one's key."""
    import ipaddress

    x509 = pytest.importorskip("cryptography.x509")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    keys = {name: ec.generate_private_key(ec.SECP256R1()) for name in ("authority", "server")}
    names = {name: x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, f"tests: {name}")]) for name in keys}
    now = datetime.now(UTC)
    for name, key in keys.items():
        maker = x509.CertificateBuilder(names["authority"], names[name], key.public_key(), x509.random_serial_number())
        maker = maker.not_valid_before(now - timedelta(hours=1)).not_valid_after(now + timedelta(days=1))
        maker = maker.add_extension(x509.BasicConstraints(name == "authority", None), critical=True)
        if name == "server":
            address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
            maker = maker.add_extension(x509.SubjectAlternativeName([address]), critical=False)
        made = maker.sign(keys["authority"], hashes.SHA256())
        (folder / f"{name}.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    (folder / "key.pem").write_bytes(keys["server"].private_bytes(*form))
    return folder / "authority.pem", folder / "server.pem", folder / "key.pem"


def test_certificates_are_verified_and_own_authorities_named(
    brief: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    authority, certificate, key = certificates(tmp_path)
    with servers.rclone(options=["--cert", certificate, "--key", key]) as server:
        server.enter(monkeypatch)
        url = server.url("x").replace("http://", "https://")
        for name in ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("AWS_ALLOW_INVALID_CERTIFICATES", "true")
        with pytest.raises(UncheckedError, match="certificate is not trusted"):
            open_keystore(url).head("a")
        for name in ("AWS_CA_BUNDLE", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"):
            with monkeypatch.context() as patch:
                patch.setenv(name, str(authority))
                assert open_keystore(url).head("a") is None
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "absent.pem"))
        with pytest.raises(UncheckedError, match=r"SSL_CERT_FILE names .*absent\.pem"):
            open_keystore(url)


@dataclass
class Recorder:
    """A server that answers all with the same status; `seen` are the requests: method, path, headers."""

    status: int = 200
    location: str = ""
    seen: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    endpoint: str = ""


@contextmanager
def recording(recorder: Recorder) -> Iterator[Recorder]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            """Keep quiet."""

        def answer(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            recorder.seen.append(
                (self.command, self.path, {name.lower(): value for name, value in self.headers.items()})
            )
            self.send_response(recorder.status)
            for name, value in {
                "Content-Length": "2",
                "ETag": '"x"',
                "Last-Modified": "Mon, 23 Nov 2026 15:19:48 GMT",
                "Location": recorder.location + self.path,
            }.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(b"hi")

        do_GET = do_HEAD = do_PUT = do_POST = answer

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        recorder.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield recorder
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize(
    ("url", "environment"),
    [
        ("s3://bucket/x?endpoint=", {"AWS_ACCESS_KEY_ID": "KEYID", "AWS_SECRET_ACCESS_KEY": "SECRET"}),
        ("gs://bucket/x?endpoint=", {"GOOGLE_BEARER_TOKEN": "SECRET"}),
        ("az://bucket/x?account=ours&endpoint=", {"AZURE_STORAGE_ACCOUNT_KEY": "U0VDUkVU"}),
        ("az://bucket/x?account=ours&endpoint=", {"AZURE_STORAGE_TOKEN": "SECRET"}),
    ],
)
@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirect_to_another_host_drops_the_credentials(
    url: str, environment: dict[str, str], status: int, brief: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with recording(Recorder()) as other, recording(Recorder(status)) as first:
        first.location = other.endpoint.replace("127.0.0.1", "localhost")
        store = open_keystore(url + first.endpoint)
        assert read(store, "key") == b"hi"
        store.head("key")
        with pytest.raises(UncheckedError, match=str(status)):
            store.put_if_absent("key", b"content")
    assert len(other.seen) == 2  # what is written is never sent elsewhere
    assert all("authorization" in headers for _, _, headers in first.seen)
    for _, path, headers in other.seen:
        assert "authorization" not in headers
        assert not any(secret in f"{path} {headers}" for secret in ("SECRET", "U0VDUkVU", "KEYID"))


def test_a_proxy_of_the_environment_is_used(brief: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "KEYID")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "SECRET")
    with recording(Recorder()) as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.endpoint)
        monkeypatch.setenv("http_proxy", proxy.endpoint)
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://store.invalid:80/")
        assert read(open_keystore("s3://bucket/x?endpoint=http://store.invalid"), "key") == b"hi"
    assert proxy.seen[0][:2] == ("GET", "http://store.invalid/bucket/x/key")


def test_anonymous_requests_are_not_signed(brief: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "KEYID")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "SECRET")
    with recording(Recorder()) as server:
        assert read(open_keystore(f"s3://bucket/x?anonymous=true&endpoint={server.endpoint}"), "key") == b"hi"
    assert "authorization" not in server.seen[0][2]


KEY = {"AWS_ACCESS_KEY_ID": "KEYID", "AWS_SECRET_ACCESS_KEY": "SECRET"}
FOREIGN = "https://store.invalid"


@pytest.mark.parametrize(
    ("url", "environment", "variable"),
    [
        (f"gs://bucket?endpoint={FOREIGN}", {"GOOGLE_BEARER_TOKEN": "SECRET"}, "GOOGLE_BASE_URL"),
        (f"az://box?account=ours&endpoint={FOREIGN}", {"AZURE_STORAGE_TOKEN": "SECRET"}, "AZURE_STORAGE_ENDPOINT"),
        (f"az://box?account=ours&endpoint={FOREIGN}", {"AZURE_STORAGE_SAS_TOKEN": "sig=a"}, "AZURE_STORAGE_ENDPOINT"),
        (f"s3://bucket?endpoint={FOREIGN}", KEY | {"AWS_SESSION_TOKEN": "SECRET"}, "AWS_ENDPOINT_URL_S3"),
        (f"s3://bucket?endpoint={FOREIGN}", {"AWS_ROLE_ARN": "a", "AWS_WEB_IDENTITY_TOKEN_FILE": "b"}, "AWS_"),
        ("s3://bucket?endpoint=http://store.invalid", KEY, "AWS_ENDPOINT_URL_S3"),
        ("s3://bucket?endpoint=http://127.0.0.1.invalid", KEY, "AWS_ENDPOINT_URL_S3"),
    ],
)
def test_a_host_that_only_the_url_names_gets_no_secret(
    url: str, environment: dict[str, str], variable: str, brief: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match="only this URL names") as caught:
        open_keystore(url)
    assert variable in str(caught.value.hint)
    assert "SECRET" not in f"{caught.value.message}{caught.value.hint}"
    open_keystore(f"{url}&anonymous=true")
    endpoint = url.partition("endpoint=")[2]
    named = variable if variable != "AWS_" else "AWS_ENDPOINT_URL"
    monkeypatch.setenv(named, f"{endpoint}/")
    open_keystore(url)
    monkeypatch.setenv(named, f"{endpoint}.elsewhere")
    with pytest.raises(UsageError, match="only this URL names"):
        open_keystore(url)


def test_a_host_of_s3_that_the_url_names_is_taken_with_tls_and_a_lasting_key(
    brief: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, value in KEY.items():
        monkeypatch.setenv(name, value)
    open_keystore(f"s3://bucket?endpoint={FOREIGN}")
    for name in KEY:
        monkeypatch.delenv(name)
    keys = "aws_access_key_id = a\naws_secret_access_key = b\n"
    (tmp_path / "credentials").write_text(f"[lasting]\n{keys}[passing]\n{keys}aws_session_token = c\n")
    (tmp_path / "config").write_text(
        f"[profile passing]\nendpoint_url = {FOREIGN}:443\n"
        "[profile lasting]\nservices = own\n[services own]\ns3 =\n  endpoint_url = http://minio.invalid\n"
    )
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    for profile, endpoint in (("lasting", FOREIGN), ("lasting", "http://minio.invalid"), ("passing", FOREIGN)):
        open_keystore(f"s3://bucket?profile={profile}&endpoint={endpoint}")
    for profile, endpoint in (("passing", "https://else.invalid"), ("lasting", "http://else.invalid")):
        with pytest.raises(UsageError, match="only this URL names"):
            open_keystore(f"s3://bucket?profile={profile}&endpoint={endpoint}")


def test_the_endpoint_of_a_profile_is_used(brief: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with recording(Recorder()) as server:
        (tmp_path / "credentials").write_text("[work]\naws_access_key_id = KEYID\naws_secret_access_key = b\n")
        (tmp_path / "config").write_text(f"[profile work]\nregion = eu-west-1\nendpoint_url = {server.endpoint}\n")
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
        monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
        assert read(open_keystore("s3://bucket/x?profile=work"), "key") == b"hi"
    assert "Credential=KEYID/" in server.seen[0][2]["authorization"]


@pytest.mark.parametrize(
    ("url", "environment", "header", "secret"),
    [
        ("s3://bucket/x?endpoint=", KEY | {"AWS_SESSION_TOKEN": "TOKEN"}, "x-amz-security-token", "TOKEN"),
        ("az://box/x?account=ours&endpoint=", {"AZURE_STORAGE_SAS_TOKEN": "sig=TOKEN"}, "referer", "sig=TOKEN"),
    ],
)
def test_what_a_redirect_takes_along_is_known(
    url: str, environment: dict[str, str], header: str, secret: str, brief: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client cannot be told otherwise; when this fails, docs/object-stores.md has to be corrected."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with recording(Recorder()) as other, recording(Recorder(302)) as first:
        first.location = other.endpoint.replace("127.0.0.1", "localhost")
        assert read(open_keystore(url + first.endpoint), "key") == b"hi"
    path, headers = other.seen[0][1:]
    assert secret in headers[header]
    assert "authorization" not in headers
    assert "SECRET" not in f"{path} {headers}"
