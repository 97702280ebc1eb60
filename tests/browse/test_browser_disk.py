"""The pages in a real browser, opened from disk as a person would: 12,288 features, hostile names."""

from __future__ import annotations

import base64
import json
import re
import shutil
import zlib
from itertools import pairwise

import pytest

from _site import CLASSES, FORMULA, HOSTILE, STRENGTHS, processor_time, until, visit


def root(disk) -> str:
    return (disk / "index.html").as_uri()


def data(disk, key):
    text = (disk / "data" / f"{key}.js").read_text().split(",", 1)[1].strip().removesuffix(");")
    value = json.loads(text)
    return json.loads(zlib.decompress(base64.b64decode(value))) if isinstance(value, str) else value


def shown(page) -> list[int]:
    """Features in sight, top to bottom."""
    return page.evaluate(
        "[...document.querySelectorAll('.rows a')].sort((a, b) => a.dataset.position - b.dataset.position)"
        ".map(a => +a.querySelector('.index').textContent)"
    )


def counted(page) -> int:
    return int(page.locator(".count").inner_text().split(" of ")[0].replace(",", ""))


def test_the_first_picture_takes_less_than_a_second(disk, opened):
    page = opened(root(disk))
    with processor_time(page) as spent:
        page.reload()
        until(page, "[...document.querySelectorAll('.rows img')].some(i => i.complete && i.naturalWidth)")
    assert spent[0] < 1
    assert counted(page) == sum(p > 0 for p in data(disk, "overview")["peak"])
    head = page.get_by_role("columnheader", name="Steerability")
    assert "mean over 4 pictures" in head.get_attribute("title")
    assert "a ranking, not a measurement" in page.locator(".controls").inner_text()
    # bars of a column that is all alike: full at 100 %, in powers of ten or not
    assert page.evaluate("[true, false].map(log => lengths({values: [1, 1], log, most: log ? 0 : 1}).of(1))") == [1, 1]


def test_a_list_of_thousands_holds_few_rows_and_does_not_stall(disk, opened):
    # this site has the pieces of the first features only
    page = opened(root(disk), "#/?show=all&sort=index&up=", expected=("ERR_FILE_NOT_FOUND",))
    assert counted(page) == 12_288
    times = []
    for i in range(1, 41):
        with processor_time(page) as times_of_one:
            page.evaluate(
                """async share => {
                  const scroller = document.querySelector('.scroller');
                  scroller.scrollTop = share * scroller.scrollHeight;
                  await new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)));
                }""",
                i / 40,
            )
        times += times_of_one
    assert max(times) < 0.2, times
    assert page.locator(".rows .row").count() < 60
    assert shown(page)[-1] == 12_287
    assert page.locator("[role=table]").get_attribute("aria-rowcount") == "12289"
    page.locator(".rows a").last.focus()
    page.keyboard.press("Home")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("PageDown")
    assert int(page.evaluate("document.activeElement.dataset.position")) > 5
    page.keyboard.press("End")
    page.keyboard.press("Enter")
    page.wait_for_selector("main[data-page=feature], .failed")


def test_search_sort_and_limits_are_those_of_the_data(disk, opened):
    overview = data(disk, "overview")
    peak, density = overview["peak"], overview["density"]
    names = [
        "\n".join((w, c, CLASSES[t].replace("_", " ") if t >= 0 else "")).lower()
        for w, c, t in zip(overview["word"], overview["concept"], overview["top_class"])
    ]
    alive = [i for i, p in enumerate(peak) if p > 0]
    page = opened(root(disk))
    search = page.locator("#search")

    search.fill("alarm clock")  # a class, whose file name has an underscore
    wanted = {i for i in alive if "alarm" in names[i] and "clock" in names[i]}
    assert counted(page) == len(wanted) > 100
    page.select_option("#sort", "peak")
    best = sorted(wanted, key=lambda i: (-peak[i], i))
    assert shown(page)[:8] == best[:8]
    page.click(".turn")
    assert shown(page)[:8] == sorted(wanted, key=lambda i: (peak[i], i))[:8]

    search.fill("stripes")
    assert counted(page) == sum("stripes" in names[i] for i in alive)
    search.fill("4321")  # a number leads, whatever the order is
    assert shown(page)[0] == 4321
    search.fill("nothing is called that")
    assert page.locator(".nothing").is_visible()

    search.fill("")
    page.select_option("#show", "dead")
    assert counted(page) == 12_288 - len(alive)
    page.select_option("#show", "alive")
    page.select_option("#class", str(CLASSES.index("cactus")))
    assert counted(page) == sum(overview["top_class"][i] == CLASSES.index("cactus") for i in alive)
    page.select_option("#class", "")
    page.click("summary")
    page.get_by_label("Density, at least").fill("0.05")
    page.get_by_label("Peak, at most").fill("2")
    assert counted(page) == sum(density[i] >= 0.05 and peak[i] <= 2 for i in alive) > 0
    page.reload()  # the address holds it all
    page.wait_for_selector(".rows a")
    assert counted(page) == sum(density[i] >= 0.05 and peak[i] <= 2 for i in alive)
    page.locator(".chip").first.click()
    page.locator(".chip").first.click()
    assert counted(page) == len(alive)
    page.get_by_role("columnheader", name="Selectivity").get_by_role("button").click()
    assert page.get_by_role("columnheader", name="Selectivity").get_attribute("aria-sort") == "descending"
    assert shown(page)[0] == max(alive, key=lambda i: (overview["selectivity"][i], -i))


