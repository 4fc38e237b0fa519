"""A provider that streams: `python -m benchmarks.paced DIRECTORY` with cert.pem and key.pem, prints its port.

A process of its own, so that it does not wait for the client that measures.
"""

import asyncio
import json
import ssl
import sys
from pathlib import Path

CHUNKS = 200
_PAUSE = 0.005
_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


def _event(**members: object) -> bytes:
    chunk = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "qwen-1.8b-chat"}
    data = b"data: %b\n\n" % json.dumps({**chunk, **members}).encode()
    return b"%x\r\n%b\r\n" % (len(data), data)


_WORD = _event(choices=[{"index": 0, "delta": {"content": " some words"}, "finish_reason": None}])
_USAGE = _event(
    choices=[], usage={"prompt_tokens": 3, "completion_tokens": CHUNKS, "total_tokens": CHUNKS + 3}
)
_DONE = b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"


async def _serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    loop = asyncio.get_running_loop()
    while head := await reader.readuntil(b"\r\n\r\n"):
        (length,) = (line[15:] for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
        body = await reader.readexactly(int(length))
        start = loop.time()
        writer.write(_HEAD)
        for number in range(CHUNKS):
            writer.write(_WORD)
            await asyncio.sleep(max(0, start + (number + 1) * _PAUSE - loop.time()))
        writer.write((_USAGE if b'"include_usage"' in body else b"") + _DONE)


async def _main(directory: Path) -> None:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(directory / "cert.pem", directory / "key.pem")

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await _serve(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(_main(Path(sys.argv[1])))
