"""Requests without a pause, on many connections, while a test changes what answers them."""

import asyncio
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import aiohttp

_BODY = {"messages": [{"role": "user", "content": "Hi"}]}
_PAUSE = 0.005
"""Seconds between two requests of a connection: the machine has other things to do, too."""


@dataclass
class Load:
    """What came of the requests so far.

    `models` are those that may answer, the oldest first: once one was seen, nothing older may answer a
    request that is sent later.
    """

    models: list[str]
    answers: int = 0
    streams: int = 0
    """Streamed answers that were complete."""
    failures: list[str] = field(default_factory=list)
    _newest: int = 0
    _by_connection: Counter[int] = field(default_factory=Counter)

    def wait_until(self, condition: Callable[[], bool], seconds: float = 60) -> None:
        """Wait until something holds. Raises AssertionError if it does not come true."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, (self.answers, self.streams, self.failures[:5])
            time.sleep(0.005)

    def wait_for(self, model: str) -> None:
        """Wait until a model answers; from then on, nothing older does."""
        self.wait_until(lambda: self._newest >= self.models.index(model))

    def wait_for_more(self, answers: int = 64) -> None:
        """Wait for so many more answers: at least one to a request that was sent after this call."""
        enough = self.answers + answers
        self.wait_until(lambda: self.answers >= enough)

    def wait_for_all(self) -> None:
        """Wait until each connection got an answer to a request that was sent after this call."""
        enough = {connection: count + 2 for connection, count in self._by_connection.items()}
        self.wait_until(lambda: all(self._by_connection[each] >= count for each, count in enough.items()))

    async def hold(
        self, session: aiohttp.ClientSession, number: int, url: str, proxy: str, *, stream: bool
    ) -> None:
        """Send one request after the other, until the task is cancelled."""
        self._by_connection[number] = 0
        while True:
            oldest = self._newest
            try:
                async with session.post(url, proxy=proxy, json={**_BODY, "stream": stream}) as response:
                    text = await response.text()
                    status = response.status
            except (aiohttp.ClientError, OSError) as error:
                self.failures.append(f"{type(error).__name__}: {error}")
                continue
            self.answers += 1
            self._by_connection[number] += 1
            self._judge(status, text, oldest, stream=stream)
            await asyncio.sleep(_PAUSE)

    def _judge(self, status: int, text: str, oldest: int, *, stream: bool) -> None:
        if status != 200:
            self.failures.append(f"{status}: {text}")
        elif stream and not text.endswith("data: [DONE]\n\n"):
            self.failures.append(f"a stream ended with {text[-80:]!r}")
        else:
            first = text.partition("\n")[0].removeprefix("data: ") if stream else text
            model = json.loads(first)["model"]
            number = self.models.index(model) if model in self.models else -1
            if number < oldest:
                self.failures.append(f"{model!r} answered after {self.models[oldest]!r}")
            self._newest = max(self._newest, number)
            self.streams += stream


@contextmanager
def running_load(
    proxy: str, host: str, models: list[str], *, connections: int = 32, streams: int = 1
) -> Iterator[Load]:
    """Hold so many connections busy, some of them with streamed answers, to the end of the block.

    At the end, no request may have failed.
    """
    load = Load(models)
    loop = asyncio.new_event_loop()

    async def run(stop: asyncio.Event) -> None:
        connector = aiohttp.TCPConnector(limit=connections)
        async with aiohttp.ClientSession(connector=connector) as session:
            tasks = [
                asyncio.create_task(
                    load.hold(session, number, f"http://{host}/", proxy, stream=number < streams)
                )
                for number in range(connections)
            ]
            await stop.wait()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    stop = asyncio.Event()
    thread = threading.Thread(target=loop.run_until_complete, args=(run(stop),))
    thread.start()
    try:
        load.wait_for_more(connections)
        yield load
        load.wait_for_more(connections)
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
        loop.close()
    assert load.failures == [], load.failures[:5]
