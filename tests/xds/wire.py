"""A connection that can be cut without a word to either end."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field


@dataclass
class Wire:
    """A TCP connection to the server that can be cut without a word to either end."""

    server_port: int
    port: int = 0
    _alive: asyncio.Event = field(default_factory=asyncio.Event)
    _writers: list[asyncio.StreamWriter] = field(default_factory=list)

    def cut(self) -> None:
        """Stop to carry bytes; nobody is told, as when a machine loses its power."""
        self._alive.clear()

    async def carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server_reader, server_writer = await asyncio.open_connection("127.0.0.1", self.server_port)
        self._writers += [writer, server_writer]
        await asyncio.gather(self._copy(reader, server_writer), self._copy(server_reader, writer))

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while data := await reader.read(65536):
                await self._alive.wait()
                writer.write(data)
                await writer.drain()


@asynccontextmanager
async def running_wire(server_port: int) -> AsyncIterator[Wire]:
    wire = Wire(server_port)
    wire._alive.set()
    tasks: set[asyncio.Task[None]] = set()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.add(asyncio.create_task(wire.carry(reader, writer)))

    listener = await asyncio.start_server(accept, "127.0.0.1", 0)
    wire.port = listener.sockets[0].getsockname()[1]
    yield wire
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    for writer in wire._writers:
        writer.transport.abort()
    listener.close()
    await listener.wait_closed()
