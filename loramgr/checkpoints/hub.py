"""Bases on a Hugging Face hub: `hf://org/name[@revision]`, fetched into the hub's own cache."""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from loramgr.checkpoints.source import CHOICES, choose_weights, is_carried, layer_folders, shard_names
from loramgr.errors import IntegrityError, NotFoundError, UncheckedError, UsageError

__all__ = ["FetchedModel", "HubAddress", "fetch", "parse_address"]

SCHEME = "hf://"
_ADDRESS = re.compile(r"hf://([\w.-]+(?:/[\w.-]+)?)(?:@([^@\s]+))?")


@dataclass(frozen=True, slots=True)
class HubAddress:
    """A repository on the hub; `revision` is a branch, tag or commit, None for the main branch."""

    repository: str
    revision: str | None

    def __str__(self) -> str:
        return SCHEME + self.repository + (f"@{self.revision}" if self.revision else "")


class FetchedModel(NamedTuple):
    """A model in the hub's cache: its folder, and the commit that it is."""

    folder: Path
    commit: str


def parse_address(source: str) -> HubAddress:
    """Read `hf://org/name[@revision]`; UsageError for anything else."""
    match = _ADDRESS.fullmatch(source)
    if match is None:
        raise UsageError(f"{source!r} is not an address on the hub", "write hf://org/name or hf://org/name@revision")
    return HubAddress(match[1], match[2])


def fetch(source: str) -> FetchedModel:
    """Download what a base needs of a repository: one format of the weights, configuration, tokenizer and the like.

    With HF_HUB_OFFLINE set, what the cache holds is returned. Raises NotFoundError for a repository or revision that
    is not there, UncheckedError when the hub cannot be reached or asks for an access that this machine has not.
    """
    from huggingface_hub import constants

    address = parse_address(source)
    with _worded(address):
        return _cached(address) if constants.HF_HUB_OFFLINE else _download(address)


def _download(address: HubAddress) -> FetchedModel:
    from huggingface_hub import HfApi, snapshot_download

    found = HfApi().model_info(address.repository, revision=address.revision)
    if not found.sha:
        raise UncheckedError(f"{address}: the hub does not say which commit this is")
    names = {sibling.rfilename for sibling in found.siblings or ()}
    pinned = HubAddress(address.repository, found.sha)
    wanted = sorted(glob.escape(name) for name in _wanted(pinned, names))
    # by the revision's own name, not by the commit: the cache then knows offline which commit that name was
    folder = Path(snapshot_download(address.repository, revision=address.revision, allow_patterns=wanted))
    if folder.name != found.sha:
        raise UncheckedError(f"{address}: the revision moved to another commit while it was read", "try again")
    return FetchedModel(folder, found.sha)


def _wanted(address: HubAddress, names: set[str]) -> set[str]:
    """Return the files of the repository that make the model."""
    top = {name for name in names if "/" not in name}
    index_name, single = choose_weights(top, str(address))
    if index_name is None:
        weights = {str(single)}
    else:
        shards = shard_names(_read_index(_read_file(address, index_name), f"{address}: {index_name}"), str(address))
        weights = {index_name, *shards}
    missing = sorted(weights - names)
    if missing:
        raise IntegrityError(f"{address}: the repository lacks {missing[0]}, which its index names")
    whole = layer_folders(_read_file(address, "modules.json")) if "modules.json" in names else frozenset()
    carried = {name for name in names if is_carried(name, whole)}
    return weights | carried | ({"config.json"} & names)


def _read_file(address: HubAddress, name: str) -> bytes:
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(address.repository, name, revision=address.revision)).read_bytes()


def _read_index(data: bytes, where: str) -> dict[str, Any]:
    try:
        content = json.loads(data)
    except ValueError as error:
        raise IntegrityError(f"{where}: not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise IntegrityError(f"{where}: not a JSON object")
    return content


def _cached(address: HubAddress) -> FetchedModel:
    """Find the snapshot in the cache by a file that every model has; the client itself asks for files never wanted."""
    from huggingface_hub import try_to_load_from_cache

    for name in ("config.json", *(f"{single}{index}" for single in CHOICES for index in ("", ".index.json"))):
        found = try_to_load_from_cache(address.repository, name, revision=address.revision)
        if isinstance(found, str):
            folder = Path(found).parent
            return FetchedModel(folder, folder.name)
    raise UncheckedError(
        f"{address}: not in the local cache, and the hub is not asked while HF_HUB_OFFLINE is set",
        "try again with a connection and without HF_HUB_OFFLINE",
    )


@contextmanager
def _worded(address: HubAddress) -> Iterator[None]:
    """Turn what the hub's client raises into errors for the person."""
    from huggingface_hub import errors

    try:
        yield
    except errors.HFValidationError as error:
        raise UsageError(f"{address}: {error}") from error
    except errors.GatedRepoError as error:
        raise UncheckedError(
            f"{address}: the repository asks for its terms to be accepted first",
            f"accept them on the page of {address.repository}, then run hf auth login",
        ) from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        what = "revision" if isinstance(error, errors.RevisionNotFoundError) else "repository"
        raise NotFoundError(
            f"{address}: no such {what} on the hub", "check the name; for a private repository run hf auth login"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise UncheckedError(
            f"{address}: not in the local cache, and the hub cannot be asked: {_first_line(error)}",
            "try again when the hub can be reached",
        ) from error
    except errors.EntryNotFoundError as error:
        raise IntegrityError(f"{address}: the repository lacks a file that it lists: {_first_line(error)}") from error
    except _transport_errors() as error:
        denied = getattr(getattr(error, "response", None), "status_code", None) in (401, 403)
        hint = "hf auth login" if denied else "try again when the hub can be reached"
        raise UncheckedError(f"{address}: the hub cannot be asked: {_first_line(error)}", hint) from error


def _transport_errors() -> tuple[type[Exception], ...]:
    """Return what the client and its HTTP library raise; which library that is depends on the client's version."""
    from huggingface_hub import errors

    failed: type[Exception] = errors.HfHubHTTPError
    library = [base for base in failed.__mro__ if base.__name__ in ("HTTPError", "RequestException")]
    return (failed, ConnectionError, TimeoutError, *library)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
