// Addresses: #/ the features, #/feature/12, #/pictures, #/picture/3, #/compare, #/compare/12. Opened last, by the page.
"use strict";

const main = document.getElementById("main");

// A whole number below `limit` from an address, or an error that says what there is.
function numbered(text, what, limit) {
  const index = /^\d+$/.test(text) ? +text : NaN;
  if (!(index < limit)) throw new Error(`There is no ${what} ${text}: they are numbered 0 to ${limit - 1}.`);
  return index;
}

const routes = {
  "": (_, params) => overviewPage(params),
  feature: (which, params) => featurePage(numbered(which, "feature", Site.size), params),
  pictures: (_, params) => picturesPage(params),
  picture: (which, params) => picturePage(numbered(which, "picture", Site.about.data.images), params),
  own: () => ownPage(),
  compare: (which, params) =>
    which ? comparedPage(numbered(which, "feature", Site.size), params) : comparePage(params),
};

let visit = 0;

async function go() {
  const mine = ++visit;
  const [path, query] = location.hash.replace(/^#\/?/, "").split("?");
  const [page, which = ""] = path.split("/");
  let shown;
  try {
    if (!Object.hasOwn(routes, page)) throw new Error(`There is no page ${page} here.`);
    shown = await routes[page](which, new URLSearchParams(query || ""));
  } catch (error) {
    shown = {
      title: "Nothing here",
      node: el(
        "div",
        { class: "failed", role: "alert" },
        el("h1", {}, "Nothing here"),
        el("p", {}, error.message),
        el("p", {}, link("#/", "All features")),
      ),
    };
    if (!(error instanceof Error) || error instanceof TypeError || error instanceof ReferenceError)
      console.error(error);
  }
  if (mine !== visit) return; // somebody went on before this was read
  const moved = main.dataset.page !== undefined;
  main.dataset.page = page || "overview";
  main.replaceChildren(shown.node);
  document.title = `${shown.title} · ${Site.about.title}`;
  for (const item of document.querySelectorAll("#nav a")) {
    const here = item.dataset.pages.split(" ").includes(page);
    if (here) item.setAttribute("aria-current", "page");
    else item.removeAttribute("aria-current");
  }
  if (moved && page !== "") {
    window.scrollTo(0, 0);
    main.focus({ preventScroll: true });
  }
}

function chosenTheme() {
  try {
    return localStorage.getItem("theme");
  } catch {
    return null;
  }
}

function theme(name) {
  const dark = name ? name === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  document.documentElement.dataset.theme = dark ? "dark" : "light";
  const button = document.getElementById("theme");
  button.textContent = dark ? "☀" : "☾";
  button.setAttribute("aria-label", dark ? "Light colours" : "Dark colours");
  document.dispatchEvent(new Event("themechange"));
}

async function begin() {
  theme(chosenTheme());
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => theme(chosenTheme()));
  document.getElementById("theme").addEventListener("click", () => {
    const next = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
    try {
      localStorage.setItem("theme", next);
    } catch {
      /* pages from disk may have no storage */
    }
    theme(next);
  });
  document.getElementById("skip").addEventListener("click", () => {
    main.focus();
    main.scrollIntoView();
  });
  try {
    await Site.open();
  } catch {
    main.dataset.page = "missing";
    main.replaceChildren(
      el(
        "div",
        { class: "failed", role: "alert" },
        el("h1", {}, "The data are missing"),
        el(
          "p",
          {},
          "data/site.js, data/overview.js or data/pictures.js is not beside this page. ",
          "Was the folder copied whole, and has its building ended?",
        ),
      ),
    );
    return;
  }
  const { about } = Site;
  document.getElementById("title").textContent = about.title;
  document.getElementById("subtitle").textContent =
    `${plural(about.sae.d_sae, "feature")} at ${about.model.hook_point} of ${about.model.name}, ` +
    `${plural(about.data.images, "picture")} of ${about.data.name}`;
  const items = [
    ["#/", "Features", "feature "],
    ["#/pictures", "Pictures", "pictures picture"],
  ];
  if (about.compare) items.push(["#/compare", "Compare", "compare"]);
  if (about.live) items.push(["#/own", "Your picture", "own"]);
  document
    .getElementById("nav")
    .append(...items.map(([href, text, pages]) => el("a", { href, "data-pages": pages }, text)));
  document.addEventListener("keydown", (event) => {
    if (event.key !== "/" || /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) return;
    const search = document.getElementById("search");
    if (search) {
      event.preventDefault();
      search.focus();
    }
  });
  window.addEventListener("hashchange", go);
  go();
}

begin();
