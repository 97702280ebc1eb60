// All features: search, sort, filters, the scatter and the table.
"use strict";

const MEASURES = [
  { key: "density", label: "Density", log: true, format: percent, what: "share of tokens on which it is active" },
  { key: "images", label: "Pictures", log: true, format: percent, what: "share of pictures on which it is active" },
  { key: "peak", label: "Peak", log: true, format: number, what: "largest activation" },
  { key: "mean", label: "Mean", log: true, format: number, what: "mean activation" },
  {
    key: "steerability",
    label: "Steerability",
    log: true,
    format: number,
    get what() {
      const on = Site.about.steer_images ? plural(Site.about.steer_images, "picture") : "a few pictures";
      return `Σ Δp² over classes, Δp the mean over ${on}, set to its peak: a ranking, not a measurement`;
    },
  },
  {
    key: "selectivity",
    label: "Selectivity",
    log: false,
    most: 1,
    format: number,
    what: "how far it keeps to one class",
  },
];

// where steerability is shown, what it is
const steerabilityNote = () =>
  Site.features.steerability?.some(Number.isFinite)
    ? note("Steerability: ", MEASURES.find(({ key }) => key === "steerability").what, ".")
    : null;

// those that the site has, with at least one number
function measures() {
  return MEASURES.filter(({ key }) => Site.features[key]?.some(Number.isFinite)).map((measure) => ({
    ...measure,
    values: Site.features[measure.key],
  }));
}

const texts = { made: null };
function haystack() {
  texts.made ||= Array.from({ length: Site.size }, (_, i) => Site.names(i).join("\n").toLowerCase());
  return texts.made;
}

// What the address says of the overview.
function viewOf(params, known) {
  const ranges = {};
  for (const { key } of known) {
    const [low, high] = (params.get(key) || "").split("~");
    const range = [low, high].map((text) => (text && Number.isFinite(+text) ? +text : null));
    if (range.some((end) => end !== null)) ranges[key] = range;
  }
  const wanted = (name, other) => (known.some(({ key }) => key === params.get(name)) ? params.get(name) : other);
  const has = (key) => known.some((measure) => measure.key === key);
  return {
    q: params.get("q") || "",
    show: params.get("show") || "alive",
    of: params.get("class") || "",
    sort: params.get("sort") === "index" ? "index" : wanted("sort", has("steerability") ? "steerability" : "peak"),
    down: params.get("up") === null,
    ranges,
    x: wanted("x", "density"),
    y: wanted("y", has("steerability") ? "steerability" : "peak"),
  };
}

function addressOf(view) {
  const params = new URLSearchParams();
  if (view.q) params.set("q", view.q);
  if (view.show !== "alive") params.set("show", view.show);
  if (view.of) params.set("class", view.of);
  params.set("sort", view.sort);
  if (!view.down) params.set("up", "");
  for (const [key, [low, high]] of Object.entries(view.ranges)) params.set(key, `${low ?? ""}~${high ?? ""}`);
  params.set("x", view.x);
  params.set("y", view.y);
  return `#/?${params}`;
}

function selected(view, known) {
  const { peak, top_class } = Site.features;
  const terms = view.q.toLowerCase().split(/\s+/).filter(Boolean);
  const exact = /^\d+$/.test(view.q.trim()) ? +view.q.trim() : -1;
  const ranges = Object.entries(view.ranges).map(([key, range]) => [known.find((m) => m.key === key).values, ...range]);
  const of = view.of === "" ? -1 : +view.of;
  const found = [];
  const hay = terms.length ? haystack() : null;
  for (let i = 0; i < Site.size; i++) {
    if (i !== exact) {
      if (view.show === "alive" && !(peak[i] > 0)) continue;
      if (view.show === "dead" && peak[i] > 0) continue;
      if (of >= 0 && top_class[i] !== of) continue;
      if (ranges.some(([values, low, high]) => !(values[i] >= (low ?? -Infinity) && values[i] <= (high ?? Infinity))))
        continue;
      if (hay && !terms.every((term) => hay[i].includes(term))) continue;
    }
    found.push(i);
  }
  const values = view.sort === "index" ? null : known.find((m) => m.key === view.sort).values;
  const sign = view.down ? -1 : 1;
  found.sort((a, b) => {
    if (a === exact || b === exact) return a === exact ? -1 : 1;
    if (!values) return sign * (a - b);
    const [u, v] = [values[a], values[b]];
    if (Number.isFinite(u) && Number.isFinite(v)) return sign * (u - v) || a - b;
    return Number.isFinite(v) - Number.isFinite(u) || a - b; // what was not measured comes last
  });
  return found;
}

const remembered = {}; // where the table stood, by address

