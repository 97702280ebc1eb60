// Drawings of numbers: each is drawn at the width it has, says in words what it shows, and tells values on hover.
"use strict";

const LINES = 8; // colours that are told apart, --c0 to --c7

// Ticks at 1, 2 or 5 times a power of ten, from at or below `low` to at or above `high`.
function ticks(low, high, count = 5) {
  const span = high - low || 1;
  const rough = span / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((x) => x * power).find((x) => x >= rough * 0.999);
  const found = [];
  for (let i = Math.floor(low / step + 1e-9); i * step < high + step * (1 - 1e-9); i++) found.push(i * step);
  return found;
}

function decades(low, high) {
  const found = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++) found.push(10 ** power);
  return found;
}

// A figure that calls draw(width, tell) whenever its width changes; tell(text) is what is under the pointer.
function chart(caption, spoken, draw) {
  const told = el("output", { class: "told" });
  const place = el("div", { class: "drawing" });
  let width = 0;
  new ResizeObserver(([entry]) => {
    const now = Math.round(entry.contentRect.width);
    if (now === width || now === 0) return;
    width = now;
    const drawing = draw(width, (text) => {
      told.textContent = text;
    });
    drawing.setAttribute("role", "img");
    drawing.setAttribute("aria-label", spoken);
    drawing.addEventListener("pointerleave", () => {
      told.textContent = "";
    });
    place.replaceChildren(drawing);
  }).observe(place);
  return el("figure", { class: "chart" }, place, el("figcaption", {}, el("span", {}, caption), told));
}

const words = (x, y, text, anchor = "middle", kind = "tick") =>
  svg("text", { x, y, "text-anchor": anchor, class: kind }, text);

// Counts in equal parts of (0, peak], in powers of ten.
function histogram(counts, peak) {
  const edges = Array.from({ length: counts.length + 1 }, (_, i) => (i / counts.length) * peak);
  const total = counts.reduce((sum, count) => sum + count, 0);
  const most = Math.max(...counts, 1);
  const spoken =
    `Histogram of ${plural(total, "activation")} from 0 to the peak, ` +
    `${number(peak)}; the fullest of ${counts.length} bins has ${plural(most, "token")}.`;
  return chart("active tokens by activation, logarithmic", spoken, (width, tell) => {
    const height = 190;
    const [left, right, top, foot] = [46, width - 8, 10, height - 34];
    const root = svg("svg", { width, height, viewBox: `0 0 ${width} ${height}` });
    // a bin with one token is to be seen: the axis begins at half a token
    const yTicks = decades(1, Math.max(most, 10));
    const highest = Math.log10(yTicks[yTicks.length - 1]);
    const lowest = Math.log10(0.5);
    const y = (count) => foot - ((Math.log10(Math.max(count, 0.5)) - lowest) / (highest - lowest)) * (foot - top);
    const xTicks = ticks(0, peak, Math.max(2, Math.floor((right - left) / 70)));
    const x = (value) => left + (value / xTicks[xTicks.length - 1]) * (right - left);
    for (const tick of yTicks) {
      root.append(
        svg("line", { x1: left, x2: right, y1: y(tick), y2: y(tick), class: "rule" }),
        words(left - 6, y(tick) + 4, tick.toLocaleString("en"), "end"),
      );
    }
    counts.forEach((count, i) => {
      const [a, b] = [x(edges[i]), x(edges[i + 1])];
      const text = `${number(edges[i])} to ${number(edges[i + 1])}: ${plural(count, "token")}`;
      if (count)
        root.append(
          svg("rect", {
            x: a + 0.5,
            y: y(count),
            width: Math.max(b - a - 1, 1),
            height: foot - y(count),
            class: "bar",
          }),
        );
      root.append(
        svg("rect", {
          x: a,
          y: top,
          width: Math.max(b - a, 1),
          height: foot - top,
          class: "hit",
          onpointerenter: () => tell(text),
        }),
      );
    });
    for (const tick of xTicks) root.append(words(x(tick), foot + 15, number(tick)));
    root.append(
      svg("line", { x1: left, x2: right, y1: foot, y2: foot, class: "axis" }),
      words((left + right) / 2, height - 3, "activation", "middle", "label"),
    );
    return root;
  });
}

// Labels at heights that keep `gap` between each other, as near as they can to where they belong.
function apart(wanted, gap, low, high) {
  const order = wanted.map((y, i) => [y, i]).sort((a, b) => a[0] - b[0]);
  let last = low - gap;
  for (const pair of order) last = pair[0] = Math.max(pair[0], last + gap);
  let next = high + gap;
  for (const pair of [...order].reverse()) next = pair[0] = Math.min(pair[0], next - gap);
  const found = [];
  for (const [y, i] of order) found[i] = y;
  return found;
}

