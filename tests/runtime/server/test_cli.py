"""`lsast-serve` as a process: what it prints, how it ends."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lsast.server.settings import Settings
from lsast_engines.declared_options import rules_of
from lsast_engines.errors import UsageError

from .running_server import LONG, httpx

COMMAND = [sys.executable, "-m", "lsast.server.cli"]


def _environment(bundle: Path) -> dict[str, str]:
    path = os.pathsep.join(filter(None, sys.path))
    return {**os.environ, "PYTHONPATH": path, "LSAST_SERVE_BUNDLE": str(bundle), "LSAST_SERVE_PORT": "0"}


@pytest.fixture
def serving(split_path: Path, request: pytest.FixtureRequest) -> Iterator[tuple[subprocess.Popen[str], str]]:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    command = [*COMMAND, *getattr(request, "param", [])]
    with subprocess.Popen(command, env=_environment(split_path), **pipes, text=True) as process:  # type: ignore[call-overload]
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        end = time.monotonic() + 60
        while httpx.get(address + "/readyz").status_code != 200:
            assert time.monotonic() < end
            time.sleep(0.05)
        yield process, address
        process.kill()


def test_sigterm_finishes_what_was_accepted(serving, png):
    process, address = serving
    options = {**LONG, "steps": 100, "size": 1024}
    answers = []
    asking = threading.Thread(
        target=lambda: answers.append(httpx.post(address + "/v1/paintings", params=options, content=png, timeout=60))
    )
    headers = {"Prefer": "respond-async"}
    job = httpx.post(address + "/v1/paintings", params=options, content=png, headers=headers).headers["location"]
    asking.start()
    end = time.monotonic() + 60
    while 'lsast_paintings_total{state="done"} 0' in (text := httpx.get(address + "/metrics").text) and (
        "lsast_queued 1.0" not in text or "lsast_painting 1.0" not in text
    ):
        assert time.monotonic() < end
    process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    assert httpx.post(address + "/v1/paintings", content=png).status_code == 503
    assert httpx.get(address + "/readyz").status_code == 503
    while httpx.get(address + job).json()["state"] != "done":
        assert time.monotonic() < end
        time.sleep(0.02)
    assert httpx.get(address + job, headers={"Accept": "image/png"}).status_code == 200
    asking.join()
    assert answers[0].status_code == 200
    assert process.wait(30) == -signal.SIGTERM


@pytest.mark.parametrize("serving", [["--drain-seconds", "1"]], indirect=True)
def test_sigterm_answers_what_does_not_end_in_time_without_tracebacks(serving, png):
    process, address = serving
    url, host = address + "/v1/paintings", ("127.0.0.1", int(address.rpartition(":")[2]))
    job = httpx.post(url, params=LONG, content=png, headers={"Prefer": "respond-async"}).headers["location"]
    with ThreadPoolExecutor() as pool, socket.create_connection(host) as one, socket.create_connection(host) as other:
        events = pool.submit(httpx.get, address + job, headers={"Accept": "text/event-stream"}, timeout=60)
        painting = pool.submit(httpx.post, url, params={**LONG, "steps": 998}, content=png, timeout=60)
        for upload, path in ((one, "/v1/paintings"), (other, "/v1/records")):
            upload.sendall(f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n".encode())
            upload.sendall(b"Expect: 100-continue\r\n\r\nabc")
            assert b" 100 " in upload.recv(1000)
        end = time.monotonic() + 60
        while "lsast_queued 1.0" not in (text := httpx.get(address + "/metrics").text) or "painting 1.0" not in text:
            assert time.monotonic() < end
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=20)
        assert [upload.recv(1000)[:13] for upload in (one, other)] == 2 * [b"HTTP/1.1 503 "]
    assert painting.result().status_code == 503
    assert painting.result().json() == {"detail": "the server is about to end"}
    assert "event: cancelled" in events.result().text
    assert "Traceback" not in stderr


def test_second_ctrl_c_ends_at_once_without_tracebacks(serving, png):
    process, address = serving

    def ask() -> None:
        with contextlib.suppress(httpx.HTTPError):  # cut off
            httpx.post(address + "/v1/paintings", params={**LONG, "size": 1024}, content=png, timeout=60)

    asking = threading.Thread(target=ask)
    asking.start()
    end = time.monotonic() + 60
    while "lsast_painting 1.0" not in httpx.get(address + "/metrics").text:
        assert time.monotonic() < end
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=20)
    asking.join()
    assert (process.returncode, stderr) == (0, "")


def test_port_in_use_is_one_line(split_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = subprocess.run(
            [*COMMAND, "--port", port], env=_environment(split_path), capture_output=True, text=True, timeout=60
        )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"Error: cannot listen on 127.0.0.1, port {port} (")
    assert done.stderr.count("\n") == 1


def test_bundle_that_cannot_be_opened_ends_the_server_with_its_error(tmp_path):
    done = subprocess.run(COMMAND, env=_environment(tmp_path), capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("Error: found no bundle")
    assert "Traceback" not in done.stderr


def test_request_before_the_engines_fail_to_open_is_answered(split_path, png):
    command = [*COMMAND, "--backend", "tensorrt", "--device", "cpu", "--drain-seconds", "40"]
    with subprocess.Popen(
        command, env=_environment(split_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            address = process.stdout.readline().strip()
            answer = httpx.post(address + "/v1/paintings", content=png, timeout=30)
            _, stderr = process.communicate(timeout=20)
        finally:
            process.kill()
    assert answer.status_code == 500
    assert "cannot open its engines" in answer.text
    assert process.returncode == 1
    assert "Error: found no backend 'tensorrt' with device 'cpu'" in stderr
    assert "starting another one" not in stderr


def test_variable_that_is_no_setting_is_named(tmp_path):
    environment = {**_environment(tmp_path), "LSAST_SERVE_TOKN": "secret"}
    done = subprocess.run(COMMAND, env=environment, capture_output=True, text=True, timeout=60)
    expected = "found LSAST_SERVE_TOKN in the environment, which is no setting; did you mean LSAST_SERVE_TOKEN?"
    assert done.stderr.splitlines()[0] == expected
    environment = {**environment, "LSAST_SERVE_BATCH": "tcp://10.0.0.1:80"}  # as Kubernetes gives LSAST_SERVE_PORT
    done = subprocess.run(COMMAND, env=environment, capture_output=True, text=True, timeout=60)
    assert done.stderr.startswith("Error: Invalid value for LSAST_SERVE_BATCH: 'tcp://10.0.0.1:80' is not a valid int")


def test_settings_report_all_faults_and_read_the_environment():
    with pytest.raises(
        UsageError, match=r"port: found 70000; expected 0 to 65535\n.*batch: found 0.*\n.*preset: found 'x'"
    ):
        Settings(port=70000, batch=0, preset="x")
    given = {"LSAST_SERVE_PORT": "9", "LSAST_SERVE_SECONDS": "1.5", "LSAST_SERVE_TOKEN": "x"}
    assert Settings.from_environment(given) == Settings(port=9, seconds=1.5, token="x")
    own = ["127.0.0.1", "localhost", "::1", "[::1]"]  # a container's health check asks by these, too
    allowed = Settings(host="0.0.0.0", allowed_hosts="a.example, b.example").hosts
    assert (Settings().hosts, allowed) == (own, [*own, "a.example", "b.example"])
    with pytest.raises(UsageError, match="LSAST_SERVE_PORT=x; expected a number"):
        Settings.from_environment({"LSAST_SERVE_PORT": "x"})


def test_help_names_every_setting():
    done = subprocess.run([*COMMAND, "--help"], capture_output=True, text=True, timeout=60)
    for name in rules_of(Settings):
        assert f"--{name.replace('_', '-')}" in done.stdout
