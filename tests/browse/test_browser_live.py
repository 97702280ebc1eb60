"""A site that was built of a real model, served with it, in a real browser; and what the server refuses."""

from __future__ import annotations

import http.client
import http.server
import io
import json
import socket
import statistics
import sys
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from PIL import Image

import clipsteer
from _site import PATIENCE, processor_time, until, visit
from clipsteer.browse.build import build_site
from clipsteer.browse.explained import Explained
from clipsteer.browse.live import Live, read_data
from clipsteer.browse.server import MOST_BYTES, refusal, serve
from clipsteer.data import open_dataset
from clipsteer.data.dataset import ImageDataset
from clipsteer.io.files import FileFormatError
from clipsteer.sae.site import find_site


class Served(NamedTuple):
    root: str
    port: int
    folder: Path
    explained: Explained
    dataset: Any


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """EmojiCLIP's own tokens as directions: features that mean something, without training."""
    clip = clipsteer.load("emojiclip")
    drawn = open_dataset("emoji:held-out:seen")
    chosen = range(0, 600, 25)
    classes = [drawn.classes[drawn.targets[row]] for row in chosen]
    dataset = ImageDataset(lambda i: drawn[chosen[i]][0], list(range(len(chosen))), classes)
    hook_point = "visual.transformer.resblocks.3"
    pixels = torch.stack([clip.preprocess(dataset[row][0]) for row in range(len(dataset))])
    with clipsteer.clip.capture(clip, hook_point) as found, torch.no_grad():
        clip.embed(pixels)
    tokens = found[hook_point].flatten(0, 1)
    sae = clipsteer.SAE(192, 128, "topk", 8, metadata={"hook_point": hook_point, "tokens": "all"})
    with torch.no_grad():
        mean = tokens.mean(0)
        rows = torch.nn.functional.normalize(tokens[::3][:128] - mean, dim=1)
        sae.W_dec.copy_(rows)
        sae.W_enc.copy_(rows)
        sae.b_dec.copy_(mean)
    folder = tmp_path_factory.mktemp("served") / "site"
    build_site(sae, clip, dataset, folder, words=[*classes, "red", "a face"], steer=16, title="Built for a test")
    return folder, Explained.find(sae, clip), dataset


@pytest.fixture(scope="module")
def served(built):
    pytest.importorskip("uvicorn", reason="needs uvicorn: pip install 'clipsteer[serve]'")
    pytest.importorskip("starlette", reason="needs starlette: pip install 'clipsteer[serve]'")
    address: list[str] = []
    ready = threading.Event()

    def opened(where: str) -> None:
        address.append(where)
        ready.set()

    threading.Thread(target=serve, args=built, kwargs={"port": 0, "ready": opened}, daemon=True).start()
    assert ready.wait(PATIENCE)
    return Served(address[0], int(address[0].rstrip("/").rpartition(":")[2]), *built)


def ask(served, method, path, body=None, **headers):
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=PATIENCE)
    connection.request(method, path, body, {k.replace("_", "-"): v for k, v in headers.items()})
    answer = connection.getresponse()
    return answer.status, answer.read(), dict(answer.getheaders())


def steer(served, **asked):
    return ask(served, "POST", "/api/steer", json.dumps(asked), Content_Type="application/json")


def steered(explained, dataset, feature, activation, rows):
    """By the public way: a hook in the model."""
    clip, sae = explained.clip, explained.sae
    pixels = torch.stack([clip.preprocess(dataset[row][0]) for row in rows])
    steering = clipsteer.SAESteering(sae, {feature: activation})
    with torch.no_grad(), clipsteer.steer(clip, {explained.site.hook_point: steering}):
        return clip.embed(pixels)


def active(folder) -> int:
    """A feature with stored predictions."""
    features = read_data(folder, "features/0")["features"] + read_data(folder, "features/1")["features"]
    return next(feature["index"] for feature in features if feature["steering"] is not None)


@pytest.mark.parametrize("strength", [0, 1, 3.7, -2])
def test_any_strength_is_what_a_hook_in_the_model_does(served, strength):
    feature = active(served.folder)
    peak = read_data(served.folder, "overview")["peak"][feature]
    status, body, _ = steer(served, feature=feature, strength=strength, images=[3, 9])
    assert status == 200
    found = torch.tensor(json.loads(body)["after"])
    live = Live(served.folder, served.explained, served.dataset)
    wanted = live.predictions.of(steered(served.explained, served.dataset, feature, strength * peak, [3, 9]))
    torch.testing.assert_close(found, wanted, rtol=2e-3, atol=1e-5)  # four digits are written
    clean = torch.tensor(json.loads(body)["before"])
    if strength in (3.7, -2):
        assert (found - clean).abs().max() > 1e-3