// Lines over strengths, each with its name at its end. `at()` is the strength chosen now.
function curves(xs, series, at) {
  const spoken =
    `Mean probability of ${series.length} classes over strengths ${times(xs[0])} to ` +
    `${times(xs[xs.length - 1])} of the peak: ` +
    series.map(({ name, ys }) => `${name} from ${percent(ys[0])} to ${percent(ys[ys.length - 1])}`).join("; ");
  const marks = [];
  let place = null;
  const figure = chart("mean probability over these pictures", spoken, (width, tell) => {
    const height = 230;
    const room = Math.min(150, width * 0.32);
    const [left, right, top, foot] = [44, width - room, 12, height - 34];
    const root = svg("svg", { width, height, viewBox: `0 0 ${width} ${height}` });
    const top1 = Math.max(...series.flatMap(({ ys }) => ys), 0.02);
    const yTicks = ticks(0, Math.min(top1, 1), 4);
    const most = yTicks[yTicks.length - 1];
    const y = (p) => foot - (p / most) * (foot - top);
    const x = (strength) => left + ((strength - xs[0]) / (xs[xs.length - 1] - xs[0] || 1)) * (right - left);
    for (const tick of yTicks) {
      root.append(
        svg("line", { x1: left, x2: right, y1: y(tick), y2: y(tick), class: "rule" }),
        words(left - 6, y(tick) + 4, percent(tick), "end"),
      );
    }
    const labelled = ticks(xs[0], xs[xs.length - 1], Math.max(2, Math.floor((right - left) / 60)));
    for (const tick of labelled) {
      if (tick >= xs[0] && tick <= xs[xs.length - 1]) root.append(words(x(tick), foot + 15, times(tick)));
    }
    root.append(
      svg("line", { x1: left, x2: right, y1: foot, y2: foot, class: "axis" }),
      words((left + right) / 2, height - 3, "strength, multiples of the peak", "middle", "label"),
    );
    const heights = apart(
      series.map(({ ys }) => y(ys[ys.length - 1])),
      14,
      top,
      foot,
    );
    series.forEach(({ name, ys }, i) => {
      const colour = `c${i % LINES}`;
      root.append(
        svg("polyline", {
          points: xs.map((s, j) => `${x(s).toFixed(1)},${y(ys[j]).toFixed(1)}`).join(" "),
          class: `line ${colour}`,
        }),
        svg("line", { x1: right, y1: y(ys[ys.length - 1]), x2: right + 8, y2: heights[i], class: `lead ${colour}` }),
        svg(
          "text",
          { x: right + 11, y: heights[i] + 4, class: `name ${colour}` },
          svg("title", {}, name),
          name.length * 6.6 > room - 14 ? shortened(name, Math.floor((room - 14) / 6.6)) : name,
        ),
      );
    });
    const mark = svg("line", { y1: top, y2: foot, class: "mark" });
    root.append(mark);
    marks.splice(0, marks.length, mark);
    place = (strength) => {
      mark.setAttribute("x1", x(strength));
      mark.setAttribute("x2", x(strength));
    };
    place(at());
    root.addEventListener("pointermove", (event) => {
      const where = event.clientX - root.getBoundingClientRect().left;
      const nearest = xs.map((s, j) => [Math.abs(x(s) - where), j]).sort((a, b) => a[0] - b[0])[0][1];
      tell(`${times(xs[nearest])}: ${series.map(({ name, ys }) => `${name} ${percent(ys[nearest])}`).join(", ")}`);
    });
    return root;
  });
  figure.mark = (strength) => place?.(strength);
  return figure;
}

// Named numbers as bars on one scale; what is below 0 goes to the left.
function bars(rows, { format = number, scale = null } = {}) {
  const size = scale || Math.max(...rows.map(({ value }) => Math.abs(value)), 1e-12);
  const signed = rows.some(({ value }) => value < 0);
  return el(
    "ul",
    { class: `bars${signed ? " signed" : ""}` },
    rows.map(({ label, value, extra }) => {
      const share = `${(100 * Math.min(Math.abs(value) / size, 1)).toFixed(1)}%`;
      const bar = el(
        "span",
        { class: value < 0 ? "track minus" : "track", "aria-hidden": "true" },
        el("span", { style: { width: share } }),
      );
      return el(
        "li",
        {},
        el(
          "span",
          { class: "what", title: typeof label === "string" ? label : null },
          el("span", { class: "said" }, label),
          extra ? el("small", {}, ` ${extra}`) : null,
        ),
        bar,
        el("span", { class: "value" }, format(value)),
      );
    }),
  );
}
