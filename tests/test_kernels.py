"""The laws of the kernels hold in Triton's interpreter, which has to be chosen before Triton is imported.

`kernel_faults.py` breaks merges in memory around the kernels.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed (pip install loramgr[gpu])")
@pytest.mark.parametrize("file", ["kernel_laws.py", "kernel_faults.py"])
def test_the_kernels_keep_their_laws_in_the_interpreter(file: str, root: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", f"tests/{file}"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-1000:]
    assert " passed" in run.stdout
