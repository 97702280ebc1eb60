// Elements, numbers as text, downloads. Names of files, classes and words come from outside: they are only ever text.
"use strict";

const SVG = "http://www.w3.org/2000/svg";

function made(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "style") for (const [what, how] of Object.entries(value)) node.style.setProperty(what, how);
    else if (name === "value") node.value = value;
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

const el = (name, attributes, ...children) => made(document.createElement(name), attributes, children);
const svg = (name, attributes, ...children) => made(document.createElementNS(SVG, name), attributes, children);

// A list to choose one of, of [value, text]; `taken` is told which.
const choice = (attributes, options, taken, chosen) =>
  el(
    "select",
    { ...attributes, onchange: (event) => taken(event.target.value) },
    options.map(([value, text]) => el("option", { value, selected: value === chosen }, text)),
  );

const say = (text) => {
  document.getElementById("status").textContent = text;
};

function number(value, digits = 3) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e5 || size < 1e-3)
    return value.toExponential(1).replace("e+", "e").replace("-", "−").replace("e-", "e−");
  return Number(value.toPrecision(digits))
    .toLocaleString("en", { maximumSignificantDigits: Math.max(digits, 4) })
    .replace("-", "−");
}

function percent(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  const share = 100 * value;
  if (Math.abs(share) < 1) return `${number(share, 2)} %`;
  return `${share.toFixed(Math.abs(share) < 9.95 ? 1 : 0).replace("-", "−")} %`;
}

// a change of a probability, in points of a percentage
const points = (value) => `${value > 0 ? "+" : value < 0 ? "−" : ""}${number(Math.abs(100 * value), 2)} pt`;
const signed = (value) => `${value > 0 ? "+" : ""}${number(value)}`;
const times = (value) => `${Number(value.toFixed(2)).toString().replace("-", "−")}×`;
const plural = (count, what) => `${count.toLocaleString("en")} ${what}${count === 1 ? "" : "s"}`;

// A name that is too long keeps its beginning and its end: those of one kind differ there.
function shortened(text, most) {
  if (text.length <= most) return text;
  const tail = Math.floor((most - 1) / 2);
  return `${text.slice(0, most - 1 - tail)}…${text.slice(text.length - tail)}`;
}

// Downloads ---------------------------------------------------------------------------------------------------------

// A cell of CSV. Text that a spreadsheet would take for a formula gets an apostrophe in front.
function cell(value) {
  if (typeof value === "number") return Number.isFinite(value) ? String(value) : "";
  let text = value === null || value === undefined ? "" : String(value);
  if (/^[=+\-@\t\r]/.test(text)) text = `'${text}`;
  return /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}

function save(name, text, type) {
  const url = URL.createObjectURL(new Blob([text], { type }));
  const link = el("a", { href: url, download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

// Two buttons that save what a chart shows; `rows()` gives objects with equal names.
function downloads(name, rows) {
  const csv = () => {
    const found = rows();
    const columns = Object.keys(found[0] || {});
    const lines = [columns, ...found.map((row) => columns.map((column) => row[column]))];
    save(`${name}.csv`, lines.map((line) => line.map(cell).join(",")).join("\n") + "\n", "text/csv");
  };
  const json = () => {
    const plain = (_, value) => (typeof value === "number" && !Number.isFinite(value) ? null : value);
    save(`${name}.json`, JSON.stringify(rows(), plain, 1) + "\n", "application/json");
  };
  const button = (kind, act) =>
    el(
      "button",
      { type: "button", class: "quiet", onclick: act, "aria-label": `${kind} of ${name.replaceAll("-", " ")}` },
      kind,
    );
  return el("span", { class: "downloads" }, button("CSV", csv), button("JSON", json));
}

// Parts of pages ----------------------------------------------------------------------------------------------------

function card(title, name, rows, ...children) {
  const heading = el("div", { class: "heading" }, el("h2", {}, title), rows ? downloads(name, rows) : null);
  return el("section", { class: `card ${name.replace(/-?\d+$/, "")}` }, heading, ...children);
}

const note = (...children) => el("p", { class: "note" }, ...children);
const link = (hash, ...children) => el("a", { href: hash }, ...children);
const featureLink = (index) =>
  link(`#/feature/${index}`, el("span", { class: "index" }, index), " ", Site.featureName(index));

const unhexed = (text) =>
  Uint8Array.from({ length: text.length / 2 }, (_, i) => parseInt(text.slice(2 * i, 2 * i + 2), 16));

// The heat of a feature over the patches of a picture: h*w numbers from 0 to 255, 255 = the feature's peak.
function heat(values) {
  const [high, wide] = Site.about.grid;
  const canvas = el("canvas", { class: "heat", width: wide, height: high, "aria-hidden": "true" });
  const paint = canvas.getContext("2d");
  const pixels = paint.createImageData(wide, high);
  for (let i = 0; i < high * wide; i++) {
    const value = values[i] / 255;
    // what is cold is darkened, what is hot glows: seen on dark and on light pictures
    const hot = Math.sqrt(value);
    pixels.data.set([255 * hot, 150 * hot * hot, 20, value > 0 ? 60 + 130 * hot : 130], 4 * i);
    if (value === 0) pixels.data.set([10, 14, 30], 4 * i);
  }
  paint.putImageData(pixels, 0, 0);
  return canvas;
}

function verdict(truth, first) {
  if (truth < 0 || first < 0) return null;
  const right = truth === first;
  return el(
    "span",
    { class: right ? "right" : "wrong" },
    right ? "✓" : "✗",
    el("span", { class: "unseen" }, right ? " right" : " wrong"),
  );
}

// A picture with what the model saw, where a feature fires, its file, its truth and what was predicted.
function figure(row, { act = null, map = "", before = null, to = `#/picture/${row}` } = {}) {
  const picture = Site.picture(row);
  const truth = Site.className(picture.truth);
  const alt = `${picture.name}${truth ? `, truth ${truth}` : ""}`;
  const seen = el(
    "span",
    { class: "seen" },
    el("img", { src: picture.thumb, alt, width: 96, height: 96, loading: "lazy", decoding: "async" }),
    map ? heat(unhexed(map)) : null,
  );
  const caption = el(
    "figcaption",
    {},
    act === null
      ? null
      : el(
          "span",
          { class: "act" },
          number(act),
          before > 0 ? el("small", {}, ` (${number(before)} on the class token)`) : null,
        ),
    el("span", { class: "file", title: picture.file || picture.name }, picture.file || picture.name),
    truth ? el("span", { class: "truth", title: truth }, `truth: ${truth}`) : null,
    picture.first < 0
      ? null
      : el(
          "span",
          { class: "first", title: Site.answer(picture.first) },
          verdict(picture.truth, picture.first),
          ` ${Site.answer(picture.first)} `,
          el("span", { class: "whole" }, percent(picture.p)),
        ),
  );
  return el("figure", {}, link(to, seen), caption);
}
