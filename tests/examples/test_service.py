"""The web service: real requests to a real server, and its page in a real browser."""

import asyncio
import json
import re
import shutil
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager

import httpx
import pytest
from conftest import ROOT, load_example

import lmopt
from lmopt_optimizers import labeled_few_shot

pytest.importorskip("fastapi.sse", reason="fastapi 0.135 or later is not installed")
uvicorn = pytest.importorskip("uvicorn", reason="uvicorn is not installed")

service = load_example("service")
FLAT = {"question": "My rear tyre is flat"}
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def learned(rows=service.EXAMPLES):
    return labeled_few_shot(k=len(rows))(service.helper, rows, lmopt.exact_match)


def in_pieces(request):
    """Answer as the toy LM does, and tell the answer in pieces of seven characters."""
    response = lmopt.toy_lm()(request)
    for start in range(0, len(response.text), 7) if request.on_text else ():
        request.on_text(response.text[start : start + 7])
    return response


@contextmanager
def serving(lm, path, params=None):
    """Serve with these parameters in the file, and give a client of the server."""
    lmopt.save(learned() if params is None else params, path)
    app = service.make_app(lm, path)
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, ws="none", lifespan="off"))
    listening = socket.create_server(("127.0.0.1", 0))  # who calls too early waits in it
    thread = threading.Thread(target=server.run, args=[[listening]])
    thread.start()
    url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    try:
        with httpx.Client(base_url=url, timeout=30, trust_env=False) as client:
            yield client
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


def events(response):
    """Read server-sent events: pairs of a name and its data."""
    name = ""
    for line in response.iter_lines():
        kind, _, text = line.partition(": ")
        if kind == "event":
            name = text
        elif kind == "data":
            yield name, json.loads(text)


def streamed(client, inputs=FLAT):
    with client.stream("GET", "/stream", params=inputs) as response:
        return list(events(response))


def test_an_answer_is_that_of_the_program_with_the_parameters_of_the_file(tmp_path):
    with serving(in_pieces, tmp_path / "params.json") as client:
        made = client.post("/answer", json=FLAT).json()
        assert client.post("/answer", json={"problem": "?"}).status_code == 422
        assert client.post("/answer", json={"question": "?" * 501}).status_code == 422
    alone = service.helper.with_params(learned())(lmopt.toy_lm(), **FLAT)
    assert made["fields"] == dict(alone) and made["fields"]["minutes"] == 30
    assert made["params"] == learned().digest[:8] and made["notice"] == ""


def test_the_stream_tells_each_field_while_it_is_written_and_the_whole_at_the_end(tmp_path):
    seen = threading.Event()

    def slow(request):
        response = lmopt.toy_lm()(request)
        if request.on_text:
            request.on_text(response.text[:40])
            assert seen.wait(20)  # the rest is written when the visitor has the beginning
            for piece in re.findall(r"\s*\S+", response.text[40:]):
                request.on_text(piece)
        return response

    with serving(slow, tmp_path / "params.json") as client:
        with client.stream("GET", "/stream", params=FLAT) as response:
            assert response.headers["content-type"].startswith("text/event-stream")
            arriving = events(response)
            name, first = next(arriving)
            seen.set()
            *rest, (last, whole) = arriving
        assert whole == client.post("/answer", json=FLAT).json()
    assert name == "chunk" and {name for name, _ in rest} == {"chunk"} and last == "prediction"
    chunks = [first, *(data for _, data in rest)]
    assert {chunk["path"] for chunk in chunks} == {"predict"}
    assert list(dict.fromkeys(chunk["field"] for chunk in chunks)) == list(whole["fields"])
    texts = [chunk["text"] for chunk in chunks if chunk["field"] == "summary"]
    assert len(texts) > 3 and "".join(texts) == whole["fields"]["summary"]
    steps = [chunk["value"] for chunk in chunks if chunk["field"] == "steps"]
    assert steps[-1] == whole["fields"]["steps"]
    assert {len(value) for value in steps} >= {1, 2, 3, 4, 5}


@pytest.mark.parametrize(
    ("error", "status", "told"),
    [
        (lmopt.RateLimited("sk-secret has no quota left"), 502, "The language model is busy"),
        (lmopt.Unauthorized("sk-secret is no key"), 502, "No answer can be given"),
        (KeyError("sk-secret"), 500, "No answer can be given"),
    ],
)
def test_an_error_is_told_in_plain_words_and_logged(tmp_path, caplog, error, status, told):
    def failing(request):
        if request.on_text:
            request.on_text("[[ ## summary ## ]]\nFind the hole")
        raise error

    with serving(failing, tmp_path / "params.json") as client:
        (first, piece), (last, failure) = streamed(client)
        assert (first, piece["text"], last) == ("chunk", "Find the hole", "failure")
        assert failure["error"].startswith(told) and "sk-" not in str(failure)
        assert "A run failed." in caplog.text and "sk-secret" in caplog.text
        answer = client.post("/answer", json=FLAT)
        assert answer.status_code == status and "sk-" not in answer.text


