// A table of thousands of rows of which those in sight exist: sorted by a column's head, walked with the arrow keys.
"use strict";

// columns: [{key, label, what, cell(index), sort: true|false}]; href(index) is where a row leads; sorted({key, down}).
function longTable({ label, columns, href, sorted, state }) {
  let rows = [];
  const alive = new Map(); // position -> row
  const heads = columns.map((column) => {
    const name = column.sort
      ? el(
          "button",
          { type: "button", onclick: () => sorted(column.key) },
          column.label,
          el("span", { class: "arrow", "aria-hidden": "true" }),
        )
      : column.label;
    return el("div", { role: "columnheader", class: `cell col-${column.key}`, title: column.what || null }, name);
  });
  const group = el("div", { role: "rowgroup", class: "rows" });
  const scroller = el("div", { class: "scroller" }, group);
  const head = el(
    "div",
    { role: "rowgroup" },
    el("div", { role: "row", class: "row head", "aria-rowindex": "1" }, heads),
  );
  const table = el(
    "div",
    { role: "table", "aria-label": label, class: "long", "aria-colcount": columns.length },
    head,
    scroller,
  );
  const nothing = el("p", { class: "nothing", hidden: true }, "No feature fits. Loosen the search or the filters.");
  let tall = 0;

  function row(position) {
    const index = rows[position];
    const cells = columns.map((column, i) => {
      const content = column.cell(index);
      return el(
        "div",
        { role: "cell", class: `cell col-${column.key}` },
        i === 0 ? el("a", { href: href(index), "data-position": position }, content) : content,
      );
    });
    return el(
      "div",
      {
        role: "row",
        class: "row",
        "aria-rowindex": position + 2,
        style: { transform: `translateY(${position * tall}px)` },
      },
      cells,
    );
  }

  function render() {
    tall = tall || parseFloat(getComputedStyle(table).getPropertyValue("--row")) || 64;
    const first = Math.max(0, Math.floor(scroller.scrollTop / tall) - 4);
    const last = Math.min(rows.length, Math.ceil((scroller.scrollTop + (scroller.clientHeight || 700)) / tall) + 4);
    for (const [position, node] of alive) {
      if ((position < first || position >= last) && !node.contains(document.activeElement)) {
        node.remove();
        alive.delete(position);
      }
    }
    const fresh = [];
    for (let position = first; position < last; position++) {
      if (alive.has(position)) continue;
      const node = row(position);
      alive.set(position, node);
      fresh.push(node);
    }
    group.append(...fresh);
  }

  function focus(position) {
    const to = Math.max(0, Math.min(rows.length - 1, position));
    const [above, below] = [to * tall, (to + 1) * tall - scroller.clientHeight];
    if (scroller.scrollTop > above) scroller.scrollTop = above;
    if (scroller.scrollTop < below) scroller.scrollTop = below;
    render();
    alive.get(to)?.querySelector("a").focus({ preventScroll: true });
  }

  scroller.addEventListener(
    "scroll",
    () => {
      if (!scroller.isConnected) return; // a late event of a page that was left: its position is kept, not 0
      state.scroll = scroller.scrollTop;
      requestAnimationFrame(render);
    },
    { passive: true },
  );
  scroller.addEventListener("keydown", (event) => {
    const from = event.target.dataset?.position;
    if (from === undefined) return;
    const page = Math.max(1, Math.floor(scroller.clientHeight / tall) - 1);
    const to = {
      ArrowDown: +from + 1,
      ArrowUp: +from - 1,
      PageDown: +from + page,
      PageUp: +from - page,
      Home: 0,
      End: rows.length - 1,
    }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    focus(to);
  });
  let placed = false;
  new ResizeObserver(() => {
    const now = parseFloat(getComputedStyle(table).getPropertyValue("--row")) || 64;
    if (now === tall && placed) {
      render();
      return;
    }
    placed = true;
    fill(rows, true);
  }).observe(scroller);

  function fill(next, keep = false) {
    rows = next;
    for (const node of alive.values()) node.remove();
    alive.clear();
    tall = parseFloat(getComputedStyle(table).getPropertyValue("--row")) || tall || 64;
    group.style.setProperty("height", `${rows.length * tall}px`);
    table.setAttribute("aria-rowcount", rows.length + 1);
    nothing.hidden = rows.length > 0;
    if (!keep) state.scroll = 0;
    scroller.scrollTop = state.scroll || 0;
    render();
  }

  function mark(key, down) {
    columns.forEach((column, i) => {
      if (column.sort)
        heads[i].setAttribute("aria-sort", column.key === key ? (down ? "descending" : "ascending") : "none");
    });
  }

  return { node: el("div", { class: "table" }, table, nothing), fill, mark, focus };
}
