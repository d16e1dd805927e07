"""A server with the plug-in, over HTTP: answers, policies of requests, clients that go away, metrics."""

import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from integrations.vllm_plugin.serving import FULL, SPARSE, Server, needs_vllm, prompt, raw_post, served, total

pytestmark = [needs_vllm, pytest.mark.slow, pytest.mark.vllm]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with served(FULL | {"policies": {"few": SPARSE}}) as found:
        yield found
        log = found.log.read_text()
    assert "Traceback" not in log, log[-4000:]


def test_requests_name_their_policies(server: Server) -> None:
    long = prompt(1500, 7)
    plain = server.first_logprob({"prompt": long})
    few = server.first_logprob({"prompt": long, "vllm_xargs": {"gossamer": "few"}})
    same = server.first_logprob({"prompt": long, "vllm_xargs": {"gossamer": json.dumps(SPARSE)}})
    again = server.first_logprob({"prompt": long})
    assert few == pytest.approx(same, abs=1e-4)
    assert abs(plain - few) > 1e-3
    assert again == pytest.approx(plain, abs=1e-3)


@pytest.mark.parametrize(
    "given", ["nonsense", '{"method": "a_shape", "window": -4}', "{", '{"profile": "/etc/passwd"}']
)
def test_a_wrong_policy_is_the_requests_error(server: Server, given: str) -> None:
    status, answer = server.post({"prompt": prompt(200), "vllm_xargs": {"gossamer": given}})
    assert status == 400
    assert "gossamer" in json.dumps(answer)
    assert server.post({"prompt": prompt(200)})[0] == 200


def test_clients_that_go_away_leave_a_server_that_answers(server: Server) -> None:
    before = server.first_logprob({"prompt": prompt(900, 3)})
    body = json.dumps({"model": "m", "prompt": prompt(6000, 4), "max_tokens": 500, "stream": True}).encode()
    for _ in range(4):
        with socket.create_connection(("127.0.0.1", server.port)) as gone:
            gone.sendall(raw_post(body))
            time.sleep(0.2)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda n: server.post({"prompt": prompt(300 + 150 * n, n)})[0], range(8)))
    assert answers == [200] * 8
    assert server.first_logprob({"prompt": prompt(900, 3)}) == pytest.approx(before, abs=1e-3)
    for _ in range(60):
        if total(server.metrics(), "vllm:num_requests_running") == 0:
            break
    assert total(server.metrics(), "vllm:num_requests_running") == 0


def test_metrics_tell_what_ran(server: Server) -> None:
    before = server.metrics()
    server.first_logprob({"prompt": prompt(1000, 11), "max_tokens": 3})
    after = server.metrics()

    def news(name: str, *labels: str) -> float:
        return total(after, name, *labels) - total(before, name, *labels)

    assert news("gossamer_rows_total", 'path="sparse"') == 6
    assert news("gossamer_rows_total", 'path="stock"') == 12
    assert news("gossamer_dense_rows_total", 'reason="decode"') == 12
    assert news("gossamer_pairs_total") == pytest.approx(6 * 1000 * 1001 / 2)
    assert news("gossamer_computed_pairs_total") == pytest.approx(news("gossamer_pairs_total"))
    assert news("gossamer_planning_seconds_total") > 0
    assert news("gossamer_attention_seconds_total") > 0


def test_the_text_of_metrics_is_labelled_by_layer_and_method(server: Server) -> None:
    server.first_logprob({"prompt": prompt(700, 12)})
    text = server.get("/metrics")
    assert "# TYPE gossamer_rows_total counter" in text
    assert 'method="a_shape"' in text
    assert 'layer="5"' in text