def test_a_point_of_the_scatter_opens_its_feature_and_a_drag_selects(disk, opened):
    page = opened(root(disk), "#/?x=density&y=peak", expected=("ERR_FILE_NOT_FOUND",))
    canvas = page.locator(".points")
    box = canvas.bounding_box()
    all_of_them = counted(page)
    page.mouse.move(box["x"] + 60, box["y"] + 60)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2, steps=3)
    page.mouse.up()
    assert 0 < counted(page) < all_of_them
    assert page.locator(".chip").count() == 2
    page.evaluate("location.hash = '#/?x=density&y=peak&density=~0.0001'")
    page.wait_for_selector(".chip")
    canvas.focus()
    page.keyboard.press("ArrowRight")
    first = page.locator(".tip .index").inner_text()
    assert first in page.locator("#status").inner_text()
    page.keyboard.press("ArrowRight")
    assert page.locator(".tip .index").inner_text() != first
    box = canvas.bounding_box()
    for u, v in [(0.2, 0.5), (0.25, 0.4), (0.3, 0.3), (0.22, 0.6)]:
        page.mouse.move(box["x"] + u * box["width"], box["y"] + v * box["height"])
        if page.locator(".tip").is_visible():
            break
    wanted = page.locator(".tip .index").inner_text()
    page.mouse.down()
    page.mouse.up()
    page.wait_for_url(re.compile(rf"#/feature/{wanted}$"))


def test_a_feature_shows_what_is_stored_of_it(disk, opened):
    stored = data(disk, "features/0")["features"][12]
    pictures = data(disk, "pictures")
    page = opened(root(disk), "#/feature/12")
    assert page.locator("h1 .index").inner_text() == "12"
    assert page.locator(".top-pictures figure").count() == 9
    first = page.locator(".top-pictures figure").first
    row = stored["top"][0][0]
    assert pictures["file"][row] in first.inner_text()
    assert f"truth: {CLASSES[pictures['truth'][row]].replace('_', ' ')}" in first.inner_text()
    # heat: each patch as hot as its byte says
    drawn = page.evaluate(
        "[...document.querySelector('.top-pictures canvas').getContext('2d').getImageData(0, 0, 7, 7).data]"
        ".filter((_, i) => i % 4 === 0)"
    )
    bytes_ = list(bytes.fromhex(stored["top"][0][2]))
    order = sorted(range(49), key=lambda i: bytes_[i])
    assert len(drawn) == 49
    heat = [drawn[i] for i in order]
    assert heat[-1] - heat[0] > 100
    assert all(after >= before - 2 for before, after in pairwise(heat))  # a canvas rounds what is translucent
    page.get_by_label("show where it fires").uncheck()
    assert not page.locator(".top-pictures canvas").first.is_visible()
    assert page.locator(".interval").count() == 5
    assert page.locator(".interval figure").count() == 20
    # log y: a bin of one token is seen, an empty one is not
    said = "mean over 4 pictures, set to its peak: a ranking, not a measurement"
    assert said in page.locator(".feature > .note").first.inner_text()
    assert said in page.locator(".stats div", has_text="Steerability").get_attribute("title")
    assert "mean of its pictures' peaks" in page.locator(".classes .bars").inner_text()
    words = page.evaluate(
        "[...document.querySelectorAll('.in-words .bars:last-of-type .said')].map(e => e.textContent)"
    )
    assert words == [word for word, _ in stored["words"] + stored["opposite"]]
    assert page.locator(".histogram .bar").count() == sum(count > 0 for count in stored["histogram"])
    page.locator(".histogram .hit").nth(3).hover()
    assert f"{stored['histogram'][3]:,} token" in page.locator(".histogram .told").inner_text()
    page.evaluate("Site.about.words.count = 3")  # of so few words none is at both ends
    similar = page.locator(".similar a").first
    similar.click()
    page.wait_for_url("**#/feature/13*")
    until(page, "document.querySelector('h1 .index')?.textContent === '13'")
    assert page.locator(".in-words .bars").last.locator("li").count() == 2