function thumbOf(index) {
  const row = Site.features.picture ? Site.features.picture[index] : -1;
  if (row < 0 || !Site.pictures) return el("span", { class: "thumb none", "aria-hidden": "true" });
  return el("img", { class: "thumb", src: Site.picture(row).thumb, alt: "", width: 48, height: 48, decoding: "async" });
}

function nameCell(index, ...extra) {
  const more = [...Site.names(index).slice(1), ...extra].join(" · ");
  return [
    thumbOf(index),
    el(
      "span",
      { class: "names" },
      el("span", {}, el("span", { class: "index" }, index), " ", el("strong", {}, Site.featureName(index))),
      more ? el("small", {}, more) : null,
    ),
  ];
}

// How long the bar of a value is, of 1: from 0, or in powers of ten from the one below all values. `most` is what a
// full bar stands for where that is known; a column with a sign has its 0 in the middle.
function lengths({ values, log, most = 0, signs = false }) {
  let low = Infinity;
  let high = most;
  let minus = signs;
  for (const value of values) {
    if (!Number.isFinite(value)) continue;
    if (value > 0) low = Math.min(low, value);
    if (value < 0) minus = true;
    high = Math.max(high, Math.abs(value));
  }
  // a little off, that a rounded 0.001 is as 0.001
  const [a, b] = [Math.floor(Math.log10(low) - 1e-3), Math.ceil(Math.log10(high) - 1e-3)];
  const of = log
    ? (value) => (value > 0 ? (Math.log10(value) - a) / Math.max(b - a, 1) : 0)
    : (value) => Math.abs(value) / (high || 1);
  return { minus, of: (value) => (Number.isFinite(value) ? Math.max(0, Math.min(1, of(value))) : 0) };
}

function measureCell(measure) {
  const { minus, of } = lengths(measure);
  return (index) => {
    const value = measure.values[index];
    return [
      el("span", { class: "value" }, measure.format(value)),
      el(
        "span",
        { class: `meter${minus ? " signed" : ""}${value < 0 ? " minus" : ""}`, "aria-hidden": "true" },
        el("span", { style: { width: `${100 * of(value)}%` } }),
      ),
    ];
  };
}

// a column of a table: what it holds, and how its bars are to be read
function measureColumn(measure) {
  const { key, label, what, log } = measure;
  const read = log ? "bars in powers of ten" : lengths(measure).minus ? "bars from 0 in the middle" : "bars from 0";
  return { key, label, what: [what, read].filter(Boolean).join("; "), sort: true, cell: measureCell(measure) };
}

