"""`vwlmm explore`, in a browser."""

import json
import os
import secrets
import signal
import socket
import threading
from pathlib import Path

import pytest

from helpers import ROOT
from helpers.browser import browse, chromium
from helpers.command_line import error_of
from modeling_vwlmm.cli import main
from modeling_vwlmm.cli.shared import load, open_pictures
from modeling_vwlmm.looking.heatmaps import word_probabilities
from modeling_vwlmm.looking.patches import read_patches


gradio = pytest.importorskip("gradio")
uvicorn = pytest.importorskip("uvicorn")
NANO = ROOT / "hub_card" / "vwlmm-nano"
IMAGES = [NANO / "examples" / f"{i}.png" for i in range(2)]
CELLS = "document.querySelectorAll('.vw-cell')"


@pytest.fixture(scope="module")
def address():
    """Where the page of the command is, which compares the shipped model with itself."""
    servers, asked, connect = [], [], socket.socket.connect

    class Noted(uvicorn.Server):
        def __init__(self, config):
            super().__init__(config)
            self.ready = threading.Event()
            servers.append(self)

        async def startup(self, sockets=None):
            await super().startup(sockets)
            self.ready.set()

    def noted(own, where):
        asked.append(where)
        return connect(own, where)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", "")  # which the command sets, as the next one
        patch.setenv("GRADIO_ANALYTICS_ENABLED", "")
        patch.setattr(uvicorn, "Server", Noted)
        patch.setattr(socket.socket, "connect", noted)
        arguments = ["explore", str(NANO), "--compare", str(NANO), "--port", "0"]
        thread = threading.Thread(target=main, args=(arguments,), daemon=True)
        thread.start()
        while not servers:
            thread.join(0.05)
            assert thread.is_alive()
        (server,) = servers
        assert server.ready.wait(60)
        host, port = server.servers[0].sockets[0].getsockname()
        assert host == "127.0.0.1"  # nobody else is served
        yield f"http://{host}:{port}"
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()
    assert not [where for where in asked if isinstance(where, tuple) and where[0] not in ("127.0.0.1", "::1")]


@pytest.fixture(scope="module")
def page(address, tmp_path_factory):
    if chromium() is None:
        pytest.skip("there is no Chromium")
    with browse(tmp_path_factory.mktemp("profile")) as page:
        page.open(address)
        page.wait_for(f"{CELLS}.length == 32")
        yield page
        assert not page.problems
        elsewhere = [url for url in page.requests if not url.startswith((address, "data:", "blob:"))]
        assert page.requests and not elsewhere


@pytest.fixture(scope="module")
def nano():
    return load(str(NANO))


def said(page, view=0):
    """What the page says of the patch that was pointed at: its place, then twice the words and their probabilities."""
    lines = page.evaluate(f"document.querySelectorAll('.vw-said')[{view}].innerText").split("\n")
    lines = [line.strip() for line in lines if line.strip()]
    expected = lines.index("the LLM expected p")
    columns = lines[2:expected], lines[expected + 1 :]
    return lines[0], [list(zip(column[::2], map(float, column[1::2]), strict=True)) for column in columns]