def test_a_saved_file_counts_from_the_next_request_and_a_broken_one_changes_nothing(tmp_path):
    path = tmp_path / "params.json"
    slower = [{**row, "minutes": row["minutes"] + 60} for row in service.EXAMPLES]
    with serving(in_pieces, path) as client:
        assert client.post("/answer", json=FLAT).json()["fields"]["minutes"] == 30
        lmopt.save(learned(slower), path)
        new = client.post("/answer", json=FLAT).json()
        assert new["fields"]["minutes"] == 90 and new["params"] == learned(slower).digest[:8]

        unknown = lmopt.dumps({"another_step": lmopt.Prompt("Be brief.")})
        for broken in ("", '{"format": "lmo', unknown):
            path.write_text(broken, encoding="utf-8")
            stays = client.post("/answer", json=FLAT).json()
            assert stays == {**new, "notice": "params.json is broken: the old parameters stay."}
        path.unlink()
        assert streamed(client)[-1] == ("prediction", stays)

        lmopt.save(learned(), path)
        mended = client.post("/answer", json=FLAT).json()
        assert mended["fields"]["minutes"] == 30 and mended["notice"] == ""


def test_a_visitor_who_leaves_stops_the_run(tmp_path):
    stopped = threading.Event()

    async def endless(request):
        request.on_text("[[ ## summary ## ]]\nFind the hole")
        try:
            await asyncio.Event().wait()
        finally:
            stopped.set()

    with serving(endless, tmp_path / "params.json") as client:
        with client.stream("GET", "/stream", params=FLAT) as response:
            assert next(events(response))[1]["text"] == "Find the hole"
            assert not stopped.is_set()
        assert stopped.wait(20)


def test_the_page_needs_nothing_else_and_makes_no_markup_of_what_a_model_writes():
    page = (ROOT / "examples" / "service.html").read_text(encoding="utf-8")
    assert re.findall(r'(?:src|href)="(?!data:)|url\(|https?://|@import', page) == []
    assert re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write", page) == []
    assert "prefers-color-scheme: dark" in page and "width=device-width" in page


@pytest.mark.skipif(not CHROMIUM, reason="chromium is not installed")
def test_a_browser_shows_the_fields_of_the_answer(tmp_path):
    rows = [{**row, "tools": ["<b>a pump</b>", *row["tools"]]} for row in service.EXAMPLES]
    flags = (
        "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking"
        " disable-component-update disable-sync virtual-time-budget=10000 dump-dom"
    )
    with serving(in_pieces, tmp_path / "params.json", learned(rows)) as client:
        url = str(client.base_url.copy_merge_params(FLAT))
        options = [*flags.split(), f"user-data-dir={tmp_path / 'profile'}"]
        command = [CHROMIUM, *(f"--{option}" for option in options), url]
        ran = subprocess.run(command, capture_output=True, timeout=120, check=True)
    body = ran.stdout.decode().partition("<body")[2].partition("<script")[0]
    assert body.startswith(' data-state="done"') and "Done, with parameters" in body
    assert re.findall(r'data-field="(\w+)"', body) == ["summary", "tools", "steps", "minutes"]
    items = re.findall("<li>(.*?)</li>", body)
    assert items[0] == "&lt;b&gt;a pump&lt;/b&gt;"
    assert items[4:] == service.EXAMPLES[0]["steps"]


def test_the_script_learns_its_first_parameters_and_serves(tmp_path):
    script = [sys.executable, str(ROOT / "examples" / "service.py"), "--port", "0"]
    with subprocess.Popen(script, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        late = threading.Timer(60, process.kill)
        late.start()
        try:
            said = ""
            while "running on" not in said and (line := process.stderr.readline()):
                said += line
            url = re.search(r"running on (http://\S+)", said)[1]
            made = httpx.post(f"{url}/answer", json=FLAT, trust_env=False, timeout=30).json()
        finally:
            process.terminate()
            late.cancel()
    assert made["fields"]["tools"] == service.EXAMPLES[0]["tools"]
    kept = lmopt.load(tmp_path / "service.params.json")
    assert len(kept["predict"].demos) == 3 and made["params"] == kept.digest[:8]
