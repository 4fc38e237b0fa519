"""An API server that is a few lines: lists in pages, watches with bookmarks, conflicts, and faults on demand.

What it does was seen on a real one (1.36). Objects are plain dicts; what a test puts is seen by watchers.
"""

import asyncio
import copy
import itertools
import json
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from aiohttp import web

from llmplane.kubeapi import Api

_PLURALS = {
    "llmproviders": ("istio.alibabacloud.com/v1beta1", "LLMProvider"),
    "llmroutes": ("istio.alibabacloud.com/v1beta1", "LLMRoute"),
    "apikeyauthentications": ("istio.alibabacloud.com/v1beta1", "APIKeyAuthentication"),
    "llmtokenratelimits": ("istio.alibabacloud.com/v1beta1", "LLMTokenRateLimit"),
    "gateways": ("networking.istio.io/v1", "Gateway"),
    "authorizationpolicies": ("security.istio.io/v1", "AuthorizationPolicy"),
    "requestauthentications": ("security.istio.io/v1", "RequestAuthentication"),
    "telemetries": ("telemetry.istio.io/v1", "Telemetry"),
    "services": ("v1", "Service"),
    "secrets": ("v1", "Secret"),
    "configmaps": ("v1", "ConfigMap"),
    "leases": ("coordination.k8s.io/v1", "Lease"),
    "pods": ("v1", "Pod"),
    "customresourcedefinitions": ("apiextensions.k8s.io/v1", "CustomResourceDefinition"),
    "events": ("events.k8s.io/v1", "Event"),
    "tokenreviews": ("authentication.k8s.io/v1", "TokenReview"),
}
_GONE = {"kind": "Status", "code": 410, "reason": "Expired", "message": "too old resource version"}

Refuse = Callable[[web.Request], web.Response | None]


