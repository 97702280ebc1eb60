// Two autoencoders, or one on two models: which features match, and what moved.
"use strict";

function compareMeasures() {
  const { features } = Site;
  const other = clipsteer.get("compare");
  const numbers = (column) => Float32Array.from(column || [], (value) => value ?? NaN);
  const there = { density: numbers(other.density), steerability: numbers(other.steerability) };
  const change = (key) => there[key].map((value, i) => value - (features[key]?.[i] ?? NaN));
  const { what } = MEASURES.find(({ key }) => key === "steerability");
  return [
    { key: "cosine", label: "Cosine", values: numbers(other.cosine), log: false, most: 1, format: number },
    {
      key: "correlation",
      label: "Correlation",
      values: numbers(other.correlation),
      log: false,
      most: 1,
      signs: true,
      format: number,
    },
    { key: "density", label: "Density here", values: features.density, log: true, format: percent },
    { key: "density2", label: "Density there", values: there.density, log: true, format: percent },
    { key: "steerability", label: "Steerability here", values: features.steerability, log: true, format: number, what },
    {
      key: "steerability2",
      label: "Steerability there",
      values: there.steerability,
      log: true,
      format: number,
      what,
    },
    { key: "moved", label: "Moved", values: numbers(other.moved), log: false, most: 1, format: percent },
    {
      key: "change",
      label: "Δ density",
      values: change("density"),
      log: false,
      signs: true,
      what: "density there less density here",
      format: (v) => (Number.isFinite(v) ? points(v) : "–"),
    },
    {
      key: "change2",
      label: "Δ steerability",
      values: change("steerability"),
      log: false,
      signs: true,
      format: signed,
      what: `steerability there less steerability here (${what})`,
    },
  ].filter(({ values }) => values?.some(Number.isFinite));
}

const otherName = () => [Site.about.compare.name, Site.about.compare.model].filter(Boolean).join(" on ") || "the other";

async function comparePage(params) {
  if (!Site.about.compare) throw new Error("This site holds one autoencoder; build it with --compare for two.");
  const other = await clipsteer.load("compare");
  const known = compareMeasures();
  const has = (key) => known.some((m) => m.key === key);
  const view = {
    sort: has(params.get("sort")) ? params.get("sort") : has("moved") ? "moved" : known[0].key,
    down: params.get("up") === null,
  };
  const state = (remembered[`compare ${view.sort} ${view.down}`] ||= {});
  const rows = Array.from({ length: Site.size }, (_, i) => i).filter(
    (i) => Site.features.peak[i] > 0 && other.match[i] >= 0,
  );
  const table = longTable({
    label: "Matched features",
    state,
    href: (index) => `#/compare/${index}`,
    columns: [
      { key: "name", label: "Feature", sort: false, cell: (i) => nameCell(i, `there ${other.match[i]}`) },
      ...known
        .filter(({ key }) => ["cosine", "correlation", "moved", "change", "change2"].includes(key))
        .map(measureColumn),
    ],
    sorted: (key) => {
      view.down = view.sort === key ? !view.down : true;
      view.sort = key;
      refresh();
    },
  });
  const both = has("steerability") && has("steerability2");
  const plot = scatter({
    columns: known,
    x: both ? "steerability" : "density",
    y: both ? "steerability2" : "density2",
    label: "Matched features; arrow keys walk from point to point, Enter opens one",
    open: (index) => {
      location.hash = `#/compare/${index}`;
    },
    describe: (index) => el("span", { class: "described" }, nameCell(index)),
  });
  function refresh(first = false) {
    const { values } = known.find((m) => m.key === view.sort);
    const sign = view.down ? -1 : 1;
    const order = [...rows].sort(
      (a, b) => Number.isFinite(values[b]) - Number.isFinite(values[a]) || sign * (values[a] - values[b]) || a - b,
    );
    table.mark(view.sort, view.down);
    table.fill(order, first);
    const query = new URLSearchParams({ sort: view.sort, ...(view.down ? {} : { up: "" }) });
    if (!first) history.replaceState(null, "", `#/compare?${query}`);
  }
  const mask = new Uint8Array(Site.size);
  for (const i of rows) mask[i] = 1;
  plot.show(mask);
  refresh(true);
  const saved = () =>
    rows.map((i) => ({
      feature: i,
      name: Site.featureName(i),
      match: other.match[i],
      ...Object.fromEntries(known.map(({ key, values }) => [key, values[i]])),
    }));
  const same = rows.filter((i) => other.correlation[i] > 0.9).length;
  return {
    title: "Compare",
    node: el(
      "div",
      { class: "overview" },
      el(
        "div",
        { class: "controls" },
        el("h1", {}, "Compare"),
        el("p", {}, `${Site.about.sae.name || "This one"} beside ${otherName()}. Matched: ${Site.about.compare.how}.`),
        note(
          "Moved: the share of change between the pictures they fire on, 0 the same, 100 % nothing in common. ",
          `${same.toLocaleString("en")} of ${rows.length.toLocaleString("en")} have activations that correlate `,
          "above 0.9 over the pictures.",
        ),
        plot.figure,
        steerabilityNote(),
        note("Δ: there less here. Bars from 0, which is in the middle where there are values below it."),
      ),
      el(
        "div",
        { class: "listing" },
        el(
          "div",
          { class: "heading" },
          el("p", { class: "count" }, plural(rows.length, "matched feature")),
          downloads("compare", saved),
        ),
        table.node,
      ),
    ),
  };
}

async function comparedPage(index) {
  if (!Site.about.compare) throw new Error("This site holds one autoencoder; build it with --compare for two.");
  const [here, there, other] = await Promise.all([
    Site.feature(index),
    Site.compared(index),
    clipsteer.load("compare"),
  ]);
  const pictures = (top) =>
    top?.length
      ? el(
          "div",
          { class: "grid" },
          top.map(([image, act, map]) => figure(image, { act, map })),
        )
      : note("Active on no picture.");
  const figures = compareMeasures();
  const common = here.top.filter(([image]) => there?.top?.some(([one]) => one === image)).length;
  return {
    title: `Compare ${index}`,
    node: el(
      "article",
      { class: "feature" },
      el(
        "header",
        { class: "title" },
        el(
          "div",
          {},
          el("p", { class: "crumb" }, link("#/compare", "Compare"), ` / ${index}`),
          el("h1", {}, el("span", { class: "index" }, index), " ", Site.featureName(index)),
          el("p", { class: "soft" }, `matches ${other.match[index]} of ${otherName()}`),
        ),
        el("div", { class: "tools" }, link(`#/feature/${index}`, "its page")),
      ),
      el(
        "dl",
        { class: "stats" },
        figures.map(({ label, values, format, what }) => stat(label, format(values[index]), what)),
      ),
      steerabilityNote(),
      el(
        "div",
        { class: "cards even" },
        card(
          `Here: feature ${index}`,
          `here-${index}`,
          () => here.top.map(pictureRow),
          heatSwitch(),
          pictures(here.top),
        ),
        card(
          `There: feature ${other.match[index]}`,
          `there-${index}`,
          () => (there?.top || []).map(pictureRow),
          pictures(there?.top),
        ),
      ),
      note(`${common} of the ${here.top.length} strongest pictures are the same.`),
    ),
  };
}
