"""The API against its own OpenAPI document, by schemathesis: whatever is sent, no answer is a fault of the server."""

import contextlib

import pytest

pytest.importorskip("fastapi_offline", reason="fastapi-offline is not installed: pip install '.[server]'")

from lsast.server.app import create_app
from lsast.server.settings import Settings


@pytest.mark.parametrize("token", ["", "secret"])
def test_openapi_document_lists_refusals_where_they_occur(token):
    paths = create_app(Settings(token=token), lambda: None).openapi()["paths"]
    for path, operations in paths.items():
        for operation in operations.values():
            assert {"400", "403"} <= {*operation["responses"]}
            assert ("401" in operation["responses"]) == bool(token and path.startswith(("/v1/", "/metrics"))), path
            assert ("500" in operation["responses"]) == path.startswith(("/v1/", "/metrics")), path


@pytest.mark.needs("schemathesis")
@pytest.mark.filterwarnings("ignore")
def test_api_answers_generated_requests_without_a_server_error(server):
    import schemathesis
    from hypothesis import HealthCheck, given, settings
    from hypothesis.errors import Unsatisfiable

    schema = schemathesis.openapi.from_url(server.address + "/openapi.json")
    tried = []
    for operation in (result.ok() for result in schema.get_all_operations()):
        for mode in schemathesis.GenerationMode:

            @given(case=operation.as_strategy(generation_mode=mode))
            @settings(max_examples=40, deadline=None, database=None, suppress_health_check=list(HealthCheck))
            def check(case: schemathesis.Case) -> None:
                answer = case.call(timeout=60)
                assert answer.status_code < 500, (case.as_curl_command(), answer.text)
                assert answer.status_code < 400 or "detail" in answer.text or "<" not in answer.text

            with contextlib.suppress(Unsatisfiable):  # there is nothing wrong to send to a path without parameters
                check()
                tried.append(operation.label)
    paths = server.client.get("/openapi.json").json()["paths"]
    assert len(set(tried)) == sum(len(methods) for methods in paths.values())
    assert server.client.get("/readyz").status_code == 200