class FakeApi:
    """The objects, and what happens to requests."""

    def __init__(self) -> None:
        self.url = ""
        self.objects: dict[tuple[str, str, str], dict[str, Any]] = {}
        """By plural, namespace and name."""
        self.requests: Counter[str] = Counter()
        """`LIST plural`, `WATCH plural`, `PATCH plural` ..."""
        self.missing: set[str] = set()
        """Plurals that the cluster does not have."""
        self.refuse: Refuse | None = None
        """Answers a request in place of the server."""
        self.hangs = False
        """Requests are not answered."""
        self.page = 500
        self._version = 1
        self._oldest = 0
        self._log: list[tuple[int, str, str, dict[str, Any]]] = []
        self._news = asyncio.Condition()
        self._pages: dict[str, list[dict[str, Any]]] = {}
        self._streams: set[asyncio.Task[Any]] = set()
        self._uids = itertools.count(1)
        self._managers: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
        self.token = ""
        """The token that requests must have, if not empty."""
        self.tokens: dict[str, tuple[str, str, str]] = {}
        """NAMESPACE:SERVICEACCOUNT, Pod and its uid, by the tokens that a TokenReview finds good."""

    async def put(self, *texts: str) -> None:
        """Make objects (YAML) what they are now; their generation counts changes of the spec."""
        for text in texts:
            for document in yaml.safe_load_all(text):
                if document:
                    await self.put_object(document)

    async def put_object(self, document: dict[str, Any]) -> dict[str, Any]:
        """Make one object what it is now."""
        plural = next(name for name, (_, kind) in _PLURALS.items() if kind == document["kind"])
        metadata = document.setdefault("metadata", {})
        key = (plural, metadata.setdefault("namespace", "default"), metadata["name"])
        before = self.objects.get(key)
        kept = before["metadata"] if before else {}
        metadata["uid"] = kept.get("uid") or f"uid-{next(self._uids)}"
        metadata["creationTimestamp"] = kept.get("creationTimestamp") or datetime.now(UTC).isoformat()
        if before is None or before.get("spec") != document.get("spec"):
            metadata["generation"] = kept.get("generation", 0) + 1
        else:
            metadata["generation"] = kept["generation"]
        self.objects[key] = document
        await self._tell("MODIFIED" if before else "ADDED", plural, document)
        return document

    async def delete(self, plural: str, name: str, namespace: str = "default") -> None:
        """Delete an object."""
        await self._tell("DELETED", plural, self.objects.pop((plural, namespace, name)))

    async def bookmark(self) -> None:
        """Send a bookmark to all watchers."""
        self._version += 1
        version = {"metadata": {"resourceVersion": str(self._version)}}
        async with self._news:
            self._log.append((self._version, "BOOKMARK", "", version))
            self._news.notify_all()

    def forget_history(self) -> None:
        """Refuse watches that begin before now, as after a restart or a compaction."""
        self._oldest = self._version
        self._log.clear()
        self._pages.clear()

    async def cut(self) -> None:
        """Break all watches off."""
        for stream in list(self._streams):
            stream.cancel()
        await asyncio.gather(*self._streams, return_exceptions=True)

    def get(self, plural: str, name: str, namespace: str = "default") -> dict[str, Any]:
        """Return an object."""
        return self.objects[plural, namespace, name]

    async def _tell(self, event: str, plural: str, document: dict[str, Any]) -> None:
        self._version += 1
        document["metadata"]["resourceVersion"] = str(self._version)
        async with self._news:
            self._log.append((self._version, event, plural, copy.deepcopy(document)))
            self._news.notify_all()

    async def handle(  # noqa: PLR0911 - one for each outcome
        self, request: web.Request
    ) -> web.StreamResponse:
        """Answer a request."""
        if self.hangs:
            await asyncio.Event().wait()
        parts = request.path.strip("/").split("/")
        parts = parts[2:] if parts[0] == "api" else parts[3:]
        namespace = ""
        if parts[0] == "namespaces":
            namespace, parts = parts[1], parts[2:]
        plural, *rest = parts
        api_version = request.path.removeprefix("/apis/").removeprefix("/api/")
        verb = "WATCH" if "watch" in request.query else "LIST" if not rest else request.method
        self.requests[f"{verb if request.method == 'GET' else request.method} {plural}"] += 1
        if self.token and request.headers.get("Authorization") != f"Bearer {self.token}":
            return _status(401, "Unauthorized")
        if self.refuse and (answer := self.refuse(request)) is not None:
            return answer
        if plural in self.missing or not api_version.startswith(_PLURALS[plural][0] + "/"):
            return _status(404, "the server could not find the requested resource")
        if plural == "tokenreviews":
            return web.json_response({"status": self._review((await request.json())["spec"])}, status=201)
        if request.method == "GET" and not rest:
            if verb == "WATCH":
                return await self._watch(request, plural, namespace)
            return self._list(request, plural, namespace)
        return await self._object(request, plural, namespace, rest)

    def _review(self, spec: dict[str, Any]) -> dict[str, Any]:
        if spec["token"] not in self.tokens:
            return {"error": "invalid bearer token"}
        account, pod, uid = self.tokens[spec["token"]]
        names = ("authentication.kubernetes.io/pod-name", "authentication.kubernetes.io/pod-uid")
        extra = dict(zip(names, ([pod], [uid]), strict=True)) if pod else {}
        user = {"username": f"system:serviceaccount:{account}", "extra": extra}
        return {"authenticated": True, "audiences": spec["audiences"], "user": user}

    def _selected(self, request: web.Request, plural: str, namespace: str, key: tuple[str, str, str]) -> bool:
        name = request.query.get("fieldSelector", "").removeprefix("metadata.name=")
        return key[0] == plural and namespace in {"", key[1]} and name in {"", key[2]}

    def _list(self, request: web.Request, plural: str, namespace: str) -> web.Response:
        token = request.query.get("continue", "")
        if token:
            if token not in self._pages:
                return _status(410, "The provided continue parameter is too old")
            items = self._pages.pop(token)
        else:
            items = [
                item
                for key, item in sorted(self.objects.items())
                if self._selected(request, plural, namespace, key)
            ]
        limit = min(self.page, int(request.query["limit"])) if "limit" in request.query else len(items)
        metadata = {"resourceVersion": str(self._version)}
        if len(items) > limit:
            metadata["continue"] = f"{plural}-{self._version}-{len(items)}"
            self._pages[metadata["continue"]] = items[limit:]
        return web.json_response({"metadata": metadata, "items": items[:limit] or None})

    async def _watch(self, request: web.Request, plural: str, namespace: str) -> web.StreamResponse:
        seen = int(request.query["resourceVersion"])
        response = web.StreamResponse()
        await response.prepare(request)
        task = asyncio.current_task()
        assert task
        self._streams.add(task)
        try:
            if seen < self._oldest:
                await response.write(json.dumps({"type": "ERROR", "object": _GONE}).encode() + b"\n")
                return response
            while True:
                async with self._news:
                    while not (news := [entry for entry in self._log if entry[0] > seen]):
                        await self._news.wait()
                for version, event, of, document in news:
                    seen = version
                    key = (
                        of,
                        document["metadata"].get("namespace", ""),
                        document["metadata"].get("name", ""),
                    )
                    if event == "BOOKMARK" or self._selected(request, plural, namespace, key):
                        line = json.dumps({"type": event, "object": document}).encode() + b"\n"
                        await response.write(line[:100])  # lines come in pieces
                        await response.write(line[100:])
        finally:
            self._streams.discard(task)

    async def _object(  # noqa: PLR0911 - one for each verb
        self, request: web.Request, plural: str, namespace: str, rest: list[str]
    ) -> web.Response:
        body = {} if request.method == "GET" else await request.json()
        name = rest[0] if rest else body["metadata"]["name"]
        found = self.objects.get((plural, namespace, name))
        if request.method == "POST":
            return _status(409, "already exists") if found else await self._answer(body)
        if request.method == "PATCH" and len(rest) == 1:
            return await self._answer(self._applied(body, found, request.query["fieldManager"]))
        if found is None:
            return _status(404, "not found")
        match request.method:
            case "GET":
                return web.json_response(found)
            case "PUT":
                if body["metadata"].get("resourceVersion") != found["metadata"]["resourceVersion"]:
                    return _status(409, "the object has been modified")
                return await self._answer(body)
        assert rest[1:] == ["status"]
        assert request.headers["Content-Type"] == "application/apply-patch+yaml"
        if body["metadata"].get("uid") != found["metadata"]["uid"]:
            return _status(409, "uid mismatch")
        before = found.get("status", {})
        ours = {each["type"] for each in body["status"]["conditions"]}
        others = [each for each in before.get("conditions", []) if each["type"] not in ours]
        status = {**before, **body["status"], "conditions": others + body["status"]["conditions"]}
        return await self._answer({**copy.deepcopy(found), "status": status})

    def _applied(self, body: dict[str, Any], found: dict[str, Any] | None, manager: str) -> dict[str, Any]:
        """Return an object whose binaryData and annotations are those of several managers together."""
        key = (body["kind"], body["metadata"]["name"])
        managers = self._managers.setdefault(key, {})
        managers[manager] = body
        data = {name: value for of in managers.values() for name, value in of.get("binaryData", {}).items()}
        notes = [of["metadata"].get("annotations", {}) for of in managers.values()]
        annotations = {name: value for of in notes for name, value in of.items()}
        merged = {**copy.deepcopy(found or body), "binaryData": data}
        merged["metadata"]["annotations"] = annotations
        return merged

    async def _answer(self, document: dict[str, Any]) -> web.Response:
        return web.json_response(await self.put_object(document))