def test_stored_and_live_predictions_agree(served):
    feature = active(served.folder)
    steering = read_data(served.folder, f"features/{feature // 64}")["features"][feature % 64]["steering"]
    for s, strength in enumerate(read_data(served.folder, "site")["strengths"]):
        # the peak is written with four digits: what was stored lies between its bounds
        bounds = []
        for peak in (1 - 5e-4, 1 + 5e-4):
            _, body, _ = steer(served, feature=feature, strength=strength * peak, images=steering["images"])
            bounds.append(torch.tensor(json.loads(body)["after"])[:, steering["classes"]])
        stored = torch.tensor(steering["probability"][s])
        low, high = torch.minimum(*bounds), torch.maximum(*bounds)
        rounding = 1e-5 + 1e-3 * high  # four digits, of what is stored and of what is answered
        assert bool((stored >= low - rounding).all())
        assert bool((stored <= high + rounding).all())


def test_the_same_pages_with_a_slider_that_asks_the_model(served, opened):
    feature = active(served.folder)
    page = opened(served.root, f"#/feature/{feature}")
    page.wait_for_selector(".pairs[data-ms]")
    slider = page.locator("#strength")
    slider.focus()
    times = []
    for key in ("End", "ArrowLeft", "Home", "ArrowRight", "ArrowRight", "End", "Home"):
        page.evaluate("delete document.querySelector('.pairs').dataset.ms")
        begun = time.process_time()  # the server is a thread of this process
        with processor_time(page) as spent:
            page.keyboard.press(key)
            page.wait_for_selector(".pairs[data-ms]")
        times.append(spent[0] + time.process_time() - begun)
    assert statistics.median(times) <= 0.3, times
    page.get_by_label("Any strength").fill("-12.5")
    page.keyboard.press("Enter")
    page.wait_for_selector(".pairs[data-strength='-12.5']")
    row = read_data(served.folder, f"features/{feature // 64}")["features"][feature % 64]["steering"]["images"][0]
    peak = read_data(served.folder, "overview")["peak"][feature]
    live = Live(served.folder, served.explained, served.dataset)
    p = live.predictions.of(steered(served.explained, served.dataset, feature, -12.5 * peak, [row]))[0]
    assert live.predictions.names[int(p.argmax())] in page.locator(".pair .shift").first.inner_text()


def test_a_picture_of_ones_own(served, opened, tmp_path):
    picture, _ = served.dataset[7]
    picture.resize((200, 300)).save(tmp_path / "mine <b>.png")
    page = opened(served.root, "#/own", expected=("400",))
    (tmp_path / "no.png").write_bytes(b"no picture")
    page.set_input_files("#upload", tmp_path / "no.png")
    page.locator(".upload .trouble", has_text="cannot be read").wait_for()
    page.set_input_files("#upload", tmp_path / "mine <b>.png")
    page.wait_for_selector(".patches button")
    with Image.open(tmp_path / "mine <b>.png") as saved:
        pixels = served.explained.clip.preprocess(saved)[None]
    live = Live(served.folder, served.explained, served.dataset)
    with torch.no_grad():
        p = live.predictions.of(served.explained.clip.embed(pixels))[0]
    assert live.predictions.names[int(p.argmax())] in page.locator(".predictions li").first.inner_text()
    assert page.locator(".patches button").count() == 16
    assert page.locator(".removed li").count() > 0
    page.locator(".firing a").first.click()
    page.wait_for_selector("main[data-page=feature]")
    page.wait_for_selector(".pairs[data-ms]")
    assert page.locator(".pair .file").first.inner_text() == "mine <b>.png"
    assert page.locator(".pair img").first.get_attribute("src").startswith("data:image/webp")


def test_a_built_site_opens_from_disk_just_so(built, opened):
    folder, explained, dataset = built
    page = opened((folder / "index.html").as_uri())
    until(page, "[...document.querySelectorAll('.rows img')].some(i => i.complete && i.naturalWidth)")
    for place in ("#/feature/3", "#/picture/2", "#/pictures"):
        visit(page, place)
        until(page, "[...document.querySelectorAll('main img')].some(i => i.complete && i.naturalWidth)")
        assert page.locator(".failed").count() == 0
    assert find_site(explained.sae, explained.clip, None, None).hook_point in page.locator("header").first.inner_text()
    assert len(dataset) == 24


def test_pages_of_others_get_nothing(served, opened):
    """Another server of this machine: its page can neither ask nor read what scripts hold."""

    class Other(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(b"<main data-page>other</main>")

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Other) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        page = opened(
            f"http://localhost:{other.server_port}/", expected=("request", "Failed to load", "CORS", "blocked")
        )
        got = page.evaluate(
            """async root => {
              window.clipsteer = {put: key => { window.stolen = key; }};
              const script = document.createElement('script');
              script.src = root + 'data/site.js';
              const loaded = await new Promise(done => {
                script.onload = () => done(true); script.onerror = () => done(false); document.head.append(script);
              });
              const asked = await fetch(root + 'api/steer', {method: 'POST', mode: 'no-cors', body: '{}'})
                .then(answer => answer.type, () => 'failed');
              return [loaded, window.stolen ?? null, asked];
            }""",
            served.root,
        )
        other.shutdown()
    assert got[:2] == [False, None]
    assert got[2] in ("failed", "opaque")


