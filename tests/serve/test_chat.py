"""Requests of the OpenAI format to prompts; what is wrong with one is a sentence."""

import base64
import json

import pytest

from oq2vl_jax.serve.answers import RequestError
from oq2vl_jax.serve.body import Limits, read_body
from oq2vl_jax.serve.chat import to_request
from tests.data.conftest import png

CONTEXT = 256


def parse_request(content, generator, max_context, files_root):
    return to_request(read_body(content, Limits(max_context, files_root, "oq2vl_jax")), generator, max_context)


def data_url(data, kind="png"):
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def picture(data):
    return {"type": "image_url", "image_url": {"url": data_url(data)}}


def body(messages, **fields):
    return json.dumps({"messages": messages, **fields}).encode()


def user(*parts):
    content = [part if isinstance(part, dict) else {"type": "text", "text": part} for part in parts]
    return {"role": "user", "content": content}


def test_messages_become_the_turns_of_the_template(generator):
    messages = [
        {"role": "system", "content": "Be brief."},
        user(picture(png(seed=0)), "What is <image>?"),
        {"role": "assistant", "content": "A bus."},
        user("And", picture(png(seed=1)), "here?"),
        {"role": "user", "content": "Tell me."},
    ]
    fields = {"max_tokens": 7, "temperature": 0.5, "top_p": 0.9, "seed": -1, "stop": "x", "stream": True, "user": "me"}
    parsed = parse_request(body(messages, **fields), generator, CONTEXT, None)
    image = "<|image_pad|>" * 4
    assert generator.codec.decode_exact(parsed.request.prompt) == (
        f"<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n{image}\nWhat is <image-placeholder>?<|im_end|>\n"
        f"<|im_start|>assistant\nA bus.<|im_end|>\n<|im_start|>user\nAnd{image}\nhere?\nTell me.<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert parsed.request.images == [png(seed=0), png(seed=1)]
    (options,) = parsed.options
    assert (options.max_new_tokens, options.temperature, options.top_p, options.stop) == (7, 0.5, 0.9, ("x",))
    assert parsed.is_stream
    assert parse_request(body([user("hi")]), generator, CONTEXT, None).options[0].temperature == 0


HI = user("hi")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "the body is not valid JSON"),
        (b"[" * 10_000, "the body is not valid JSON"),
        (b"[" * 100_000, "100,000 brackets and commas"),
        (b"[]", "must be a JSON object"),
        (b"{}", "messages must be a list"),
        (body([]), "messages must be a list"),
        (body([{"role": "assistant", "content": "hi"}, HI]), "starts with the assistant"),
        (body([HI, {"role": "assistant", "content": "hi"}]), "the last message must be the user's"),
        (body([{"role": "robot", "content": "hi"}]), "role must be system, user or assistant"),
        (body([HI, {"role": "system", "content": "hi"}]), "a system message comes first"),
        (body([HI, {"role": "assistant", "content": [picture(png())]}, HI]), "images belong to user messages"),
        (body([{"role": "user", "content": 3}]), "content must be text or a list"),
        (body([user({"type": "video_url"})]), "parts are text or image_url, got 'video_url'"),
        (
            body([user({"type": "image_url", "image_url": {"url": "https://x.org/a.png"}})]),
            "https images are not fetched",
        ),
        (body([user({"type": "image_url", "image_url": "data:image/png,abc"})]), "a data URL must be"),
        (body([user({"type": "image_url", "image_url": "data:image/png;base64,a!"})]), "base64 is broken"),
        (body([user(picture(b"no picture"))]), "it is damaged or none of"),
        (body([user(picture(png()[:-40]))]), "its data are damaged or cut off"),
        (body([user({"type": "image_url", "image_url": "/etc/passwd"})]), "local files are not served here"),
        (body([user("x" * 300)]), "this server takes 256"),
        (body([user("\ud800")]), "no UTF-8"),
        (body([HI], temperature=-1), "temperature must be"),
        (body([HI], temperature="hot"), "temperature must be a number, got 'hot'"),
        (body([HI], max_tokens=-3), "max_tokens must be at least 1, got -3"),
        (body([HI], n=9), "n must be 1 to 8"),
        (body([HI], tools=[{"type": "function"}]), "tools is not supported"),
        (body([HI], stop=["", "x"]), "a stop text is empty"),
    ],
)
def test_what_is_wrong_with_a_request_is_one_sentence(generator, content, message):
    with pytest.raises(RequestError, match=message) as caught:
        parse_request(content, generator, CONTEXT, None)
    assert caught.value.status == 400


def test_local_files_are_served_from_the_allowed_folder_only(generator, tmp_path):
    (tmp_path / "open").mkdir()
    (tmp_path / "open" / "a b.png").write_bytes(png(seed=2))
    (tmp_path / "secret.png").write_bytes(png(seed=3))
    (tmp_path / "open" / "link.png").symlink_to(tmp_path / "secret.png")
    for url in ("a b.png", f"file://{tmp_path}/open/a%20b.png"):
        parsed = parse_request(
            body([user({"type": "image_url", "image_url": url})]), generator, CONTEXT, tmp_path / "open"
        )
        assert parsed.request.images == [png(seed=2)]
    for url in ("../secret.png", str(tmp_path / "secret.png"), "link.png", "nothing.png", "file:///etc/passwd"):
        with pytest.raises(RequestError, match="no such file below the folder"):
            parse_request(body([user({"type": "image_url", "image_url": url})]), generator, CONTEXT, tmp_path / "open")
