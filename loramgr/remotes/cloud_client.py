"""Clients of object stores, made from the URL of a remote and the credentials of its own environment.

They come from the package obstore, which the extra `cloud` installs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from loramgr.errors import IncompatibleError, UncheckedError, UsageError
from loramgr.remotes.cloud_endpoints import check_endpoint, named_endpoint
from loramgr.remotes.retrying import (
    BASE,
    FIRST_PAUSE_SECONDS,
    GIVE_UP_SECONDS,
    LONGEST_PAUSE_SECONDS,
    RETRIES,
)
from loramgr.remotes.urls import RemoteUrl

if TYPE_CHECKING:
    from obstore.store import AzureStore, GCSStore, S3Store

    Client: TypeAlias = S3Store | GCSStore | AzureStore

__all__ = ["CloudClients", "connect", "silent_seconds"]

_SILENT_SECONDS = 60.0
_CONNECT_SECONDS = 10.0
_WHOLE_REQUEST = timedelta(hours=12)  # what a slow line may take for a large file; silence is what ends a request
_AUTHORITIES = ("AWS_CA_BUNDLE", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE")
_AWS_KEYS = (
    "AWS_ACCESS_KEY_ID",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    "AWS_SKIP_SIGNATURE",
)
_AWS_TOKENS = ("AWS_SESSION_TOKEN", "AWS_TOKEN")
_AZURE_PLACES = ("AZURE_STORAGE_ACCOUNT_NAME", "AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT")
_GOOGLE_SCOPE = "https://www.googleapis.com/auth/devstorage.read_write"
_VARIABLES = {
    "s3": "look at the variables AWS_…",
    "gs": "look at GOOGLE_APPLICATION_CREDENTIALS and the other variables GOOGLE_…",
    "az": "look at AZURE_STORAGE_ACCOUNT_KEY and the other variables AZURE_…",
}


@dataclass(frozen=True, slots=True)
class CloudClients:
    """Two clients of one place: `patient` tries failed requests again by itself, `single` makes each only once."""

    patient: Client
    single: Client


def connect(url: RemoteUrl) -> CloudClients:
    """Make the clients; nothing is sent yet.

    Raises IncompatibleError where a package is missing, UsageError for a profile or account that is missing and for
    credentials that would go to a host which only the URL names, and UncheckedError for settings in the environment
    that cannot be used.
    """
    if find_spec("obstore") is None:
        raise IncompatibleError(f"{url}: object stores need the package obstore", "pip install 'loramgr[cloud]'")
    from obstore.exceptions import BaseError

    make = {"s3": _s3, "gs": _google, "az": _azure}[url.kind]
    settings = make(url)
    try:
        return CloudClients(settings.client(RETRIES), settings.client(0))
    except (BaseError, ValueError):
        message = f"{url}: the credentials in the environment cannot be used"
        raise UncheckedError(message, _VARIABLES[url.kind]) from None  # what it says may repeat their values


@dataclass(frozen=True, slots=True)
class _Settings:
    """What a client is made from, but for how often it tries again."""

    make: Callable[..., Client]
    url: RemoteUrl
    config: dict[str, object]
    endpoint: str
    provider: object = None

    def client(self, retries: int) -> Client:
        backoff = {
            "init_backoff": timedelta(seconds=FIRST_PAUSE_SECONDS),
            "max_backoff": timedelta(seconds=LONGEST_PAUSE_SECONDS),
            "base": BASE,
        }
        return self.make(
            self.url.place,
            prefix=self.url.prefix or None,
            config=self.config,
            client_options=_client_options(self.url, self.endpoint),
            retry_config={
                "max_retries": retries,
                "retry_timeout": timedelta(seconds=GIVE_UP_SECONDS),
                "backoff": backoff,
            },
            credential_provider=self.provider,
        )


def _client_options(url: RemoteUrl, endpoint: str) -> dict[str, object]:
    """Return how to speak HTTP; what the environment says against verified certificates does not count."""
    options: dict[str, object] = {
        "allow_http": endpoint.startswith("http://"),
        "allow_invalid_certificates": False,
        "connect_timeout": timedelta(seconds=min(_CONNECT_SECONDS, silent_seconds(url))),
        "read_timeout": timedelta(seconds=silent_seconds(url)),
        "timeout": _WHOLE_REQUEST,
    }
    for name in _AUTHORITIES:
        if bundle := os.environ.get(name):
            options["root_certificate"] = _read_bundle(name, Path(bundle))
            break
    return options


def silent_seconds(url: RemoteUrl) -> float:
    """Return how long a store may say nothing before a request counts as failed."""
    return float(url.option("timeout") or _SILENT_SECONDS)


def _read_bundle(name: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UncheckedError(f"{name} names {path}, which cannot be read: {error.strerror}") from error


def _s3(url: RemoteUrl) -> _Settings:
    from obstore.store import S3Store

    provider, own = (None, "") if url.option("anonymous") else _profile(url)
    named = named_endpoint("s3") or own
    check_endpoint(url, (named, own), signed_only=_has_lasting_key(provider))
    endpoint = url.option("endpoint") or named
    region = _first(url.option("region"), "AWS_REGION", "AWS_DEFAULT_REGION")
    config = _given({"endpoint": endpoint, "region": region}) | _anonymous(url)
    return _Settings(S3Store, url, config, endpoint, provider)


def _has_lasting_key(provider: object) -> bool:
    """Say whether requests are signed with a key that has no session token, None standing for the environment's."""
    if provider is None:
        key = all(os.environ.get(name) for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"))
        return key and not any(os.environ.get(name) for name in _AWS_TOKENS)
    from botocore.credentials import Credentials

    found = getattr(provider, "credentials", None)
    return (
        found is not None and type(found) is Credentials and not found.token
    )  # those of roles and logins are of other classes


def _profile(url: RemoteUrl) -> tuple[object, str]:
    """Return the credentials and the endpoint of a profile of AWS's own files.

    That is one that is named, or the default one where nothing else is set; else None. The endpoint is empty where it
    names none.
    """
    profile = _first(url.option("profile"), "AWS_PROFILE", "AWS_DEFAULT_PROFILE")
    files = ("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials"), ("AWS_CONFIG_FILE", "~/.aws/config")
    written = any(Path(os.environ.get(name, usual)).expanduser().is_file() for name, usual in files)
    if not profile and (any(os.environ.get(name) for name in _AWS_KEYS) or not written):
        return None, ""
    if find_spec("boto3") is None:
        raise IncompatibleError(f"{url}: profiles of AWS need the package boto3", "pip install boto3")
    import boto3
    from botocore.exceptions import BotoCoreError
    from botocore.session import Session
    from obstore.auth.boto3 import Boto3CredentialProvider

    session = Session(profile=profile or None)
    try:
        provider = Boto3CredentialProvider(boto3.Session(botocore_session=session))
        return provider, _profile_endpoint(session.get_scoped_config(), session.full_config)
    except (BotoCoreError, ValueError) as error:
        message = f"{url}: the profile {profile or 'default'} of AWS has no credentials"
        raise UsageError(message, "aws configure") from error


def _profile_endpoint(profile: Mapping[str, Any], everything: Mapping[str, Any]) -> str:
    """Return the endpoint that a profile names for S3 or, where it does not, for all services."""
    services = everything.get("services", {}).get(profile.get("services"), {})
    own = services.get("s3", {})
    found = (own.get("endpoint_url") if isinstance(own, dict) else None) or profile.get("endpoint_url")
    return found if isinstance(found, str) else ""


def _google(url: RemoteUrl) -> _Settings:
    from obstore.store import GCSStore

    named = named_endpoint("gs")
    check_endpoint(url, (named,))
    endpoint = url.option("endpoint") or named
    own = any(name.startswith("GOOGLE_") and value for name, value in os.environ.items())
    provider: object = None
    if not (own or url.option("anonymous")) and _installed("google.auth"):
        provider = _google_login()
    return _Settings(GCSStore, url, _given({"base_url": endpoint}) | _anonymous(url), endpoint, provider)


def _google_login() -> object:
    """Return the credentials that google-auth finds on this machine, None where it finds none."""
    import google.auth
    from google.auth.exceptions import DefaultCredentialsError
    from obstore.auth.google import GoogleCredentialProvider

    try:
        return GoogleCredentialProvider(google.auth.default(scopes=[_GOOGLE_SCOPE])[0])
    except DefaultCredentialsError:
        return None


def _azure(url: RemoteUrl) -> _Settings:
    from obstore.store import AzureStore

    account = _first(url.option("account"), "AZURE_STORAGE_ACCOUNT_NAME")
    named = named_endpoint("az")
    check_endpoint(url, (named,))
    endpoint = url.option("endpoint") or named
    if not account:
        raise UsageError(f"{url}: the storage account is missing", f"az://{url.place}/{url.prefix}?account=NAME")
    own = any(name.startswith("AZURE_") and value for name, value in os.environ.items() if name not in _AZURE_PLACES)
    provider: object = None
    if not (own or url.option("anonymous")) and _installed("azure.identity"):
        from obstore.auth.azure import AzureCredentialProvider

        provider = AzureCredentialProvider()
    config = _given({"account_name": account, "endpoint": endpoint}) | _anonymous(url)
    return _Settings(AzureStore, url, config, endpoint, provider)


def _first(value: str | None, *variables: str) -> str:
    """Return the value, or the first of the variables that is set; empty where there is none."""
    return value or next((found for name in variables if (found := os.environ.get(name))), "")


def _given(config: Mapping[str, str]) -> dict[str, object]:
    return {name: value for name, value in config.items() if value}


def _anonymous(url: RemoteUrl) -> dict[str, object]:
    return {"skip_signature": True} if url.option("anonymous") else {}


def _installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:  # what it lies in is missing as well
        return False