def test_the_slider_shows_the_same_pictures_before_and_after(disk, opened):
    steering = data(disk, "features/0")["features"][12]["steering"]
    pictures = data(disk, "pictures")
    page = opened(root(disk), "#/feature/12?strength=3")
    assert page.locator(".pairs").get_attribute("data-strength") == "3"
    assert "3× its peak" in page.locator(".strength").inner_text()
    sources = "[...document.querySelectorAll('.pair img')].map(i => i.getAttribute('src'))"
    before = page.evaluate(sources)
    slider = page.locator("#strength")
    assert (slider.get_attribute("min"), slider.get_attribute("max")) == ("0", str(len(STRENGTHS) - 1))
    assert len(STRENGTHS) >= 9
    slider.focus()
    for key, strength in (("End", STRENGTHS[-1]), ("ArrowLeft", STRENGTHS[-2]), ("Home", 0)):
        page.keyboard.press(key)
        s = STRENGTHS.index(strength)
        assert page.locator(".pairs").get_attribute("data-strength") == str(strength)
        assert f"strength={strength}" in page.url
        marks = page.evaluate(
            "[...document.querySelectorAll('.pair')].map("
            "p => [[...p.querySelectorAll('b')].map(b => b.firstChild.data), p.querySelectorAll('.moved').length])"
        )
        texts = page.locator(".pair .paired").all_inner_texts()
        assert len(texts) == 4
        for r, text in enumerate(texts):
            best = max(range(len(steering["classes"])), key=lambda c: steering["probability"][s][r][c])
            p = 100 * steering["probability"][s][r][best]
            assert CLASSES[steering["classes"][best]].replace("_", " ") in text
            assert f"{p:.1f} %" in text or f"{p:.0f} %" in text
            truth = pictures["truth"][steering["images"][r]]
            bold, moved = marks[r]
            assert bold == [CLASSES[c].replace("_", " ") for c in steering["classes"] if c == truth]
            changed = steering["first"][s][r] != pictures["first"][steering["images"][r]]
            assert moved == changed
    weight = "getComputedStyle(document.querySelector('.shift > span:last-child')).fontWeight"
    assert page.evaluate(weight) == "400"
    assert page.evaluate(sources) == before
    assert "suppressed" in page.locator(".strength").inner_text()
    assert page.locator(".steer .line").count() == 6
    assert page.locator(".steer text.name").count() == 6  # named where they end
    page.reload()
    page.wait_for_selector(".pairs[data-strength='0']")


def test_what_a_chart_shows_can_be_taken_along(disk, opened):
    stored = data(disk, "features/0")["features"][12]
    page = opened(root(disk), "#/feature/12")

    def taken(button: str) -> str:
        with page.expect_download() as download:
            page.get_by_role("button", name=button).click()
        return download.value.path().read_text()

    lines = taken("CSV of histogram 12").splitlines()
    assert lines[0] == "from,to,tokens"
    assert [int(line.split(",")[2]) for line in lines[1:]] == stored["histogram"]
    rows = json.loads(taken("JSON of steer 12"))
    assert len(rows) == len(STRENGTHS) * 4 * len(stored["steering"]["classes"])
    for row in rows[:40]:
        s, c = STRENGTHS.index(row["strength"]), [n.replace("_", " ") for n in CLASSES].index(row["class"])
        r, c = stored["steering"]["images"].index(row["picture"]), stored["steering"]["classes"].index(c)
        assert row["after"] == stored["steering"]["probability"][s][r][c]
        assert row["before"] == stored["steering"]["clean"][r][c]
    page.evaluate("location.hash = '#/?show=all'")
    page.wait_for_selector(".rows a")
    table = taken("CSV of features")
    assert len(table.splitlines()) == 12_289
    assert f",'{FORMULA}," in table  # no formula for a spreadsheet
    assert '"<img src=x onerror=""document.title=1"">"' in table