def test_a_patch_is_read_where_the_pointer_is(page, nano, tmp_path):
    (image,) = open_pictures([str(IMAGES[0])])
    patches = read_patches(*nano, image)
    for index in (8, 3):
        page.point(".vw-cell", index)
        page.wait_for(f"{CELLS}[{index}].matches('.vw-chosen') && {CELLS}[{16 + index}].matches('.vw-chosen')")
        for view in (0, 1):
            place, columns = said(page, view)
            assert place == f"row {index // 4 + 1}, column {index % 4 + 1}, KL(w ‖ p) {patches[index].kl:.2f} nats"
            for column, expected in zip(columns, patches[index][:2], strict=True):
                assert [word for word, _ in column] == [word for word, _ in expected] and len(column) == 10
                assert [p for _, p in column] == pytest.approx([p for _, p in expected], abs=6e-4)
    page.screenshot(tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 20_000


def test_a_click_keeps_a_patch(page):
    page.point(".vw-cell", 5, click=True)
    page.point(".vw-cell", 6)
    assert page.evaluate(f"{CELLS}[5].matches('.vw-pinned') && !{CELLS}[6].matches('.vw-chosen')")
    page.point(".vw-cell", 6, click=True)
    page.point(".vw-cell", 7)
    assert page.evaluate(f"{CELLS}[7].matches('.vw-chosen')")


def test_a_word_is_coloured_where_it_is(page, nano):
    page.type("#word textarea", "triangle")
    said = page.wait_for("document.querySelector('.vw-heat').innerText")
    values = word_probabilities(*nano, open_pictures([str(IMAGES[0])]), ["triangle"])[0, 0]
    assert said == f"“triangle”: up to {values.max():.3f}"
    alphas = page.evaluate(f"[...{CELLS}].map(cell => +(cell.style.background.match(/, ([0-9.]+)\\)/) || [0, 1])[1])")
    assert alphas == pytest.approx([*(0.9 * values / values.max())] * 2, abs=6e-3)
    page.type("#word textarea", "triangel")
    page.wait_for("""document.body.innerText.includes('no single word "triangel", near it are triangle')""")
    page.type("#word textarea", " ")
    page.wait_for("!document.querySelector('.vw-heat')")


def test_a_question_is_answered_by_both(page):
    page.type("#question textarea", "what color is the shape?")
    for view in (0, 1):
        assert page.wait_for(f"document.querySelector('#answer-{view} textarea').value") == "red"
    page.type("#question textarea", " ")
    page.wait_for("document.body.innerText.includes('there is no question')")


def test_an_image_is_dropped_and_what_is_none_refused(page, nano, tmp_path):
    wrong = tmp_path / "<b>wrong.png"
    wrong.write_bytes(b"no image")
    before = page.evaluate("document.querySelector('.vw-picture img').src")
    page.choose_file("#upload input", wrong)
    page.wait_for("document.body.innerText.includes('wrong.png is no image, expected JPEG, PNG,')")
    assert page.evaluate("document.querySelector('.vw-picture img').src") == before
    page.wait_for("!!document.querySelector('#upload input')")
    page.choose_file("#upload input", IMAGES[1])
    page.wait_for(f"document.querySelector('.vw-picture img').src != {json.dumps(before)}")
    page.point(".vw-cell", 10)
    (image,) = open_pictures([str(IMAGES[1])])
    assert said(page)[1][0][0][0] == read_patches(*nano, image)[10].words[0][0]
    page.wait_for("document.querySelector('#choice input').value == ''")


def test_a_page_of_another_name_is_refused(address):
    """It may be a site that was made to lead here; and no page may load anything from elsewhere."""
    httpx2 = pytest.importorskip("httpx2")
    assert httpx2.get(address, headers={"Host": "elsewhere.example"}).status_code == 400
    policy = httpx2.get(address).headers["content-security-policy"]
    assert policy.startswith("default-src 'self';") and "http" not in policy


def call(address, name, data):
    """What an event of the page returns to a client that is no browser, and what the page would say."""
    httpx2 = pytest.importorskip("httpx2")
    events = httpx2.get(f"{address}/config").json()["dependencies"]
    (number,) = [event["id"] for event in events if event["api_name"] == name]
    own = {"session_hash": secrets.token_hex(8)}
    asked = {"data": data, "fn_index": number, **own}
    httpx2.post(f"{address}/gradio_api/queue/join", json=asked).raise_for_status()
    with httpx2.stream("GET", f"{address}/gradio_api/queue/data", params=own, timeout=60) as answers:
        for line in answers.iter_lines():
            if '"process_completed"' in line:
                return json.loads(line.removeprefix("data: "))["output"]


def test_no_file_is_read_but_uploads_and_the_choice(address):
    """Whoever may ask could see all pictures of this machine: Gradio would copy its files to where it serves them."""
    asked = {"path": str(IMAGES[0]), "meta": {"_type": "gradio.FileData"}}
    assert "it was not uploaded by a user" in call(address, "show", [asked])["error"]
    assert "not in the list of choices" in call(address, "show_1", [str(ROOT / "assets" / "explore.png")])["error"]
    assert call(address, "show_1", [str(IMAGES[1])])["data"][1]["rows"] == 4


def test_pages_of_other_servers_upload_nothing(address):
    httpx2 = pytest.importorskip("httpx2")
    status = {}
    for origin in (address, "http://elsewhere.example", "null", f"{address}0", f"https://elsewhere.example/{address}"):
        answer = httpx2.post(
            f"{address}/gradio_api/upload", files={"files": ("a.png", b"")}, headers={"Origin": origin}
        )
        status[origin] = answer.status_code
    assert list(status.values()) == [200, 403, 403, 403, 403]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_no_upload_is_left_behind(monkeypatch, number):
    folders = []

    def run(server, sockets):
        folders.append(Path(os.environ["GRADIO_TEMP_DIR"]))
        assert folders[0].is_dir() and signal.getsignal(number) != signal.SIG_DFL
        signal.raise_signal(number)  # as uvicorn does of those that it took

    monkeypatch.setattr(uvicorn.Server, "run", run)
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "")
    before = signal.signal(number, signal.SIG_DFL)
    try:
        with pytest.raises(SystemExit) as ended:
            main(["explore", str(NANO), "--port", "0"])
        assert signal.getsignal(number) == signal.SIG_DFL
    finally:
        signal.signal(number, before)
    assert ended.value.code == 128 + number and not folders[0].exists()


def test_errors(tmp_path, capsys, monkeypatch, model_folder):
    model = str(model_folder)
    (tmp_path / "empty").mkdir()
    assert "has no images, expected files" in error_of(capsys, "explore", model, "--images", str(tmp_path / "empty"))
    assert 'found "70000", expected a number from 0 to 65535' in error_of(capsys, "explore", model, "--port", "70000")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert "already in use" in error_of(capsys, "explore", model, "--port", port)
    assert "missing: no such folder" in error_of(capsys, "explore", "./missing", "--port", "0")
    monkeypatch.setitem(__import__("sys").modules, "gradio", None)
    assert 'pip install "modeling-vwlmm[explore]"' in error_of(capsys, "explore", model)
