import json
import threading

import httpx
import pytest

from service.api import events

STREAM = {"Accept": "text/event-stream"}


@pytest.fixture
def job_id(api_url, root):
    body = {"source": {"type": "folder", "path": f"{root}/tiny"}}
    return httpx.post(f"{api_url}/v1/jobs", json=body).json()["id"]


@pytest.fixture
def url(api_url, job_id):
    return f"{api_url}/v1/jobs/{job_id}/events"


def frames(text):
    """The stream's frames as dicts of their fields, the retry hint first."""
    return [dict(line.split(": ", 1) for line in frame.split("\n")) for frame in text.split("\n\n") if frame]


def run_to_the_end(hand):
    hand.plan(10)
    hand.solve()
    hand.finish({"name": "config.json", "nbytes": 2, "sha256": "0" * 64})


def test_list_goes_on_after_a_sequence_number(url, api_hand):
    run_to_the_end(api_hand)
    whole = httpx.get(url).json()
    assert [event["seq"] for event in whole["data"]] == list(range(1, len(whole["data"]) + 1))
    assert whole["has_more"] is False
    part = httpx.get(url, params={"after": 2, "limit": 3}).json()
    assert part == {"object": "list", "data": whole["data"][2:5], "has_more": True}


def test_stream_replays_and_ends_with_done(url, api_hand):
    run_to_the_end(api_hand)
    response = httpx.get(url, headers=STREAM)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-store"
    assert response.headers["x-accel-buffering"] == "no"
    retry, *seen = frames(response.text)
    assert retry == {"retry": "3000"}
    listed = httpx.get(url).json()["data"]
    assert [(int(f["id"]), f["event"], json.loads(f["data"])) for f in seen] == [
        (event["seq"], event["type"], event["data"]) for event in listed
    ]
    assert seen[-1]["event"] == "done"


def test_stream_follows_a_running_job(url, api_hand):
    types = []
    with httpx.stream("GET", url, headers=STREAM, timeout=30) as response:
        working = threading.Thread(target=run_to_the_end, args=(api_hand,))
        for line in response.iter_lines():
            if line.startswith("event: "):
                types.append(line.removeprefix("event: "))
                if len(types) == 1:
                    working.start()  # nothing had happened before but the submission
    working.join()
    assert types[0] == "status"
    assert types[-3:] == ["artifact", "status", "done"]
    assert "progress" in types


@pytest.mark.parametrize("where", ["header", "query"])
def test_stream_resumes_where_it_was_lost(url, api_hand, where):
    run_to_the_end(api_hand)
    seen = {"headers": STREAM | {"Last-Event-ID": "4"}} if where == "header" else {"params": {"last_event_id": 4}}
    response = httpx.get(url, **({"headers": STREAM} | seen))
    assert frames(response.text)[1]["id"] == "5"


def test_stream_seen_to_its_end_says_not_to_come_back(url, api_hand):
    run_to_the_end(api_hand)
    last = frames(httpx.get(url, headers=STREAM).text)[-1]["id"]
    response = httpx.get(url, headers=STREAM | {"Last-Event-ID": last})
    assert (response.status_code, response.content) == (204, b"")


def test_quiet_stream_is_kept_alive(url, monkeypatch):
    monkeypatch.setattr(events, "PING_S", 0.1)
    with httpx.stream("GET", url, headers=STREAM | {"Last-Event-ID": "1"}, timeout=30) as response:
        lines = response.iter_lines()
        assert next(line for line in lines if line.startswith(":")) == ": ping"


@pytest.mark.parametrize("last", ["x", "-1", "1" * 30])
def test_stream_refuses_an_id_it_never_gave(url, last):
    response = httpx.get(url, headers=STREAM | {"Last-Event-ID": last})
    assert response.status_code == 422
    assert response.json()["errors"][0]["pointer"] == "header/last-event-id"


def test_streams_do_not_use_up_the_threads(url, api_url):
    """More followers than the thread pool has threads, and requests are still answered."""
    responses = []
    limits = httpx.Limits(max_connections=None)
    with httpx.Client(timeout=30, limits=limits) as client:
        try:
            for _ in range(60):
                request = client.build_request("GET", url, headers=STREAM)
                responses.append(client.send(request, stream=True))
            assert client.get(f"{api_url}/v1/jobs").status_code == 200
        finally:
            for response in responses:
                response.close()
