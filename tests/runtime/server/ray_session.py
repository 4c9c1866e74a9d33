"""Run by tests/runtime/server/test_ray.py: two replicas, 40 paintings, one replica killed in the middle."""

import io
import socket
import threading
import time
from typing import Any

import httpx
import numpy as np
import ray
from PIL import Image
from ray import serve

import lsast
from lsast.server.ray import make_app
from lsast.server.settings import Settings

OPTIONS: dict[str, Any] = {"size": 64, "steps": 200, "strength": 1.0, "guidance": 1.0}


def main() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    ray.init(include_dashboard=False, num_cpus=4, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    settings = Settings(threads=1, batch=4, queue=64)
    serve.run(make_app(settings, num_replicas=2), name="test", route_prefix="/")
    client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120)
    while client.get("/readyz").status_code != 200:
        time.sleep(0.2)
    photo = (np.random.default_rng(0).random((96, 160, 3)) * 255).astype(np.uint8)
    handle = io.BytesIO()
    Image.fromarray(photo).save(handle, "PNG")
    answers: dict[int, httpx.Response] = {}

    def ask(seed: int) -> None:
        answers[seed] = client.post("/v1/paintings", params={**OPTIONS, "seed": seed}, content=handle.getvalue())

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(40)]
    for thread in threads:
        thread.start()
    while len(answers) < 4:
        time.sleep(0.02)
    named = ray.util.list_named_actors(all_namespaces=True)
    replica = next(actor for actor in named if "#Replica#" in actor["name"])
    ray.kill(ray.get_actor(**replica))
    for thread in threads:
        thread.join()
    faults = {seed: answer.text for seed, answer in answers.items() if answer.status_code != 200}
    assert not faults, faults
    assert "lsast_worker_restarts 0.0" not in client.get("/metrics").text  # the killed one was painting
    with lsast.load(threads=1) as stylizer:
        for seed in (0, 39):
            painted = Image.open(io.BytesIO(answers[seed].content))
            expected = stylizer.stylize(photo, seed=seed, **OPTIONS).image
            assert np.abs(np.asarray(painted).astype(int) - np.asarray(expected)).max() <= 2
    job = client.post("/v1/paintings", params=OPTIONS, content=handle.getvalue(), headers={"Prefer": "respond-async"})
    path = job.headers["location"]
    events = client.get(path, headers={"Accept": "text/event-stream"}).text
    assert "event: done" in events
    assert "data:image/webp" in events
    slow = {**OPTIONS, "size": 1024, "steps": 999}
    job = client.post("/v1/paintings", params=slow, content=handle.getvalue(), headers={"Prefer": "respond-async"})
    assert client.delete(job.headers["location"]).status_code == 204
    assert client.post("/v1/paintings", content=b"no picture").status_code == 422
    assert {card["name"] for card in client.get("/v1/styles").json()} == {"monet", "vangogh"}
    serve.shutdown()
    ray.shutdown()
    print("all answered")  # noqa: T201


if __name__ == "__main__":
    main()
