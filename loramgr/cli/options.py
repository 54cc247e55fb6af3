"""Arguments and options that several commands share, and how their values are parsed."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import click

__all__ = [
    "age",
    "base_argument",
    "connections_option",
    "device_option",
    "dry_run_option",
    "flags",
    "folder_argument",
    "force_option",
    "hint_options",
    "initial_option",
    "jobs_option",
    "measurement",
    "name_argument",
    "pair",
    "part",
    "plot_option",
    "ref_argument",
    "start_option",
    "yes_option",
]


def pair(text: str) -> tuple[str, str]:
    """Split KEY=VALUE at the first equals sign; the value may be empty, a missing key or sign is a usage error."""
    key, sign, value = text.partition("=")
    if not (key and sign):
        raise click.BadParameter(f"{text!r} is not of the form KEY=VALUE.")
    return key, value


def measurement(text: str) -> tuple[str, float]:
    """Split KEY=NUMBER; a usage error where it is not one."""
    key, value = pair(text)
    try:
        return key, float(value)
    except ValueError as error:
        raise click.BadParameter(f"{value!r} in {text!r} is not a number.") from error


def age(text: str) -> timedelta:
    """Read 0, 30m, 24h or 7d; a usage error for anything else."""
    match = re.fullmatch(r"([0-9]{1,6})([smhd])|(0)", text)
    if match is None:
        raise click.BadParameter(f"{text!r} is not an age: write 0, 30m, 24h or 7d.")
    units = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}
    return timedelta(**{units[match[2]]: int(match[1])}) if match[2] else timedelta(0)


def part(text: str) -> tuple[int, int]:
    """Read N/T, the N-th of T parts; a usage error where there is no such part."""
    match = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise click.BadParameter(f"{text!r} is not a part: write N/T, from 1/T to T/T.")
    return int(match[1]), int(match[2])


def flags(text: str) -> tuple[bool, ...]:
    """Read true,false,true; a usage error for anything else."""
    words = {"true": True, "1": True, "false": False, "0": False}
    parts = [part.strip().lower() for part in text.split(",")]
    if not all(part in words for part in parts):
        raise click.BadParameter(f"{text!r} is not a list of true and false: write true,false,true.")
    return tuple(words[part] for part in parts)


def hint_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that say what the files of some formats do not."""
    alpha = click.option("--alpha", type=float, metavar="N", help="The lora_alpha of files that do not say it.")
    slices = click.option(
        "--enable-lora",
        type=flags,
        metavar="true,false,…",
        help="The slices of fused weights with factors, for loralib's MergedLinear.",
    )
    return alpha(slices(command))


def start(text: str) -> Path | Literal["base"]:
    """Return the path, or the word base; a folder of that name is ./base."""
    return "base" if text == "base" else Path(text)


_folder = click.Path(path_type=Path)

initial_option = click.option(
    "--initial",
    type=_folder,
    metavar="PATH",
    help="The adapter before its training, of one that began by changing the base (PiSSA, OLoRA, CorDA, LoRA-GA).",
)

start_option = click.option(
    "--initial",
    type=start,
    metavar="PATH|base",
    help="The adapter before its training, of one that began by changing the base (PiSSA, OLoRA, CorDA, LoRA-GA); "
    "`base`: compute it of the base (PiSSA, OLoRA).",
)

ref_argument = click.argument("ref")
name_argument = click.argument("name")
base_argument = click.argument("base")
folder_argument = click.argument("folder", metavar="DIR", type=_folder)
force_option = click.option("--force", is_flag=True, help="Go on where a person may know better.")
dry_run_option = click.option("--dry-run", is_flag=True, help="Show what would be removed; remove nothing.")
yes_option = click.option("--yes", is_flag=True, help="Do not ask; needed where no terminal is there to answer.")
jobs_option = click.option("--jobs", type=click.IntRange(min=1), help="Threads to use.  [default: one per core]")
connections_option = click.option(
    "--jobs", type=click.IntRange(min=1), help="Transfers at once.  [default: 8, or one per core where these are more]"
)
device_option = click.option(
    "--device",
    envvar="LORAMGR_DEVICE",
    default="auto",
    metavar="auto|cpu|cuda[:N]|mps",
    help="Where to compute.  [env LORAMGR_DEVICE; default: auto]",
)
plot_option = click.option(
    "--plot",
    metavar="FILE",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write a picture too: .png, .svg or .pdf.  [needs loramgr[plot]]",
)