def test_a_patch_tells_its_features_by_mouse_key_and_tap(disk, opened):
    image = data(disk, "images/0")["images"][5]
    offsets, features = image["patches"]["offsets"], image["patches"]["features"]

    def stored(token):
        return features[offsets[token] : offsets[token + 1]]

    def listed(page):
        return page.evaluate("[...document.querySelectorAll('.firing .index')].map(e => +e.textContent)")

    page = opened(root(disk), "#/picture/5")
    cells = page.locator(".patches button")
    assert cells.count() == 49
    assert len(listed(page)) == min(40, len(set(features)))
    cells.nth(10).hover()
    assert listed(page) == stored(11)  # a class token stands before the patches
    assert "row 2, column 4" in page.locator(".fires h2").inner_text()
    page.mouse.move(5, 5)
    cells.nth(0).focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    assert listed(page) == stored(9)
    assert "token=9" in page.url
    assert page.locator("#status").inner_text().startswith("Patch in row 2, column 2")
    page.locator(".firing a").first.hover()
    assert page.locator(".stage .layer canvas").count() == 1
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Class token").click()
    assert listed(page) == stored(0)
    text = page.locator(".removed").inner_text()
    assert all(str(feature) in text for feature, *_ in image["removed"])
    # bars to both sides have one scale
    wide = page.evaluate(
        "[...document.querySelectorAll('.removed .track span')].map(e => e.getBoundingClientRect().width)"
    )
    changes = sorted((abs(change) for _, change, _ in image["removed"]), reverse=True)
    assert [w / max(wide) for w in wide] == pytest.approx([c / max(changes) for c in changes], abs=0.03)
    assert "truth:" in page.locator(".title").inner_text()
    # a mark is the first prediction's alone, and the truth is named wherever it is
    truth, first = (data(disk, "pictures")[key] for key in ("truth", "first"))
    wrong = next(
        r for r in range(64) if truth[r] in [c for c, _ in data(disk, "images/0")["images"][r]["predicted"][1:]]
    )
    right = next(r for r in range(64) if truth[r] == first[r])
    for row, mark in ((wrong, "✗"), (right, "✓")):
        page.evaluate("at => { location.hash = at; }", f"#/picture/{row}")
        until(page, f"document.querySelector('.crumb')?.textContent.endsWith('/ {row}')")
        said = page.locator(".predictions li").all_inner_texts()
        assert [mark in text for text in said] == [True] + [False] * (len(said) - 1)
        assert not any({"✗": "✓", "✓": "✗"}[mark] in text for text in said)
        assert sum("truth" in text for text in said) == 1

    phone = opened(root(disk), "#/picture/5", has_touch=True, is_mobile=True, viewport={"width": 390, "height": 844})
    phone.locator(".patches button").nth(20).tap()
    assert listed(phone) == stored(21)


def test_two_autoencoders_side_by_side(disk, opened):
    other = data(disk, "compare")
    peak = data(disk, "overview")["peak"]
    page = opened(root(disk), "#/compare")
    for name in ("cosine", "moved"):
        page.get_by_role("columnheader", name=name, exact=False).first.get_by_role("button").click()
        if page.locator("[aria-sort=ascending]").count():
            page.get_by_role("columnheader", name=name, exact=False).first.get_by_role("button").click()
        best = max((i for i, p in enumerate(peak) if p > 0), key=lambda i: (other[name][i], -i))
        assert shown(page)[0] == best
    # a bar begins at 0: in the middle where there is a sign
    here = data(disk, "overview")["density"]
    change = {i: other["density"][i] - here[i] for i, p in enumerate(peak) if p > 0}
    bars = page.evaluate(
        """[...document.querySelectorAll('.rows .row')].map(row => ['moved', 'change'].map(key => {
          const meter = row.querySelector(`.col-${key} .meter`), bar = meter.firstChild.getBoundingClientRect();
          const {left, width} = meter.getBoundingClientRect();
          return [(bar.left - left) / width, (bar.right - left) / width];
        }).concat(+row.querySelector('.index').textContent))"""
    )
    most = max(map(abs, change.values()))
    for moved, changed, i in bars:
        assert moved == pytest.approx([0, other["moved"][i]], abs=0.02)
        ends = sorted((0.5, 0.5 + change[i] / most / 2))
        assert changed == pytest.approx(ends, abs=0.02)
    assert "over 4 pictures" in page.get_by_role("columnheader", name="Δ steerability").get_attribute("title")
    page.evaluate("location.hash = '#/compare/12'")
    page.wait_for_selector(".here")
    assert "There: feature 24" in page.locator(".there").inner_text()
    assert page.locator(".there figure").count() == 6
    assert page.locator(".here figure").count() == 9


