// One feature: when it fires, on what, what it is called, what it does, and which others are like it.
"use strict";

const stat = (label, value, what) => el("div", { title: what || null }, el("dt", {}, label), el("dd", {}, value));

// A switch for all heat on a page; it is remembered while the pages are open.
const Heat = { on: true };
function heatSwitch() {
  const box = el("input", {
    type: "checkbox",
    onchange: () => {
      Heat.on = box.checked;
      main.classList.toggle("cold", !Heat.on);
    },
  });
  box.checked = Heat.on;
  main.classList.toggle("cold", !Heat.on);
  return Site.about.grid ? el("label", { class: "switch" }, box, " show where it fires") : null;
}

function neighbours(title, name, pairs, what, format) {
  const rows = () => pairs.map(([feature, value]) => ({ feature, name: Site.featureName(feature), [what]: value }));
  if (!pairs.length) return card(title, name, null, note("None."));
  return card(
    title,
    name,
    rows,
    el(
      "ul",
      { class: "neighbours" },
      pairs.map(([feature, value]) =>
        el("li", {}, link(`#/feature/${feature}`, nameCell(feature)), el("span", { class: "value" }, format(value))),
      ),
    ),
  );
}

function pictureRow([image, activation]) {
  const { file, name, truth, first, p } = Site.picture(image);
  return {
    picture: image,
    file: file || name,
    activation,
    truth: Site.className(truth),
    predicted: Site.answer(first),
    probability: p,
  };
}

function topPictures(index, data) {
  const rows = () => data.top.map(pictureRow);
  return card(
    "Strongest pictures",
    `top-pictures-${index}`,
    rows,
    heatSwitch(),
    el(
      "div",
      { class: "grid" },
      data.top.map(([image, act, map], i) =>
        figure(image, { act, map, before: data.prefix_acts?.[i]?.[0], to: `#/picture/${image}?feature=${index}` }),
      ),
    ),
  );
}

function intervals(index, data) {
  const listed = data.intervals.filter(({ pictures }) => pictures.length);
  if (!listed.length) return null;
  const rows = () =>
    listed.flatMap(({ low, high, pictures }) => pictures.map((one) => ({ low, high, ...pictureRow(one) })));
  return card(
    "From weak to strong",
    `intervals-${index}`,
    rows,
    note(
      "Pictures drawn from each interval of the activation, not the strongest alone: is it one thing all the way down?",
    ),
    el(
      "div",
      { class: "intervals-of" },
      listed.map(({ low, high, count, pictures }) =>
        el(
          "section",
          { class: "interval" },
          el("h3", {}, `${number(low)} to ${number(high)}`, el("small", {}, plural(count, "picture"))),
          el(
            "div",
            { class: "grid small" },
            pictures.map(([image, act, map]) => figure(image, { act, map, to: `#/picture/${image}?feature=${index}` })),
          ),
        ),
      ),
    ),
  );
}

function namesCard(index, data) {
  // of a short list no word is both among the nearest and among the most opposite
  const half = Math.floor((Site.about.words?.count ?? Infinity) / 2);
  const near = (data.words || []).slice(0, Math.max(half, 1));
  const far = (data.opposite || []).slice(0, half);
  const kinds = { word: near, opposite: far, concept: data.concepts };
  const rows = () =>
    Object.entries(kinds).flatMap(([kind, pairs]) => (pairs || []).map(([name, value]) => ({ kind, name, value })));
  const parts = [];
  if (data.concepts?.length) {
    parts.push(
      el("h3", {}, "What its pictures are made of"),
      bars(data.concepts.map(([label, value]) => ({ label, value }))),
      note("SpLiCE: concepts whose sum gives the embeddings of its strongest pictures, with their weights."),
    );
  }
  if (near.length) {
    const all = [...near, ...far];
    parts.push(
      el("h3", {}, "Words along its direction"),
      bars(all.map(([label, value]) => ({ label, value }))),
      note(
        "Cosines: the nearest words",
        far.length ? " and the most opposite ones" : "",
        `. ${Site.about.words?.how || ""}`,
      ),
    );
  }
  return parts.length ? card("In words", `in-words-${index}`, rows, parts) : null;
}

