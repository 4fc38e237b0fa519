"""``llmplane inject``: sidecars in the pods of Kubernetes files."""

from pathlib import Path
from typing import TextIO

import click
import yaml

from llmplane.address import Address
from llmplane.injection import InjectionError, InjectionSettings, inject_documents
from llmplane.mesh import read_certificates
from llmplane.options import EXISTING_FILE, PROXY_IMAGE, AddressType


@click.command("inject", short_help="Put sidecars into the pods of Kubernetes files.")
@click.option(
    "-f",
    "--filename",
    type=click.File(encoding="utf-8"),
    required=True,
    metavar="FILE",
    help="YAML with Deployments, StatefulSets, Jobs, Pods ...; `-` is standard input.",
)
@click.option(
    "--xds-address",
    type=AddressType(),
    default="llmplane.llmplane-system.svc:18000",
    show_default=True,
    help="Where the control plane is, as seen from the pods.",
)
@click.option(
    "--xds-ca-file",
    type=EXISTING_FILE,
    required=True,
    metavar="FILE",
    help="The CAs that its certificate is of (PEM). Those of a cluster: kubectl get "
    "mutatingwebhookconfiguration llmplane -o jsonpath='{.webhooks[0].clientConfig.caBundle}' | base64 -d",
)
@PROXY_IMAGE
def inject_command(filename: TextIO, xds_address: Address, xds_ca_file: Path, proxy_image: str) -> None:
    """Print FILE with a sidecar in each of its pods, as the webhook would make it.

    What is no pod, has a sidecar already, or says `sidecar.istio.io/inject: "false"` stays as it is.
    """
    ca = read_certificates(xds_ca_file).decode(errors="replace")
    try:
        settings = InjectionSettings(proxy_image, xds_address, ca)
        click.echo(inject_documents(filename.read(), settings), nl=False)
    except (InjectionError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise click.ClickException(f"{filename.name}: {error}") from None
