// One picture under the eye: its patches, the features that fire on each, and where a feature fires.
"use strict";

// The features of a token, strongest first, out of the sparse code; token -1 takes the largest over all tokens, and
// first what comes nearest to its own peak.
function firing({ offsets, features, acts }, token) {
  const found = new Map();
  const [from, to] = token < 0 ? [0, features.length] : [offsets[token], offsets[token + 1]];
  for (let at = from; at < to; at++) {
    if (acts[at] > 0) found.set(features[at], Math.max(found.get(features[at]) || 0, acts[at]));
  }
  const rows = [...found].map(([feature, act]) => ({ feature, act, share: act / Site.features.peak[feature] }));
  return rows.sort(token < 0 ? (a, b) => b.share - a.share : (a, b) => b.act - a.act);
}

function patchMap({ offsets, features, acts }, prefix, feature) {
  const [high, wide] = Site.about.grid;
  const map = new Uint8Array(high * wide);
  for (let patch = 0; patch < map.length; patch++) {
    for (let at = offsets[prefix + patch]; at < offsets[prefix + patch + 1]; at++) {
      if (features[at] === feature)
        map[patch] = Math.min(255, Math.round((255 * acts[at]) / Site.features.peak[feature]));
    }
  }
  return map;
}

// The picture, its patches, and what fires: of a picture of the data or of one's own.
function stage(entry, picture, params, address) {
  const { patches } = entry;
  const { prefix } = Site.about;
  const [high, wide] = Site.about.grid || [0, 0];
  const layer = el("div", { class: "layer" });
  const title = el("h2", {});
  const list = el("ul", { class: "firing" });
  const tokens = patches.offsets.length - 1;
  const stored = Site.about.per_patch;
  let pinned = -1;
  const nameOf = (token) => {
    if (token < 0) return "Whole picture";
    if (token < prefix) return token === 0 ? "Class token" : `Register token ${token}`;
    return wide
      ? `Patch in row ${Math.floor((token - prefix) / wide) + 1}, column ${((token - prefix) % wide) + 1}`
      : `Token ${token}`;
  };
  const warm = (feature) =>
    layer.replaceChildren(...(feature >= 0 && wide ? [heat(patchMap(patches, prefix, feature))] : []));
  const lit = params.get("feature") === null ? -1 : Number(params.get("feature"));
  const resting = Number.isInteger(lit) && lit >= 0 && lit < Site.size ? lit : -1;

  function show(token) {
    const found = firing(patches, token);
    const count = token < 0 ? found.length : entry.active[token];
    title.textContent = `${nameOf(token)}: ${plural(count, "feature")}`;
    list.replaceChildren(
      ...found.slice(0, 40).map(({ feature, act, share }) => {
        // of a picture of one's own also above 1, or of no peak
        const node = el(
          "a",
          {
            href: `#/feature/${feature}${Site.about.live && picture.row >= 0 ? `?on=${picture.row}` : ""}`,
            class: feature === resting ? "lit" : null,
          },
          nameCell(feature),
          el(
            "span",
            { class: "track", "aria-hidden": "true" },
            el("span", { style: { width: `${100 * Math.min(1, share)}%` } }),
          ),
          el(
            "span",
            { class: "value" },
            number(act),
            el("small", {}, Number.isFinite(share) ? ` ${percent(share)} of peak` : " never active before"),
          ),
        );
        for (const event of ["pointerenter", "focus"]) node.addEventListener(event, () => warm(feature));
        for (const event of ["pointerleave", "blur"]) node.addEventListener(event, () => warm(resting));
        return el("li", {}, node);
      }),
      found.length > 40 ? el("li", { class: "soft" }, `and ${found.length - 40} weaker ones, in the download`) : "",
      count > found.length ? el("li", { class: "soft" }, `The strongest ${stored} of each token are stored.`) : "",
    );
    for (const button of buttons) button.classList.toggle("now", +button.dataset.token === token);
  }
  function pin(token) {
    pinned = pinned === token ? -1 : token;
    for (const button of buttons) button.setAttribute("aria-pressed", +button.dataset.token === pinned);
    show(pinned);
    say(title.textContent);
    if (address) {
      const query = new URLSearchParams();
      if (pinned >= 0) query.set("token", pinned);
      if (resting >= 0) query.set("feature", resting);
      history.replaceState(null, "", `${address}${query.size ? `?${query}` : ""}`);
    }
  }
  const button = (token, text) =>
    el(
      "button",
      {
        type: "button",
        "data-token": token,
        "aria-pressed": "false",
        tabindex: token === prefix || token < prefix ? "0" : "-1",
        "aria-label": nameOf(token),
        onclick: () => pin(token),
        onpointerenter: (event) => {
          if (event.pointerType === "mouse") show(token);
        },
        onpointerleave: (event) => {
          if (event.pointerType === "mouse") show(pinned);
        },
        onfocus: () => {
          if (pinned < 0) show(token);
        },
        onblur: () => show(pinned),
      },
      text,
    );
  const before = Array.from({ length: Math.min(prefix, tokens) }, (_, token) => button(token, nameOf(token)));
  const cells = Array.from({ length: high * wide }, (_, patch) => button(prefix + patch, ""));
  const buttons = [...before, ...cells];
  const grid = el(
    "div",
    {
      class: "patches",
      role: "group",
      "aria-label": "Patches; arrow keys walk from patch to patch, Enter keeps one, Escape lets go",
      style: { "--wide": wide, "--high": high },
      onkeydown: (event) => {
        if (event.key === "Escape") {
          if (pinned >= 0) pin(pinned);
          return;
        }
        const at = cells.indexOf(event.target);
        const [row, column] = [Math.floor(at / wide), at % wide];
        const to = {
          ArrowRight: [row, column + 1],
          ArrowLeft: [row, column - 1],
          ArrowDown: [row + 1, column],
          ArrowUp: [row - 1, column],
        }[event.key];
        if (at < 0 || !to) return;
        event.preventDefault();
        if (to[0] < 0 || to[0] >= high || to[1] < 0 || to[1] >= wide) return;
        cells[at].tabIndex = -1;
        const next = cells[to[0] * wide + to[1]];
        next.tabIndex = 0;
        next.focus();
      },
    },
    cells,
  );
  const rows = () =>
    Array.from({ length: tokens }, (_, token) =>
      firing(patches, token).map(({ feature, act }) => ({
        token,
        place: nameOf(token),
        feature,
        name: Site.featureName(feature),
        activation: act,
        peak: Site.features.peak[feature],
      })),
    ).flat();
  warm(resting);
  const first = params.get("token") === null ? -1 : Number(params.get("token"));
  if (Number.isInteger(first) && first >= 0 && first < tokens) pin(first);
  else show(-1);
  return [
    el(
      "section",
      { class: "card view" },
      el(
        "div",
        { class: "stage" },
        el("img", { src: picture.thumb, alt: `${picture.name}, as the model saw it` }),
        layer,
        grid,
      ),
      before.length ? el("div", { class: "row-of tokens" }, before) : null,
      note(
        resting >= 0 ? ["Shown: where ", featureLink(resting), " fires. "] : null,
        "Point at a patch, or tap it, for the features that fire there; at a feature for where it fires.",
      ),
    ),
    el(
      "section",
      { class: "card fires" },
      el(
        "div",
        { class: "heading" },
        title,
        downloads(`features-of-${picture.row >= 0 ? `picture-${picture.row}` : "my-picture"}`, rows),
      ),
      list,
    ),
  ];
}