def _status(code: int, message: str) -> web.Response:
    return web.json_response({"kind": "Status", "code": code, "message": message}, status=code)


@asynccontextmanager
async def running_api(fake: FakeApi, port: int = 0) -> AsyncIterator[FakeApi]:
    """Serve on 127.0.0.1; on a free port, or on one that was used before."""
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", fake.handle)
    runner = web.AppRunner(app, shutdown_timeout=0.1, handler_cancellation=True)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", port)
    await site.start()
    address = runner.addresses[0]
    fake.url = f"http://127.0.0.1:{address[1]}"
    try:
        yield fake
    finally:
        await fake.cut()
        await runner.cleanup()


def write_kubeconfig(file: Path, url: str, token: str = "") -> Path:
    """Write what kubectl and we read to find an API server."""
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "test",
        "clusters": [{"name": "test", "cluster": {"server": url}}],
        "users": [{"name": "test", "user": {"token": token} if token else {}}],
        "contexts": [
            {"name": "test", "context": {"cluster": "test", "user": "test", "namespace": "llmplane-system"}}
        ],
    }
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    return file


@asynccontextmanager
async def connected_api(kubeconfig: Path, monkeypatch: Any) -> AsyncIterator[Api]:
    """Connect as `llmplane serve --kubernetes` does."""
    monkeypatch.setenv("KUBECONFIG", str(kubeconfig))
    monkeypatch.setattr("kubernetes.aio.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(kubeconfig))
    api = await Api.connect()
    try:
        yield api
    finally:
        await api.close()
