// The slider: the same pictures before and after one feature is set to a multiple of its peak. Stored strengths from
// disk; any strength, and one's own picture, where a server runs the model.
"use strict";

const Own = { id: null, name: "", entry: null };

// What was stored, as predictions at a strength: of some classes, and which comes first of all.
function stored({ images, classes, clean, probability, first }, strengths) {
  return {
    at(s) {
      return images.map((row, r) => {
        const was = Site.picture(row);
        const now = first[s][r];
        const where = classes.indexOf(now);
        return {
          classes,
          clean: clean[r],
          steered: probability[s][r],
          was: [was.first, was.p],
          now: [now, where < 0 ? NaN : probability[s][r][where]],
        };
      });
    },
    curves() {
      const mean = (of) => images.reduce((sum, _, r) => sum + of(r), 0) / images.length;
      const found = classes.map((which, c) => ({
        name: Site.answer(which),
        ys: strengths.map((_, s) => mean((r) => probability[s][r][c])),
      }));
      const swing = ({ ys }) => Math.max(...ys) - Math.min(...ys);
      return found.sort((a, b) => swing(b) - swing(a)).slice(0, 6);
    },
  };
}

// What a server answered, of all classes.
function answered({ before, after }) {
  const classes = Site.answers.map((_, c) => c);
  const best = (p) => {
    const [c] = largest(p, 1);
    return [c, p[c]];
  };
  return before.map((clean, r) => ({ classes, clean, steered: after[r], was: best(clean), now: best(after[r]) }));
}

const largest = (p, count) =>
  p
    .map((_, c) => c)
    .sort((a, b) => p[b] - p[a])
    .slice(0, count);

// One picture before and after; fill({classes, clean, steered, was, now}).
function pair(picture, alt) {
  const verdictOf = el("p", { class: "shift" });
  const list = el("ul", { class: "paired" });
  const truth = Site.className(picture.truth);
  const node = el(
    "figure",
    { class: "pair" },
    el("img", { src: picture.thumb, alt, width: 96, height: 96 }),
    el(
      "figcaption",
      {},
      el("span", { class: "file", title: picture.file || picture.name }, picture.file || picture.name),
      truth ? el("span", { class: "truth", title: truth }, `truth: ${truth}`) : null,
    ),
    el("div", { class: "changes" }, verdictOf, list),
  );
  function fill({ classes, clean, steered, was, now }) {
    const said = ([which, p]) => [
      verdict(picture.truth, which),
      ` ${Site.answer(which)} `,
      Number.isNaN(p) ? null : el("span", { class: "whole" }, percent(p)),
    ];
    verdictOf.replaceChildren(
      el("span", {}, said(was)),
      el("span", { "aria-hidden": "true" }, " → "),
      now[0] === was[0]
        ? el("span", {}, el("span", { class: "unseen" }, " stays "), said(now))
        : el("span", { class: "moved" }, "now ", said(now)),
    );
    // the truth is always among them, if it is known how probable it is
    const own = picture.truth < 0 ? -1 : classes.indexOf(picture.truth);
    const most = [...new Set([...largest(steered, 2), ...largest(clean, 2)])];
    const listed = own < 0 || most.includes(own) ? most : [...most.slice(0, 3), own];
    const width = (p) => ({ width: `${(100 * p).toFixed(1)}%` });
    list.replaceChildren(
      ...listed.map((c) =>
        el(
          "li",
          {},
          el(
            "span",
            { class: "what", title: Site.answer(classes[c]) },
            classes[c] === picture.truth
              ? el("b", {}, Site.answer(classes[c]), el("span", { class: "unseen" }, " (truth)"))
              : Site.answer(classes[c]),
          ),
          el(
            "span",
            { class: "two", "aria-hidden": "true" },
            el("span", { class: "before", style: width(clean[c]) }),
            el("span", { class: "after", style: width(steered[c]) }),
          ),
          el(
            "span",
            { class: "value" },
            el("span", { class: "unseen" }, "before "),
            percent(clean[c]),
            el("span", { class: "unseen" }, " after "),
            el("span", { "aria-hidden": "true" }, " → "),
            percent(steered[c]),
          ),
        ),
      ),
    );
  }
  return { node, fill, picture };
}

