// All features as points: two columns against each other on a canvas. A click opens one, a drag selects a range.
"use strict";

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

// An axis over what is finite (and above 0, where it is logarithmic).
function axis(values, log) {
  let low = Infinity;
  let high = -Infinity;
  for (const value of values) {
    if (!Number.isFinite(value) || (log && value <= 0)) continue;
    low = Math.min(low, value);
    high = Math.max(high, value);
  }
  if (low > high) return null;
  if (log) {
    const [a, b] = [
      Math.floor(Math.log10(low)),
      Math.max(Math.ceil(Math.log10(high)), Math.floor(Math.log10(low)) + 1),
    ];
    return {
      log,
      ticks: decades(10 ** a, 10 ** b),
      at: (v) => (Math.log10(v) - a) / (b - a),
      back: (t) => 10 ** (a + t * (b - a)),
      has: (v) => v > 0 && Number.isFinite(v),
    };
  }
  const marks = ticks(Math.min(low, 0), high);
  const [a, b] = [marks[0], marks[marks.length - 1] === marks[0] ? marks[0] + 1 : marks[marks.length - 1]];
  return { log, ticks: marks, at: (v) => (v - a) / (b - a), back: (t) => a + t * (b - a), has: Number.isFinite };
}

// columns: [{key, label, values, log, format}]; open(index); picked({x: {key, range}, y}) of a drag, if there is one.
function scatter({ columns, x, y, label, open, picked = null, describe, changed = () => {} }) {
  const canvas = el("canvas", {
    class: "points",
    tabindex: "0",
    role: "application",
    "aria-roledescription": "scatter plot",
    "aria-label": label,
  });
  const tip = el("div", { class: "tip", hidden: true });
  const box = el("div", { class: "selection", hidden: true });
  const frame = el("div", { class: "frame" }, canvas, box, tip);
  const left = el("p", { class: "note" });
  const by = (key) => columns.find((column) => column.key === key) || columns[0];
  const menu = (name, value) =>
    choice(
      { "aria-label": `${name} axis` },
      columns.map(({ key, label }) => [key, label]),
      (key) => {
        chosen[name] = key;
        changed(chosen);
        prepare();
        paint();
      },
      value,
    );
  const chosen = { x, y };
  const margin = { left: 50, right: 12, top: 12, foot: 40 };
  let shown = null; // Uint8Array: 1 where the filters let a feature through
  let [spots, order, over, start] = [null, [], -1, null];
  let [axes, width, height] = [null, 0, 320];

  function prepare() {
    axes = { x: axis(by(chosen.x).values, by(chosen.x).log), y: axis(by(chosen.y).values, by(chosen.y).log) };
    const [xs, ys] = [by(chosen.x).values, by(chosen.y).values];
    spots = new Float32Array(2 * xs.length).fill(NaN);
    order = [];
    if (axes.x && axes.y) {
      const [w, h] = [width - margin.left - margin.right, height - margin.top - margin.foot];
      for (let i = 0; i < xs.length; i++) {
        if (!axes.x.has(xs[i]) || !axes.y.has(ys[i])) continue;
        spots[2 * i] = margin.left + axes.x.at(xs[i]) * w;
        spots[2 * i + 1] = margin.top + (1 - axes.y.at(ys[i])) * h;
        order.push(i);
      }
      order.sort((a, b) => spots[2 * a] - spots[2 * b]);
    }
    const missing = xs.length - order.length;
    left.textContent = missing
      ? `Not drawn, without a value on ${axes.x?.log || axes.y?.log ? "a logarithmic" : "an"} axis: ` +
        `${plural(missing, "feature")}. `
      : "";
    left.append(picked ? "Click a point to open it, drag to select a range." : "Click a point to open it.");
  }

  function paint() {
    if (!width) return;
    const density = window.devicePixelRatio || 1;
    canvas.width = width * density;
    canvas.height = height * density;
    const paper = canvas.getContext("2d");
    paper.scale(density, density);
    const [fg, soft, line, accent] = ["--fg", "--soft", "--line", "--accent"].map(colour);
    paper.font = "12px system-ui, sans-serif";
    const [right, foot] = [width - margin.right, height - margin.foot];
    paper.fillStyle = soft;
    if (!axes.x || !axes.y) {
      paper.fillText("Nothing was measured for one of the axes.", margin.left, height / 2);
      return;
    }
    const power = (v) => (v >= 0.001 && v < 10_000 ? number(v) : `1e${Math.round(Math.log10(v))}`.replace("-", "−"));
    paper.strokeStyle = line;
    paper.textAlign = "center";
    const every = (ax, space) => Math.max(1, Math.ceil(ax.ticks.length / Math.max(2, Math.floor(space))));
    axes.x.ticks.forEach((tick, i) => {
      const at = margin.left + axes.x.at(tick) * (right - margin.left);
      paper.beginPath();
      paper.moveTo(at, margin.top);
      paper.lineTo(at, foot);
      paper.stroke();
      if (i % every(axes.x, (right - margin.left) / 48) === 0)
        paper.fillText(axes.x.log ? power(tick) : number(tick), at, foot + 16);
    });
    paper.textAlign = "right";
    axes.y.ticks.forEach((tick) => {
      const at = margin.top + (1 - axes.y.at(tick)) * (foot - margin.top);
      paper.beginPath();
      paper.moveTo(margin.left, at);
      paper.lineTo(right, at);
      paper.stroke();
      paper.fillText(axes.y.log ? power(tick) : number(tick), margin.left - 6, at + 4);
    });
    const dots = (wanted, style, alpha, size) => {
      paper.fillStyle = style;
      paper.globalAlpha = alpha;
      for (const i of order)
        if ((!shown || shown[i] === 1) === wanted)
          paper.fillRect(spots[2 * i] - size / 2, spots[2 * i + 1] - size / 2, size, size);
      paper.globalAlpha = 1;
    };
    dots(false, soft, 0.18, 2);
    dots(true, accent, order.length > 3000 ? 0.45 : 0.8, 3);
    if (over >= 0) {
      paper.strokeStyle = fg;
      paper.lineWidth = 2;
      paper.beginPath();
      paper.arc(spots[2 * over], spots[2 * over + 1], 6, 0, 7);
      paper.stroke();
      paper.lineWidth = 1;
    }
  }

  function nearest(px, py, reach = 18) {
    let [best, found] = [reach * reach, -1];
    for (const i of order) {
      if (shown && shown[i] !== 1) continue;
      const far = (spots[2 * i] - px) ** 2 + (spots[2 * i + 1] - py) ** 2;
      if (far < best) [best, found] = [far, i];
    }
    return found;
  }

  function hover(index, spoken = false) {
    over = index;
    paint();
    tip.hidden = index < 0;
    canvas.classList.toggle("on", index >= 0);
    if (index < 0) return;
    const values = [chosen.x, chosen.y]
      .map((key) => `${by(key).label.toLowerCase()} ${by(key).format(by(key).values[index])}`)
      .join(", ");
    tip.replaceChildren(describe(index), el("small", {}, values));
    const px = spots[2 * index];
    tip.style.setProperty("left", `${px < width / 2 ? px + 12 : px - 212}px`);
    tip.style.setProperty("top", `${Math.max(0, Math.min(spots[2 * index + 1] - 20, height - 120))}px`);
    if (spoken) say(`${index} ${Site.featureName(index)}, ${values}`);
  }

  const place = (event) => {
    const at = canvas.getBoundingClientRect();
    return [event.clientX - at.left, event.clientY - at.top];
  };
  canvas.addEventListener("pointerdown", (event) => {
    start = place(event);
    if (event.pointerType === "mouse") canvas.setPointerCapture(event.pointerId);
  });
  canvas.addEventListener("pointermove", (event) => {
    const [px, py] = place(event);
    if (!start || !picked || event.pointerType !== "mouse") {
      hover(nearest(px, py));
      return;
    }
    box.hidden = Math.hypot(px - start[0], py - start[1]) < 6;
    const style = {
      left: Math.min(px, start[0]),
      top: Math.min(py, start[1]),
      width: Math.abs(px - start[0]),
      height: Math.abs(py - start[1]),
    };
    for (const [name, value] of Object.entries(style)) box.style.setProperty(name, `${value}px`);
  });
  canvas.addEventListener("pointerup", (event) => {
    const [[px, py], begun] = [place(event), start];
    start = null;
    if (box.hidden) {
      const found = nearest(px, py);
      if (found >= 0) open(found);
      return;
    }
    box.hidden = true;
    const [w, h] = [width - margin.left - margin.right, height - margin.top - margin.foot];
    const span = (ax, a, b) => [Math.min(a, b), Math.max(a, b)].map((t) => ax.back(Math.max(0, Math.min(1, t))));
    picked({
      x: { key: chosen.x, range: span(axes.x, (px - margin.left) / w, (begun[0] - margin.left) / w) },
      y: { key: chosen.y, range: span(axes.y, 1 - (py - margin.top) / h, 1 - (begun[1] - margin.top) / h) },
    });
  });
  canvas.addEventListener("pointercancel", () => {
    start = null;
    box.hidden = true;
  });
  canvas.addEventListener("pointerleave", () => {
    if (!start) hover(-1);
  });
  canvas.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && over >= 0) open(over);
    const step = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1, PageDown: 50, PageUp: -50 }[event.key];
    if (!step) return;
    event.preventDefault();
    const seen = shown ? order.filter((i) => shown[i] === 1) : order;
    if (!seen.length) return;
    const at = seen.indexOf(over);
    hover(seen[at < 0 ? 0 : Math.max(0, Math.min(seen.length - 1, at + step))], true);
  });
  canvas.addEventListener("blur", () => hover(-1));

  const figure = el(
    "figure",
    { class: "scatter" },
    frame,
    el("figcaption", {}, el("label", {}, "across ", menu("x", x)), el("label", {}, "up ", menu("y", y)), left),
  );
  new ResizeObserver(([entry]) => {
    const now = Math.round(entry.contentRect.width);
    if (now === width || !now) return;
    width = now;
    height = Math.round(Math.max(240, Math.min(380, width * 0.72)));
    canvas.style.setProperty("height", `${height}px`);
    prepare();
    paint();
  }).observe(frame);
  document.addEventListener("themechange", paint);
  return {
    figure,
    show(mask) {
      shown = mask;
      paint();
    },
    choose(key) {
      Object.assign(chosen, key);
    },
  };
}