@pytest.mark.parametrize(
    ("headers", "wanted"),
    [
        ({}, 200),
        ({"Host": "localhost:1"}, 200),
        ({"Host": "[::1]:1"}, 200),
        ({"Host": "evil.example"}, 403),
        ({"Host": "127.0.0.1.evil.example"}, 403),
        ({"Host": ""}, 403),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Sec_Fetch_Site": "same-origin"}, 200),
        ({"Sec_Fetch_Site": "cross-site"}, 403),
        ({"Sec_Fetch_Site": "same-site"}, 403),
        ({"Sec_Fetch_Site": "cross-site", "Sec_Fetch_Mode": "navigate"}, 200),
    ],
)
def test_who_is_answered(served, headers, wanted):
    for path in ("/", "/data/site.js"):
        status, _, given = ask(served, "GET", path, **headers)
        assert status == wanted
        assert given["cross-origin-resource-policy"] == "same-origin"
        assert given["x-content-type-options"] == "nosniff"


def test_two_hosts_are_none():
    twice = [(b"host", b"127.0.0.1"), (b"host", b"evil.example")]
    assert refusal({"type": "http", "method": "GET", "headers": twice}) is not None
    assert refusal({"type": "http", "method": "GET", "headers": twice[:1]}) is None


def test_what_is_asked_wrongly_is_said(served):
    feature = active(served.folder)
    dead = (
        read_data(served.folder, "overview")["peak"].index(0)
        if 0 in read_data(served.folder, "overview")["peak"]
        else None
    )
    good = {"feature": feature, "strength": 1, "images": [0]}
    assert steer(served, **good)[0] == 200
    for wrong in (
        {"feature": 128},
        {"feature": -1},
        {"feature": True},
        {"feature": "0"},
        {"strength": "1"},
        {"strength": 1e308},
        {"strength": 10**400},
        {"images": []},
        {"images": [24]},
        {"images": [0.5]},
        {"images": list(range(33))},
        {"images": 3},
        {"own": "nobody's"},
        {"own": 4},
        *([] if dead is None else [{"feature": dead}]),
    ):
        status, body, _ = steer(served, **{**good, **wrong})
        assert status == 400, wrong
        assert json.loads(body)["error"]
    for body in (b"", b"[]", b"{", b"[" * 50_000, b'{"feature": 1, "strength": NaN, "images": [0]}'):
        assert ask(served, "POST", "/api/steer", body)[0] == 400
    assert ask(served, "POST", "/api/steer", b" " * 100_000)[0] == 413
    assert ask(served, "GET", "/api/steer")[0] in (404, 405)
    assert ask(served, "GET", "/nothing")[0] == 404


def test_files_beside_the_site_are_nobodys(served):
    (served.folder.parent / "secret.webp").write_text("secret")
    (served.folder.parent / "secret.txt").write_text("secret")
    for path in (
        "/../secret.txt",
        "/%2e%2e/secret.txt",
        "/data/..%2f..%2fsecret.txt",
        "/thumbs/..%2f..%2fsecret.webp",
        "//etc/passwd",
        "/thumbs/.webp",
    ):
        status, body, _ = ask(served, "GET", path)
        assert status == 404, path
        assert b"secret" not in body


def test_pictures_are_read_by_the_guarded_reader(served):
    too_long = b"\x89PNG" + bytes(MOST_BYTES)
    assert ask(served, "POST", "/api/picture", too_long)[0] == 413
    for content in (b"", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%!PS-Adobe", b"\x89PNG\r\n\x1a\n"):
        status, body, _ = ask(served, "POST", "/api/picture", content)
        assert status == 400
        assert "cannot be read as an image" in json.loads(body)["error"]
    buffer = io.BytesIO()
    Image.new("RGB", (50, 40), "red").save(buffer, "PNG")
    status, body, _ = ask(served, "POST", "/api/picture", buffer.getvalue())
    found = json.loads(body)
    assert status == 200
    assert len(found["patches"]["offsets"]) == 18
    assert sum(p for _, p in found["predicted"]) <= 1.001
    # the latest are kept, the others forgotten
    for shade in range(9):
        buffer = io.BytesIO()
        Image.new("RGB", (8, 8), (shade, 0, 0)).save(buffer, "PNG")
        ask(served, "POST", "/api/picture", buffer.getvalue())
    assert steer(served, feature=active(served.folder), strength=1, own=found["id"])[0] == 400


def test_without_its_libraries_a_server_names_the_extra(built, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(RuntimeError, match=r"clipsteer\[serve\]"):
        serve(*built, port=0)


def test_serving_begins_only_where_it_can(built, tmp_path):
    pytest.importorskip("uvicorn")
    folder, explained, dataset = built
    with pytest.raises(ValueError, match=r"ssh -L"):
        serve(folder, explained, dataset, host="0.0.0.0", port=0)
    with pytest.raises(ValueError, match="no site"):
        serve(tmp_path, explained, dataset, port=0)
    with pytest.raises(ValueError, match="build it for these"):
        Live(folder, explained, dataset.subset([0, 1]))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(RuntimeError, match="choose another port"):
            serve(folder, explained, dataset, port=taken.getsockname()[1])
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "site.js").write_text("alert(1)")
    with pytest.raises(FileFormatError, match=r"clipsteer\.put"):
        read_data(tmp_path, "site")
