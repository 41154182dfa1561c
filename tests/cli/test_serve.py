"""`vwlmm serve`: OpenAI's own client gets what `vwlmm generate` prints, and bad requests an error."""

import base64
import io
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import uvicorn

from helpers.command_line import error_of
from helpers.conversations import picture, tiny_processor
from helpers.tiny import tiny_model
from modeling_vwlmm.cli import main
from modeling_vwlmm.cli.serve import make_app
from modeling_vwlmm.cli.shared import load, names_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of a tiny model and two pictures."""
    folder = tmp_path_factory.mktemp("serve")
    model = tiny_model()
    model.save_pretrained(folder / "model")
    tiny_processor(model.config).save_pretrained(folder / "model")
    for i in range(2):
        picture(i).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def client(folder):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    app = make_app(*load(str(folder / "model")), "model", names_of("127.0.0.1"), folder)
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as client:
        yield client
    server.should_exit = True
    thread.join()


def data_url(i):
    png = io.BytesIO()
    picture(i).save(png, "PNG")
    return f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"


def ask(client, *urls, text="w20 w21", **options):
    content = [*({"type": "image_url", "image_url": {"url": url}} for url in urls), {"type": "text", "text": text}]
    messages = [{"role": "user", "content": content}]
    answer = client.chat.completions.create(model="model", messages=messages, max_tokens=6, **options)
    if options.get("stream"):
        return "".join(part.choices[0].delta.content or "" for part in answer if part.choices).split()
    return answer.choices[0].message.content.split()


def generated(folder, capsys, i):
    capsys.readouterr()
    main(["generate", str(folder / "model"), str(folder / f"{i}.png"), "--prompt", "w20 w21", "--max-new-tokens", "6"])
    return capsys.readouterr().out.split()


def test_an_answer_is_that_of_generate(client, folder, capsys):
    expected = [generated(folder, capsys, i) for i in range(2)]
    assert [ask(client, data_url(i)) for i in range(2)] == expected
    assert ask(client, "file:1.png") == ask(client, "file:///1.png") == expected[1]
    assert ask(client, data_url(1), stream=True) == expected[1]
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda i: ask(client, data_url(i % 2)), range(8)))
    assert found == 4 * expected
    assert [model.id for model in client.models.list()] == ["model"]


@pytest.mark.parametrize(
    "url, message",
    [
        ("file:///etc/hostname", "is no file of the image folder"),
        ("file:../../etc/hostname", "is no file of the image folder"),
        ("/etc/hostname", "expected data:image/...;base64,..., or file:NAME of the image folder"),
        ("http://127.0.0.1/a.png", "expected data:image/...;base64,..."),
        ("data:image/png;base64,!", "is not base64"),
        ("data:image/png;base64,bm8gaW1hZ2U=", "expected a whole image"),
    ],
)
def test_an_image_that_is_not_to_be_had_is_an_error(client, url, message):
    with pytest.raises(openai.BadRequestError, match=r"messages\[0\].content\[0\]") as error:
        ask(client, url)
    assert message in str(error.value)


def test_a_bad_request_is_an_error(client):
    with pytest.raises(openai.UnprocessableEntityError, match="Unexpected fields"):
        ask(client, extra_body={"colour": "red"})
    for content in (3, [{"type": "video"}], [{"type": "image_url", "image_url": 3}]):
        with pytest.raises(openai.BadRequestError, match="messages"):
            client.chat.completions.create(model="model", messages=[{"role": "user", "content": content}])
    for messages in ([], "hello", [3]):
        with pytest.raises(openai.BadRequestError, match="messages"):
            client.chat.completions.create(model="model", messages=messages)
    with pytest.raises(openai.BadRequestError, match="pinned to 'model'"):
        client.chat.completions.create(model="other", messages=[{"role": "user", "content": "w20"}])
    with pytest.raises(openai.BadRequestError):
        ask(client, temperature="hot")
    with pytest.raises(openai.BadRequestError, match="found a chat_template"):  # which may never end
        ask(client, extra_body={"chat_template_kwargs": {"chat_template": "{{ bos_token }}"}})
    with pytest.raises(openai.APIStatusError) as error:
        client.post("/chat/completions", cast_to=object, content=b"{")
    assert error.value.status_code == 400
    assert ask(client, text="w20")  # it still answers


def test_a_page_that_has_its_name_point_here_reads_nothing(client):
    url, headers = str(client.base_url), {"Host": "evil.example"}
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0, default_headers=headers) as rebound:
        with pytest.raises(openai.BadRequestError):
            ask(rebound, data_url(0))


def test_a_call_that_cannot_be_served_is_one_line(folder, capsys):
    assert "no such image folder" in error_of(capsys, "serve", str(folder / "model"), "--image-folder", "nowhere")
    assert "nowhere" in error_of(capsys, "serve", str(folder / "nowhere"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert "in use" in error_of(capsys, "serve", str(folder / "model"), "--port", port)