function classesCard(index, data) {
  if (!data.classes?.length) return null;
  const rows = () =>
    data.classes.map(([c, share, peak]) => ({
      class: Site.className(c),
      share_of_its_pictures: share,
      mean_peak: peak,
    }));
  return card(
    "Classes it fires on",
    `classes-${index}`,
    rows,
    bars(
      data.classes.map(([c, share, peak]) => ({
        label: Site.className(c),
        value: share,
        extra: peak === null || peak === undefined ? "" : `mean of its pictures' peaks ${number(peak)}`,
      })),
      { format: percent, scale: 1 },
    ),
    note(
      "Share of the class's pictures on which it fires (bars to 100 %), and the mean of its pictures' peaks: of the ",
      "largest activation on each of the class's pictures, 0 where it does not fire.",
    ),
  );
}

function effectCard(index, data) {
  const effect = data.steering?.effect;
  if (!effect?.length) return null;
  const rows = () => effect.map(([c, change]) => ({ class: Site.answer(c), change_of_probability: change }));
  return card(
    "What it moves",
    `effect-${index}`,
    rows,
    bars(
      effect.map(([c, value]) => ({ label: Site.answer(c), value })),
      { format: points },
    ),
    note("Mean change of each class's probability when the feature is set to its peak on every token."),
  );
}

function between(index) {
  const alive = (step) => {
    for (let i = index + step; i >= 0 && i < Site.size; i += step) if (Site.features.peak[i] > 0) return i;
    return -1;
  };
  const [before, after] = [alive(-1), alive(1)];
  const to = (i, text, spoken) =>
    i < 0 ? null : el("a", { href: `#/feature/${i}`, "aria-label": `${spoken} active feature, ${i}` }, text);
  return el(
    "nav",
    { class: "between", "aria-label": "Features beside this one" },
    to(before, "← before", "Previous"),
    to(after, "after →", "Next"),
  );
}

function histogramCard(index, data, peak) {
  const bins = data.histogram;
  const rows = () =>
    bins.map((tokens, i) => ({ from: (i / bins.length) * peak, to: ((i + 1) / bins.length) * peak, tokens }));
  return card("How often, how strongly", `histogram-${index}`, rows, histogram(bins, peak));
}

async function featurePage(index, params) {
  const data = await Site.feature(index);
  if (!data)
    throw new Error(`data/features/${Math.floor(index / Site.about.feature_shard)}.js does not hold feature ${index}.`);
  const { features } = Site;
  const value = (key) => features[key]?.[index] ?? NaN;
  const names = Site.names(index);
  const active = value("peak") > 0;
  const kept = { feature: index, names, ...Object.fromEntries(MEASURES.map(({ key }) => [key, value(key)])), ...data };
  const head = el(
    "header",
    { class: "title" },
    el(
      "div",
      {},
      el("p", { class: "crumb" }, link("#/", "Features"), ` / ${index}`),
      el("h1", {}, el("span", { class: "index" }, index), " ", Site.featureName(index)),
      names.length > 1 ? el("p", { class: "soft" }, names.slice(1).join(" · ")) : null,
    ),
    el(
      "div",
      { class: "tools" },
      between(index),
      Site.about.compare ? link(`#/compare/${index}`, "compare") : null,
      el(
        "button",
        {
          type: "button",
          class: "quiet",
          onclick: () => save(`feature-${index}.json`, JSON.stringify(kept, null, 1) + "\n", "application/json"),
        },
        "all data, JSON",
      ),
    ),
  );
  const stats = el(
    "dl",
    { class: "stats" },
    measures().map(({ key, label, format, what }) => stat(label, format(value(key)), what)),
  );
  const measured = Number.isFinite(value("steerability")) ? steerabilityNote() : null;
  const alike = neighbours("Most similar directions", `similar-${index}`, data.similar || [], "cosine", number);
  const called = namesCard(index, data);
  const cards = (...parts) => el("div", { class: "cards" }, parts);
  const parts = active
    ? [
        measured,
        topPictures(index, data),
        steerCard(index, data, params),
        cards(
          effectCard(index, data),
          histogramCard(index, data, value("peak")),
          called,
          classesCard(index, data),
          alike,
          neighbours("Fires together with", `coactive-${index}`, data.coactive || [], "correlation", number),
        ),
        intervals(index, data),
      ]
    : [
        note("It is active on no token of these pictures: there is nothing to show, and no peak to steer by."),
        cards(called, alike),
      ];
  return {
    title: `${index} ${Site.featureName(index)}`,
    node: el("article", { class: "feature" }, head, stats, parts),
  };
}
