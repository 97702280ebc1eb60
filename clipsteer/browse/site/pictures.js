// Pictures: all of them in pages, one by one, and one of one's own.
"use strict";

const PAGE = 60;

function picturesPage(params) {
  const { name, file, truth, first } = Site.pictures;
  const count = Site.about.data.images;
  const view = {
    q: params.get("q") || "",
    of: params.get("class") || "",
    show: params.get("show") || "all",
    page: Math.max(1, Math.floor(+params.get("page")) || 1),
  };
  const grid = el("div", { class: "grid" });
  const pager = el("nav", { class: "pager", "aria-label": "Pages of pictures" });
  const counted = el("p", { class: "count", "aria-live": "polite" });
  const search = el("input", {
    type: "search",
    value: view.q,
    placeholder: "file or class",
    "aria-label": "Search pictures by file or class",
    oninput: () => {
      view.q = search.value;
      view.page = 1;
      refresh();
    },
  });
  const show = choice(
    { "aria-label": "Which pictures" },
    [
      ["all", "all"],
      ["right", "predicted right"],
      ["wrong", "predicted wrong"],
    ],
    (which) => {
      view.show = which;
      view.page = 1;
      refresh();
    },
    view.show,
  );
  const known = truth?.some((c) => c >= 0);

  function refresh(first_time = false) {
    const q = view.q.toLowerCase();
    const found = [];
    for (let row = 0; row < count; row++) {
      if (known && view.show === "right" && truth[row] !== first[row]) continue;
      if (known && view.show === "wrong" && truth[row] === first[row]) continue;
      if (
        q &&
        !`${name[row]}\n${file?.[row] || ""}\n${truth ? Site.className(truth[row]) : ""}`.toLowerCase().includes(q)
      )
        continue;
      found.push(row);
    }
    const pages = Math.max(1, Math.ceil(found.length / PAGE));
    view.page = Math.min(view.page, pages);
    counted.textContent = `${found.length.toLocaleString("en")} of ${plural(count, "picture")}`;
    grid.replaceChildren(...found.slice((view.page - 1) * PAGE, view.page * PAGE).map((row) => figure(row)));
    const address = (page) => {
      const query = new URLSearchParams({ q: view.q, show: view.show, page });
      return `#/pictures?${query}`;
    };
    pager.replaceChildren(
      ...(pages < 2
        ? []
        : [
            view.page > 1 ? link(address(view.page - 1), "← before") : el("span", {}),
            el("span", {}, `page ${view.page} of ${pages}`),
            view.page < pages ? link(address(view.page + 1), "after →") : el("span", {}),
          ]),
    );
    if (!first_time) history.replaceState(null, "", address(view.page));
  }
  refresh(true);
  return {
    title: "Pictures",
    node: el(
      "div",
      { class: "pictures" },
      el("h1", {}, "Pictures"),
      el("div", { class: "row-of" }, search, known ? el("label", {}, "show ", show) : null),
      counted,
      grid,
      pager,
    ),
  };
}

function predictedCard(entry, picture) {
  if (!entry.predicted.length) return null;
  const rows = () =>
    entry.predicted.map(([c, p]) => ({ class: Site.answer(c), probability: p, truth: c === picture.truth }));
  return card(
    "Predictions",
    "predictions",
    rows,
    bars(
      entry.predicted.map(([c, value], i) => ({
        label: [i === 0 ? verdict(picture.truth, c) : null, ` ${Site.answer(c)}`],
        value,
        extra: c === picture.truth ? "truth" : "",
      })),
      { format: percent, scale: 1 },
    ),
    picture.truth >= 0 && !entry.predicted.some(([c]) => c === picture.truth)
      ? note(`The truth, ${Site.className(picture.truth)}, is not among these.`)
      : null,
  );
}

function removedCard(entry) {
  if (!entry.removed?.length || !entry.predicted.length) return null;
  const [was] = entry.predicted[0];
  const removed = [...entry.removed].sort((a, b) => Math.abs(b[1]) - Math.abs(a[1]));
  const rows = () =>
    removed.map(([feature, change, now]) => ({
      feature,
      name: Site.featureName(feature),
      change,
      first_prediction: Site.answer(now),
    }));
  return card(
    "What removing each does",
    "removed",
    rows,
    bars(
      removed.map(([feature, value, now]) => ({
        label: featureLink(feature),
        value,
        extra: now === was ? "" : `then ${Site.answer(now)}`,
      })),
      { format: points },
    ),
    note(
      `Change of the probability of ${Site.answer(was)}, the first prediction, `,
      "when one feature is set to 0 on every token.",
    ),
  );
}

async function picturePage(row, params) {
  const entry = await Site.image(row);
  if (!entry)
    throw new Error(`data/images/${Math.floor(row / Site.about.image_shard)}.js does not hold picture ${row}.`);
  const picture = Site.picture(row);
  const truth = Site.className(picture.truth);
  const beside = el(
    "nav",
    { class: "between", "aria-label": "Pictures beside this one" },
    row > 0 ? el("a", { href: `#/picture/${row - 1}`, "aria-label": "Previous picture" }, "← before") : null,
    row + 1 < Site.about.data.images
      ? el("a", { href: `#/picture/${row + 1}`, "aria-label": "Next picture" }, "after →")
      : null,
  );
  return {
    title: picture.name,
    node: el(
      "article",
      { class: "picture" },
      el(
        "header",
        { class: "title" },
        el(
          "div",
          {},
          el("p", { class: "crumb" }, link("#/pictures", "Pictures"), ` / ${row}`),
          el("h1", {}, picture.name),
          el(
            "p",
            { class: "soft" },
            picture.file && picture.file !== picture.name ? `${picture.file} · ` : "",
            truth ? `truth: ${truth}` : "no truth known",
          ),
        ),
        el("div", { class: "tools" }, beside),
      ),
      el(
        "div",
        { class: "cards" },
        stage(entry, picture, params, `#/picture/${row}`),
        el("div", {}, predictedCard(entry, picture), removedCard(entry)),
      ),
    ),
  };
}

function ownPage() {
  if (!Site.about.live)
    throw new Error("One's own picture needs the model: open the site with clipsteer sae browse … --serve.");
  const place = el("div", {});
  function lay() {
    place.replaceChildren(
      Own.id
        ? el(
            "div",
            { class: "cards" },
            stage(Own.entry, { row: -1, thumb: Own.entry.thumb, name: Own.name, truth: -1 }, new URLSearchParams(), ""),
            el("div", {}, predictedCard(Own.entry, { truth: -1 }), removedCard(Own.entry)),
          )
        : note(
            "Choose a picture: it is read by the server on this machine and goes nowhere else. ",
            "It is forgotten when the server ends.",
          ),
    );
  }
  lay();
  return {
    title: "Your picture",
    node: el("article", { class: "picture" }, el("h1", {}, "Your picture"), uploadButton(lay), place),
  };
}
