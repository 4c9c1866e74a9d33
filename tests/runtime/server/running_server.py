"""A server with a worker process, on a free port of this machine."""

import contextlib
import io
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("uvicorn", reason="uvicorn is not installed: pip install '.[server]'")
pytest.importorskip("fastapi_offline", reason="fastapi-offline is not installed: pip install '.[server]'")
httpx = pytest.importorskip("httpx", reason="httpx is not installed: pip install '.[dev]'")

QUICK: dict[str, Any] = {"steps": 2, "strength": 1.0, "size": 64, "guidance": 1.0}
"""Options of a painting that takes no time."""

LONG = {**QUICK, "steps": 999, "size": 1280, "tile": 256}
"""Options of one that goes on until it is cancelled."""


@dataclass
class Running:
    """A server that listens."""

    app: Any
    address: str
    client: httpx.Client

    def post(self, picture: bytes, /, headers: dict[str, str] | None = None, **options: Any) -> httpx.Response:
        """Send a form."""
        texts = {name: str(value) for name, value in options.items() if name != "mask"}
        files = {"picture": picture, "mask": options.get("mask", b"")}
        return self.client.post("/v1/paintings", files=files, data=texts, headers=headers)

    def begin(self, picture: bytes, /, **options: Any) -> str:
        """Send a form for a job; its path."""
        answer = self.post(picture, {"Prefer": "respond-async"}, **options)
        assert answer.status_code == 202, answer.text
        return str(answer.headers["location"])

    def wait(self, path: str, *states: str) -> dict[str, Any]:
        """Ask for a job until it is in one of the states."""
        end = time.monotonic() + 60
        while (facts := self.client.get(path).json())["state"] not in states:
            assert time.monotonic() < end, facts
            assert facts["state"] in ("queued", "painting"), facts
            time.sleep(0.02)
        return facts

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait for something to happen."""
        end = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < end
            time.sleep(0.02)


@contextlib.contextmanager
def running(**settings: Any) -> Iterator[Running]:
    import uvicorn

    from lsast.server.app import create_app
    from lsast.server.cli import _listen
    from lsast.server.process import WorkerProcess
    from lsast.server.settings import Settings

    chosen = Settings(port=0, **settings)
    app = create_app(chosen, lambda: WorkerProcess(chosen))
    with _listen(chosen) as listener:
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, timeout_graceful_shutdown=5))
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            headers = {"Authorization": f"Bearer {chosen.token}".encode()} if chosen.token else {}
            with httpx.Client(base_url=address, timeout=60, headers=headers) as client:
                opened = Running(app, address, client)
                opened.until(lambda: server.started)
                yield opened
        finally:
            server.should_exit = True
            thread.join()


def as_png(rgb: np.ndarray) -> bytes:
    handle = io.BytesIO()
    Image.fromarray(rgb).save(handle, "PNG")
    return handle.getvalue()


def pixels(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image).astype(int)
