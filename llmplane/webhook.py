"""The webhooks of the API server: objects are checked as by `llmplane validate`, pods get their proxies.

What they are asked is what they may see: no answer depends on anything else, so they need no credentials of
the one who asks. Objects are checked one by one; what concerns several of them (a provider that is not there,
two for one host) is in their status, for the order in which they are applied means nothing.
"""

import asyncio
import base64
import json
from collections.abc import Callable, Mapping
from typing import Any

import structlog
from aiohttp import web

from crds.loader import load_object
from crds.problems import Severity
from llmplane.address import Address, AddressInUseError
from llmplane.auth import ServerCertificate
from llmplane.httpserver import runner_of
from llmplane.injection import InjectionError, InjectionSettings, inject
from llmplane.kubeapi import Api, ApiError
from llmplane.kubestatus import MANAGER
from llmplane.leader import RENEW, Leader
from llmplane.sources.kubernetes import readable_keys

_LOG = structlog.get_logger(__name__)

_MOST = 8 * 2**20
"""Bytes of a question: an object of at most 1.5 MiB, and what it was before."""
_GROUP = "/apis/admissionregistration.k8s.io/v1"
_CONFIGURATIONS = (
    f"{_GROUP}/mutatingwebhookconfigurations/llmplane",
    f"{_GROUP}/validatingwebhookconfigurations/llmplane",
    f"{_GROUP}/validatingwebhookconfigurations/llmplane-istio",
)
_NOT_FOUND = 404

_Answer = dict[str, Any]


def validated(request: Mapping[str, Any]) -> _Answer:
    """Say whether an object may be what it shall become (AdmissionRequest in, AdmissionResponse out).

    What was wrong before may stay wrong in an edit that does not touch it: a label can be set, and the object
    can be deleted.
    """
    document = request.get("object") or {}
    item, problems = load_object(document)
    problems += tuple(readable_keys(item))
    errors = [str(each) for each in problems if each.severity is Severity.ERROR]
    warnings = [str(each).removeprefix("warning: ") for each in problems if each.severity is Severity.WARNING]
    before = request.get("oldObject") or {}
    is_untouched = bool(before) and before.get("spec") == document.get("spec")
    if errors and not is_untouched:
        return _refused("\n".join(errors))
    return {"allowed": True, "warnings": [*errors, *warnings]}


def injected(request: Mapping[str, Any], settings: InjectionSettings) -> _Answer:
    """Say what a Pod gets (AdmissionRequest in, AdmissionResponse out)."""
    pod = request.get("object") or {}
    try:
        made = inject(pod, settings)
    except InjectionError as error:
        return _refused(str(error))
    if made is None:
        return {"allowed": True}
    patch = [
        {"op": "add", "path": "/metadata/annotations", "value": made["metadata"]["annotations"]},
        {"op": "add", "path": "/spec", "value": made["spec"]},
    ]
    encoded = base64.b64encode(json.dumps(patch).encode()).decode()
    return {"allowed": True, "patchType": "JSONPatch", "patch": encoded}


def _refused(message: str) -> _Answer:
    return {"allowed": False, "status": {"code": 422, "reason": "Invalid", "message": message}}


class WebhookServer:
    """Answers the API server at /validate and /inject (AdmissionReview, admission.k8s.io/v1)."""

    def __init__(self, certificate: ServerCertificate, settings: Callable[[], InjectionSettings]) -> None:
        self._certificate = certificate
        self._settings = settings
        app = web.Application(client_max_size=_MOST)
        app.router.add_post("/validate", self._validate)
        app.router.add_post("/inject", self._inject)
        self._runner = runner_of(app)

    async def start(self, address: Address) -> None:
        """Listen. Raises AddressInUseError."""
        await self._runner.setup()
        context = self._certificate.context()
        try:
            await web.TCPSite(self._runner, address.host, address.port, ssl_context=context).start()
        except OSError as error:
            raise AddressInUseError.of("--webhook-address", address, error) from None

    async def stop(self) -> None:
        """Close all connections."""
        await self._runner.cleanup()

    async def _validate(self, request: web.Request) -> web.Response:
        return await _reviewed(request, validated)

    async def _inject(self, request: web.Request) -> web.Response:
        return await _reviewed(request, lambda asked: injected(asked, self._settings()))


async def _reviewed(http: web.Request, decide: Callable[[Mapping[str, Any]], _Answer]) -> web.Response:
    try:
        review = json.loads(await http.read())
        asked, uid = review["request"], review["request"]["uid"]
    except (ValueError, LookupError, TypeError):
        raise web.HTTPBadRequest(text="is no AdmissionReview\n") from None
    answer = decide(asked)
    if not answer["allowed"]:
        where = {name: asked.get(name) for name in ("operation", "namespace", "name")}
        _LOG.info("refused", message=answer["status"]["message"], **where)
    kind = {"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview"}
    return web.json_response({**kind, "response": {"uid": uid, **answer}})


async def keep_trusted(api: Api, leader: Leader, bundle: Callable[[], str]) -> None:
    """Tell the API server, as long as the leader, which authorities the webhooks' certificates are of."""
    while True:
        if leader.is_leading:
            for path in _CONFIGURATIONS:
                try:
                    await _trust(api, path, bundle())
                except ApiError as error:
                    _LOG.warning("a webhook configuration cannot be written", path=path, problem=str(error))
        await asyncio.sleep(RENEW if leader.is_leading else 1)


async def _trust(api: Api, path: str, bundle: str) -> None:
    try:
        found = await api.get(path)
    except ApiError as error:
        if error.status == _NOT_FOUND:  # not everybody wants each of them
            return
        raise
    wanted = base64.b64encode(bundle.encode()).decode()
    webhooks = found.get("webhooks") or ()
    if all(each["clientConfig"].get("caBundle") == wanted for each in webhooks):
        return
    body = {
        "apiVersion": "admissionregistration.k8s.io/v1",
        "kind": found["kind"],
        "metadata": {"name": found["metadata"]["name"]},
        "webhooks": [{"name": each["name"], "clientConfig": {"caBundle": wanted}} for each in webhooks],
    }
    await api.apply(path, body, MANAGER)
    _LOG.info("the API server trusts the webhooks", path=path)
