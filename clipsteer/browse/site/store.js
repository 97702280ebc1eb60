// The data: scripts under data/ call clipsteer.put(KEY, VALUE), so that the pages also open from disk, where a page may
// read no file but scripts and pictures. Scripts are added when somebody asks for their key.
"use strict";

const clipsteer = (() => {
  const arrived = new Map(); // key -> promise of the value
  const kept = new Map(); // key -> value
  const asked = new Map(); // key -> promise

  // Base64 of deflated JSON. A page from disk has no fetch, but it can inflate.
  async function inflated(text) {
    const binary = atob(text);
    const bytes = new Uint8Array(binary.length);
    for (let i = 0; i < binary.length; i++) bytes[i] = binary.charCodeAt(i);
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
    return new Response(stream).json();
  }

  function put(key, value) {
    arrived.set(key, typeof value === "string" ? inflated(value) : Promise.resolve(value));
  }

  // what has arrived, ready to be read without waiting
  async function opened(key) {
    kept.set(key, await arrived.get(key));
    return kept.get(key);
  }

  function load(key) {
    if (arrived.has(key)) return opened(key);
    if (!asked.has(key)) {
      asked.set(
        key,
        new Promise((resolve, reject) => {
          const script = document.createElement("script");
          script.src = `data/${key}.js`;
          script.onload = () => {
            script.remove();
            if (arrived.has(key)) resolve(opened(key));
            else reject(new Error(`data/${key}.js does not hold ${key}`));
          };
          script.onerror = () => {
            script.remove();
            asked.delete(key); // the next one who asks tries again
            reject(new Error(`data/${key}.js cannot be read; is the folder whole?`));
          };
          document.head.append(script);
        }),
      );
    }
    return asked.get(key);
  }

  // item number `index` of a list that is stored in pieces of `size`
  async function item(list, index, size) {
    const piece = await load(`${list}/${Math.floor(index / size)}`);
    return (piece.features || piece.images)[index % size];
  }

  // an answer of the server that runs the model; only where the site is live
  async function ask(path, body, type = "application/json") {
    const answer = await fetch(`api/${path}`, { method: "POST", body, headers: { "Content-Type": type } });
    const text = await answer.text();
    let said;
    try {
      said = JSON.parse(text);
    } catch {
      said = { error: text };
    }
    if (!answer.ok) throw new Error(said.error || `the server answered ${answer.status}`);
    return said;
  }

  return { put, load, item, ask, get: (key) => kept.get(key) };
})();

// What the pages ask of the light tables.
const Site = {
  get about() {
    return clipsteer.get("site");
  },
  get features() {
    return clipsteer.get("overview");
  },
  get pictures() {
    return clipsteer.get("pictures");
  },
  get size() {
    return this.about.sae.d_sae;
  },
  get classes() {
    return this.about.data.classes || [];
  },
  get answers() {
    return this.about.predictions?.names || [];
  },
  className(index) {
    return this.classes[index]?.replaceAll("_", " ") ?? "";
  },
  answer(index) {
    return this.answers[index]?.replaceAll("_", " ") ?? "";
  },

  // the light tables, with a number or NaN where something may not have been measured
  async open() {
    await Promise.all(["site", "overview", "pictures"].map(clipsteer.load));
    for (const key of ["density", "images", "peak", "mean", "steerability", "selectivity"]) {
      const column = this.features[key];
      if (column) this.features[key] = Float32Array.from(column, (value) => value ?? NaN);
    }
  },

  // the words for a feature: its concept in SpLiCE, the nearest word, the class of its pictures
  names(index) {
    const { concept, word, top_class } = this.features;
    const found = [concept?.[index], word?.[index], top_class ? this.className(top_class[index]) : ""];
    return [...new Set(found.filter(Boolean))];
  },
  featureName(index) {
    return this.names(index)[0] || (this.features.peak[index] > 0 ? "unnamed" : "never active");
  },

  // what is known of a picture of the data: file, truth and first prediction
  picture(row) {
    const { name, file, thumb, truth, first, p } = this.pictures;
    return {
      row,
      name: name[row] || file[row] || `picture ${row}`,
      file: file[row] || "",
      thumb: `thumbs/${encodeURIComponent(thumb[row])}.webp`,
      truth: truth[row],
      first: first[row],
      p: p[row] ?? NaN,
    };
  },
  feature(index) {
    return clipsteer.item("features", index, this.about.feature_shard);
  },
  image(row) {
    return clipsteer.item("images", row, this.about.image_shard);
  },
  compared(index) {
    return clipsteer.item("compare", index, this.about.feature_shard);
  },
};
