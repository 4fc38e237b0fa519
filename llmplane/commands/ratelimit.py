"""``llmplane ratelimit``: the rate limit service."""

import asyncio
from pathlib import Path

import click

from llmplane import ratelimit
from llmplane.address import Address, AddressInUseError
from llmplane.auth import ClientCA, CredentialsError, FileAuthenticator, ServerCertificate, TokenFile
from llmplane.counters import MemoryCounters, RedisCounters
from llmplane.options import EXISTING_FILE, AddressType
from llmplane.process import log_to_stderr, stopped_by_signal
from xds.server import Authenticator


@click.command("ratelimit", short_help="Count for limits that several Envoys share.")
@click.option(
    "--address",
    type=AddressType(),
    default="127.0.0.1:18081",
    show_default=True,
    help="Where Envoys ask (gRPC); envoyRateLimit in the mesh configuration's extensionProviders names it.",
)
@click.option(
    "--admin-address",
    type=AddressType(),
    default="127.0.0.1:18082",
    show_default=True,
    help="Where /healthz, /readyz and /metrics answer.",
)
@click.option(
    "--redis-url",
    envvar="LLMPLANE_REDIS_URL",
    show_envvar=True,
    metavar="URL",
    help="Keep the counters in this Redis (redis://HOST:PORT, rediss:// with TLS, unix:///PATH), which "
    "several of these servers may share; a password in it is better given by the variable. Without it they "
    "are in memory, and gone when this process ends. Needs the package redis: pip install "
    "'llmplane[ratelimit]'.",
)
@click.option(
    "--cert-file",
    type=EXISTING_FILE,
    metavar="FILE",
    help="Serve TLS, with this certificate chain (PEM). This file and those below are read again when they "
    "change.",
)
@click.option("--key-file", type=EXISTING_FILE, metavar="FILE", help="Key of --cert-file (PEM).")
@click.option(
    "--client-ca-file",
    type=EXISTING_FILE,
    metavar="FILE",
    help="Mutual TLS: only Envoys with a certificate of this CA (PEM) may ask; it names a workload, as with "
    "`llmplane serve --xds-client-ca-file`.",
)
@click.option(
    "--token-file",
    type=EXISTING_FILE,
    metavar="FILE",
    help="Only those with a token of this file may ask. It has the form of `llmplane serve "
    "--xds-token-file`. Needs TLS, or loopback.",
)
@click.option(
    "--insecure",
    is_flag=True,
    help="Allow an --address that other machines reach without authentication: whoever connects can use up "
    "limits and give them back.",
)
def ratelimit_command(
    *,
    address: Address,
    admin_address: Address,
    redis_url: str | None,
    cert_file: Path | None,
    key_file: Path | None,
    client_ca_file: Path | None,
    token_file: Path | None,
    insecure: bool,
) -> None:
    """Count tokens for policies of mode Global: a rate limit service that Envoys ask.

    It has no configuration: each request brings its limit. Where counters cannot be used, the policy's
    failOpen decides; when Redis works again, so does this.
    """
    if (cert_file is None) != (key_file is None):
        raise click.UsageError("--cert-file and --key-file belong together")
    if client_ca_file and not cert_file:
        raise click.UsageError("--client-ca-file needs --cert-file: it is for mutual TLS")
    if token_file and not cert_file and not address.is_loopback:
        raise click.UsageError("--token-file needs --cert-file: tokens travel in clear without TLS")
    if not (address.is_loopback or client_ca_file or token_file or insecure):
        raise click.UsageError(
            f"--address {address}: other machines reach it; give --client-ca-file or --token-file, or "
            "--insecure if only trusted ones can"
        )
    log_to_stderr()
    try:
        certificate = None
        if cert_file and key_file:
            certificate = ServerCertificate(cert_file, key_file, client_ca_file)
        authenticator = None
        if client_ca_file or token_file:
            tokens = TokenFile(token_file) if token_file else None
            client_ca = ClientCA(client_ca_file) if client_ca_file else None
            authenticator = FileAuthenticator(tokens, client_ca)
        asyncio.run(_ratelimit(redis_url, address, admin_address, certificate, authenticator))
    except (AddressInUseError, CredentialsError) as error:
        raise click.ClickException(str(error)) from None


async def _ratelimit(
    redis_url: str | None,
    address: Address,
    admin_address: Address,
    certificate: ServerCertificate | None,
    authenticator: Authenticator | None,
) -> None:
    try:
        counters = RedisCounters(redis_url) if redis_url else MemoryCounters()
    except ImportError:
        text = "--redis-url needs the package redis: pip install 'llmplane[ratelimit]'"
        raise click.ClickException(text) from None
    except ValueError:  # its text has the URL, which may hold a password
        text = "--redis-url cannot be used: it is redis://HOST:PORT, rediss://HOST:PORT or unix:///PATH"
        raise click.ClickException(text) from None
    credentials = certificate.credentials() if certificate else None
    await ratelimit.run(
        counters,
        address,
        admin_address,
        stopped_by_signal(),
        credentials=credentials,
        authenticator=authenticator,
    )
