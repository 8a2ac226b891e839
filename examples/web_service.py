"""A web service on asyncio whose handlers compute with numpy, in a pool of worker processes.

    python examples/web_service.py 8080

    curl --data-binary @samples.f64 http://127.0.0.1:8080/spectrum
    curl http://127.0.0.1:8080/health

The loop goes on while workers compute. A worker that dies fails its own request, with the
reason, and is replaced; a client that hangs up ends its call. SIGTERM and Ctrl-C stop the
service in order. It needs aiohttp and numpy.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from typing import Any

import numpy
from aiohttp import web

import anyfork
import anyfork.asyncio

POOL = web.AppKey("pool", anyfork.asyncio.Pool)
LIMIT = 10.0  # seconds that a request may compute


def spectrum(samples: Any) -> dict[str, float]:
    """The strongest frequency of a signal, and its energy. This runs in a worker."""
    lines = numpy.abs(numpy.fft.rfft(samples)) ** 2
    return {"peak": int(lines.argmax()), "energy": float((samples**2).sum())}


async def on_spectrum(request: web.Request) -> web.Response:
    body = await request.read()
    if not body or len(body) % 8:
        return web.json_response({"error": "float64 numbers are wanted"}, status=400)
    samples = numpy.frombuffer(body)
    try:
        found = await request.app[POOL].run(spectrum, samples, timeout=LIMIT)
    except anyfork.WorkerDied as exc:
        return web.json_response({"error": str(exc)}, status=503)
    except TimeoutError:
        return web.json_response({"error": f"it took longer than {LIMIT} s"}, status=504)
    return web.json_response(found)


async def on_health(request: web.Request) -> web.Response:
    pool = request.app[POOL]
    return web.json_response({"pids": pool.pids(), **pool.statistics()})


async def main(port: int) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    with anyfork.Template(preload=["numpy"], standby=(1, 2)) as template:
        async with anyfork.asyncio.open_pool(4, template=template) as pool:
            app = web.Application(client_max_size=64 << 20)
            app[POOL] = pool
            app.router.add_post("/spectrum", on_spectrum)
            app.router.add_get("/health", on_health)
            # A handler whose client has gone is cancelled, and with it the worker's call.
            runner = web.AppRunner(app, handler_cancellation=True, access_log=None)
            await runner.setup()
            try:
                await web.TCPSite(runner, "127.0.0.1", port).start()
                print("listening on", *runner.addresses[0], flush=True)
                await stop.wait()
            finally:
                await runner.cleanup()
    print("stopped", flush=True)


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1])))