function overviewPage(params) {
  const known = measures();
  const view = viewOf(params, known);
  const state = (remembered[addressOf(view)] ||= {});
  const count = el("p", { class: "count", "aria-live": "polite" });
  const chips = el("div", { class: "chips" });
  let found = [];

  const table = longTable({
    label: "Features",
    state,
    href: (index) => `#/feature/${index}`,
    columns: [
      { key: "name", label: "Feature", sort: false, cell: nameCell },
      ...known.filter(({ key }) => key !== "mean").map(measureColumn),
    ],
    sorted: (key) => {
      view.down = view.sort === key ? !view.down : true;
      view.sort = key;
      refresh();
    },
  });
  const plot = scatter({
    columns: known,
    x: view.x,
    y: view.y,
    label: "Every feature as a point; arrow keys walk from point to point, Enter opens one",
    open: (index) => {
      location.hash = `#/feature/${index}`;
    },
    describe: (index) => el("span", { class: "described" }, nameCell(index)),
    changed: (chosen) => {
      Object.assign(view, chosen);
      keep();
    },
    picked: ({ x, y }) => {
      view.ranges[x.key] = x.range.map(rounded);
      view.ranges[y.key] = y.range.map(rounded);
      refresh();
    },
  });

  const rounded = (value) => Number(value.toPrecision(3));
  const inputs = {};
  const range = ({ key, label, what }, end) =>
    (inputs[`${key}${end}`] = el("input", {
      type: "number",
      step: "any",
      inputmode: "decimal",
      placeholder: end ? "most" : "least",
      "aria-label": `${label}, ${end ? "at most" : "at least"} (${what})`,
      oninput: (event) => {
        const ends = view.ranges[key] || [null, null];
        ends[end] = event.target.value === "" ? null : +event.target.value;
        if (ends.every((limit) => limit === null)) delete view.ranges[key];
        else view.ranges[key] = ends;
        refresh(event.target);
      },
    }));
  const search = el("input", {
    type: "search",
    id: "search",
    value: view.q,
    placeholder: "name, word, class or number",
    "aria-label": "Search features by name, word, class or index",
    autocomplete: "off",
    spellcheck: "false",
    oninput: () => {
      view.q = search.value;
      refresh();
    },
    onkeydown: (event) => {
      if (event.key === "ArrowDown") {
        event.preventDefault();
        table.focus(0);
      }
      if (event.key === "Enter" && found.length) location.hash = `#/feature/${found[0]}`;
    },
  });
  const sort = choice(
    { id: "sort", "aria-label": "Sort by" },
    [...known.map(({ key, label }) => [key, label]), ["index", "Number"]],
    (key) => {
      view.sort = key;
      view.down = key !== "index";
      refresh();
    },
  );
  const turn = el("button", {
    type: "button",
    class: "turn",
    onclick: () => {
      view.down = !view.down;
      refresh();
    },
  });
  const show = choice(
    { id: "show", "aria-label": "Which features" },
    [
      ["alive", "active ones"],
      ["all", "all"],
      ["dead", "dead ones"],
    ],
    (which) => {
      view.show = which;
      refresh();
    },
  );
  const classes =
    Site.classes.length && Site.features.top_class
      ? choice(
          { id: "class", "aria-label": "Class of its pictures" },
          [
            ["", "any class"],
            ...[...new Set(Site.features.top_class)]
              .filter((c) => c >= 0)
              .map((c) => [c, Site.className(c)])
              .sort(([, a], [, b]) => a.localeCompare(b)),
          ],
          (c) => {
            view.of = c;
            refresh();
          },
        )
      : null;

  function keep() {
    const address = addressOf(view);
    remembered[address] = state;
    if (location.hash !== address) history.replaceState(null, "", address);
  }

  function refresh(typed = null, first = false) {
    found = selected(view, known);
    const mask = new Uint8Array(Site.size);
    for (const i of found) mask[i] = 1;
    table.mark(view.sort, view.down);
    table.fill(found, first);
    plot.show(mask);
    const dead = Site.size - Site.features.peak.reduce((sum, value) => sum + (value > 0), 0);
    const all = plural(Site.size, "feature");
    count.textContent = `${found.length.toLocaleString("en")} of ${all}, ${dead.toLocaleString("en")} never active`;
    sort.value = view.sort;
    show.value = view.show;
    if (classes) classes.value = view.of;
    turn.textContent = view.down ? "↓ largest first" : "↑ smallest first";
    for (const { key } of known)
      for (const end of [0, 1])
        if (inputs[key + end] !== typed) inputs[key + end].value = view.ranges[key]?.[end] ?? "";
    chips.replaceChildren(
      ...Object.entries(view.ranges).map(([key, [low, high]]) => {
        const { label, format } = known.find((m) => m.key === key);
        const from = low === null ? "" : `from ${format(low)} `;
        const text = `${label} ${from}${high === null ? "" : `to ${format(high)}`}`;
        return el(
          "button",
          {
            type: "button",
            class: "chip",
            "aria-label": `No longer: ${text}`,
            onclick: () => {
              delete view.ranges[key];
              refresh();
              search.focus();
            },
          },
          text,
          el("span", { "aria-hidden": "true" }, " ✕"),
        );
      }),
    );
    if (!first) keep();
  }

  const rows = () =>
    found.map((i) => ({
      feature: i,
      concept: Site.features.concept?.[i] || "",
      word: Site.features.word?.[i] || "",
      class: Site.features.top_class ? Site.className(Site.features.top_class[i]) : "",
      ...Object.fromEntries(known.map(({ key, values }) => [key, values[i]])),
    }));
  const node = el(
    "div",
    { class: "overview" },
    el(
      "div",
      { class: "controls" },
      el("h1", {}, "Features"),
      search,
      el(
        "div",
        { class: "row-of" },
        el("label", {}, "show ", show),
        classes ? el("label", {}, "class ", classes) : null,
      ),
      el("div", { class: "row-of" }, el("label", {}, "sort by ", sort), turn),
      el(
        "details",
        { class: "ranges", open: Object.keys(view.ranges).length > 0 },
        el("summary", {}, "Limits"),
        el(
          "div",
          { class: "limits" },
          known.map((m) => el("div", {}, el("span", { title: m.what }, m.label), range(m, 0), range(m, 1))),
        ),
      ),
      chips,
      plot.figure,
      steerabilityNote(),
      note(
        "Bars in the table: ",
        ((logs) => (logs.length ? `of ${logs.join(", ")} in powers of ten; others from 0.` : "from 0."))(
          known.filter(({ key, log }) => log && key !== "mean").map(({ label }) => label),
        ),
      ),
    ),
    el("div", { class: "listing" }, el("div", { class: "heading" }, count, downloads("features", rows)), table.node),
  );
  refresh(null, true);
  return { title: "Features", node };
}