function steerCard(index, data, params) {
  const { live } = Site.about;
  const { steering } = data;
  const { strengths } = Site.about;
  if (!Site.answers.length)
    return card(
      "Steer it",
      `steer-${index}`,
      null,
      note("This model has no text tower and the pictures have no classes: there is nothing to predict."),
    );
  if (!steering && !live) {
    return card(
      "Steer it",
      `steer-${index}`,
      null,
      note(
        `Predictions were stored for the ${plural(Site.about.steered, "feature")} with the most to say. `,
        "Open the site with --serve to steer any.",
      ),
    );
  }
  const peak = Site.features.peak[index];
  const rows = steering ? [...steering.images] : data.top.slice(0, 6).map(([image]) => image);
  const on = Number(params.get("on") || NaN);
  if (live && Number.isInteger(on) && on >= 0 && on < Site.about.data.images && !rows.includes(on)) rows.unshift(on);
  const past = steering ? stored(steering, strengths) : null;
  const [least, most] = [strengths[0], strengths[strengths.length - 1]];
  const asked = params.get("strength");
  const wanted = asked !== null && asked !== "" && Number.isFinite(+asked) ? +asked : 1;
  const nearest = (s) =>
    strengths.reduce((best, x, i) => (Math.abs(x - s) < Math.abs(strengths[best] - s) ? i : best), 0);
  let strength = live ? wanted : strengths[nearest(wanted)];

  const label = el("output", { class: "strength" });
  const trouble = el("p", { class: "trouble", role: "alert", hidden: true });
  const grid = el("div", { class: "pairs" });
  let pairs = [];
  function lay() {
    pairs = [
      ...(live && Own.id
        ? [
            pair(
              { row: "own", thumb: Own.entry.thumb, name: Own.name, file: Own.name, truth: -1 },
              `your picture ${Own.name}`,
            ),
          ]
        : []),
      ...rows.map((row) => {
        const picture = Site.picture(row);
        return pair(picture, picture.name);
      }),
    ];
    grid.replaceChildren(...pairs.map(({ node }) => node));
  }
  const series = past ? past.curves() : [];
  const curve = past ? curves(strengths, series, () => strength) : null;
  let latest = null;

  function show(found) {
    latest = found;
    pairs.forEach(({ fill }, r) => {
      if (found[r]) fill(found[r]);
    });
  }

  // Live: one question at a time, and after its answer the latest one.
  let [busy, again, begun] = [false, false, performance.now()];
  async function askLive() {
    if (busy) {
      again = true;
      return;
    }
    busy = true;
    try {
      begun = performance.now();
      const found = await clipsteer.ask(
        "steer",
        JSON.stringify({ feature: index, strength, images: rows, own: Own.id }),
      );
      show(answered(found));
      trouble.hidden = true;
      grid.dataset.strength = strength;
      grid.dataset.ms = Math.round(performance.now() - begun);
    } catch (error) {
      trouble.hidden = false;
      trouble.textContent = error.message;
    }
    busy = false;
    if (again) {
      again = false;
      askLive();
    }
  }

  const slider = el(
    "input",
    live
      ? {
          type: "range",
          id: "strength",
          min: least,
          max: most,
          step: (most - least) / 200,
          "aria-label": "Strength, multiples of the peak",
        }
      : {
          type: "range",
          id: "strength",
          min: 0,
          max: strengths.length - 1,
          step: 1,
          "aria-label": "Strength, multiples of the peak",
          list: "strengths",
        },
  );
  const typed = live
    ? el("input", { type: "number", step: "any", class: "typed", "aria-label": "Any strength, multiples of the peak" })
    : null;

  function move(next, address = true) {
    strength = next;
    if (document.activeElement !== slider) slider.value = live ? next : nearest(next);
    if (typed && document.activeElement !== typed) typed.value = Number(next.toFixed(2));
    const text = `${times(next)} its peak (activation ${number(next * peak)})${next === 0 ? ": suppressed" : ""}`;
    label.textContent = text;
    slider.setAttribute("aria-valuetext", text);
    curve?.mark(next);
    if (live) askLive();
    else {
      const s = nearest(next);
      show(past.at(s));
      grid.dataset.strength = next;
    }
    if (address) {
      const query = new URLSearchParams(params);
      query.set("strength", Number(next.toFixed(3)));
      history.replaceState(null, "", `#/feature/${index}?${query}`);
    }
  }
  slider.addEventListener("input", () => move(live ? +slider.value : strengths[+slider.value]));
  typed?.addEventListener("change", () => {
    if (typed.value !== "" && Number.isFinite(+typed.value)) move(+typed.value);
  });

  const shown = (s, found) =>
    found.flatMap(({ classes, clean, steered }, r) => {
      const { row, file, name, truth } = pairs[r].picture;
      return classes.map((which, c) => ({
        strength: s,
        picture: row,
        file: file || name,
        truth: Site.className(truth),
        class: Site.answer(which),
        before: clean[c],
        after: steered[c],
      }));
    });
  const table = () => (live ? shown(strength, latest || []) : strengths.flatMap((s, i) => shown(s, past.at(i))));
  lay();
  move(strength, false);
  const among =
    !live && steering.classes.length < Site.answers.length
      ? `Probabilities are over all ${plural(Site.answers.length, "answer")}; ` +
        `of each picture those of ${steering.classes.length} are stored.`
      : "";
  const known = rows.map((row) => Site.picture(row).truth).filter((truth) => truth >= 0);
  const listed = live ? known : known.filter((truth) => steering.classes.includes(truth));
  const bold = !listed.length ? "" : `; the truth in bold${listed.length < known.length ? ", where it is stored" : ""}`;
  const legend = note(
    `Thin bars: before. Thick bars: after. All to 100 %${bold}. `,
    "“Now”, in colour: what comes first once the feature is set, where that is another class. ",
    among,
  );
  return card(
    "Steer it",
    `steer-${index}`,
    table,
    el(
      "div",
      { class: "slide" },
      slider,
      live
        ? null
        : el(
            "datalist",
            { id: "strengths" },
            strengths.map((_, i) => el("option", { value: i })),
          ),
      el("div", { class: "ends", "aria-hidden": "true" }, el("span", {}, times(least)), el("span", {}, times(most))),
      el(
        "div",
        { class: "row-of" },
        label,
        typed,
        live
          ? uploadButton(() => {
              lay();
              askLive();
            })
          : null,
      ),
    ),
    trouble,
    legend,
    grid,
    curve,
  );
}

// A button that sends a picture to the server; nothing leaves this machine.
function uploadButton(then) {
  const input = el("input", {
    type: "file",
    accept: "image/*",
    class: "unseen",
    id: "upload",
    "aria-label": "Choose a picture of your own",
  });
  const trouble = el("span", { class: "trouble", role: "alert" });
  input.addEventListener("change", async () => {
    const [file] = input.files;
    if (!file) return;
    try {
      const entry = await clipsteer.ask("picture", file, "application/octet-stream");
      Object.assign(Own, { id: entry.id, name: file.name, entry });
      trouble.textContent = "";
      then();
    } catch (error) {
      trouble.textContent = error.message;
    }
    input.value = "";
  });
  return el(
    "span",
    { class: "upload" },
    input,
    el("label", { class: "button", for: "upload" }, Own.id ? "another picture of yours" : "a picture of yours"),
    trouble,
  );
}