def test_the_back_button_leads_back_to_where_one_was(disk, opened):
    page = opened(root(disk), "#/?sort=index&up=&show=all")
    page.locator(".scroller").evaluate("node => { node.scrollTop = 1200; }")
    until(page, "document.querySelector('.rows a[data-position=\"22\"]')")
    scroller = page.locator(".scroller").element_handle()
    was = page.locator(".rows a[data-position='22']").evaluate(
        "node => { node.click(); return node.closest('.scroller').scrollTop; }"
    )
    page.wait_for_selector("main[data-page=feature]")
    scroller.evaluate("node => node.dispatchEvent(new Event('scroll'))")  # a busy browser tells of scrolling late
    assert page.evaluate("document.activeElement.id") == "main"
    page.keyboard.press("Tab")
    page.get_by_role("link", name="Next active feature").click()
    page.wait_for_url(re.compile("#/feature/2[3-9]"))
    page.go_back()
    page.wait_for_url(re.compile("#/feature/22"))
    page.go_back()
    page.wait_for_selector("main[data-page=overview]")
    until(page, f"document.querySelector('.scroller').scrollTop === {was}")
    assert was > 0
    assert 22 in shown(page)


NOWHERE = ["#/feature/99999", "#/feature/-1", "#/nothing", "#/picture/<img src=x onerror=alert(1)>", "#/own"]


def test_an_address_that_leads_nowhere_says_so(disk, opened):
    page = opened(root(disk))
    for at in NOWHERE:
        page.evaluate("at => { location.hash = at; }", at)
        page.get_by_role("alert").wait_for()
        page.get_by_role("link", name="All features").click()
        page.wait_for_selector(".rows a")


def test_a_folder_that_is_not_whole_says_so(disk, opened, tmp_path):
    shutil.copytree(disk, tmp_path / "part", ignore=shutil.ignore_patterns("overview.js", "thumbs"))
    page = opened(root(tmp_path / "part"), expected=("ERR_FILE_NOT_FOUND",))
    assert "data/overview.js" in page.get_by_role("alert").inner_text()


def test_names_are_text_whatever_they_hold(disk, opened):
    page = opened(root(disk), "#/?q=onerror")
    assert HOSTILE in page.locator(".rows").inner_text()
    assert page.title() != "1"
    page.evaluate("location.hash = '#/picture/3'")
    page.wait_for_selector(".patches")
    assert "<b>blob 3.png" in page.locator(".title").inner_text()
    assert page.locator("main img[src=x], main b b").count() == 0
    page.watch.expected = ("Content Security Policy",)
    run = page.evaluate(
        """async () => {
          const inline = document.createElement('script');
          inline.textContent = 'window.reached = true';
          document.head.append(inline);
          const far = await fetch('https://example.org/').then(() => true, () => false);
          return [window.reached === true, far];
        }"""
    )
    assert run == [False, False]


PLACES = ["#/", "#/feature/12", "#/picture/5", "#/pictures", "#/compare", "#/compare/12", "#/nothing"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(disk, opened, axe, scheme):
    page = opened(root(disk), color_scheme=scheme)
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", ground)[:3])) < 200) == (scheme == "dark")
    page.evaluate(axe)
    for place in PLACES:
        visit(page, place)
        # the same elements in other colours: nothing but contrast can differ
        only = "" if scheme == "light" else ", runOnly: ['color-contrast']"
        found = page.evaluate(f"axe.run(document, {{preload: false, resultTypes: ['violations']{only}}})")
        bad = [
            (violation["id"], [node["html"][:120] for node in violation["nodes"][:3]])
            for violation in found["violations"]
            if violation["impact"] in ("serious", "critical")
        ]
        assert bad == [], place
    page.get_by_role("button", name="Dark colours" if scheme == "light" else "Light colours").click()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != ground


def test_a_phone_shows_all_of_it(disk, opened):
    page = opened(
        root(disk), is_mobile=True, has_touch=True, viewport={"width": 360, "height": 740}, reduced_motion="reduce"
    )
    for place in PLACES:
        visit(page, place)
        assert page.evaluate("document.documentElement.scrollWidth") <= 360, place
    page.evaluate("location.hash = '#/feature/12'")
    page.wait_for_selector(".pair")
    assert page.evaluate("getComputedStyle(document.querySelector('.two span')).transitionDuration") == "0s"
    smallest = page.evaluate(
        "Math.min(...[...document.querySelectorAll('svg text')].map(t => t.getBoundingClientRect().height))"
    )
    assert smallest >= 10
