// The frame of the page: navigation, theme, and one module a page.
import { h, icon } from "./dom.js";
import * as runs from "./runs.js";
import * as run from "./run.js";
import * as generate from "./generate.js";
import * as train from "./train.js";
import * as data from "./data.js";

const PAGES = {
  data: { page: data, label: "Data", icon: "data" },
  train: { page: train, label: "Train", icon: "train" },
  runs: { page: runs, label: "Runs", icon: "chart" },
  generate: { page: generate, label: "Generate", icon: "film" },
  run: { page: run, under: "runs" },
};

const main = document.getElementById("page");
const nav = document.getElementById("nav");
let leave = null;
let turn = 0;

for (const [name, { label, icon: shape }] of Object.entries(PAGES)) {
  if (label) nav.append(h("a", { href: `#/${name}`, "data-page": name }, icon(shape), label));
}

async function show() {
  const [name, query] = location.hash.replace(/^#\//, "").split("?");
  const entry = PAGES[name] || PAGES.runs;
  const current = entry.under || (PAGES[name] ? name : "runs");
  for (const link of nav.children) {
    if (link.dataset.page === current) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  if (leave) leave();
  leave = null;
  const mine = ++turn;
  const root = h("div");
  main.replaceChildren(root);
  window.scrollTo(0, 0);
  const cleanUp = await entry.page.render(root, new URLSearchParams(query || ""));
  if (mine === turn) leave = cleanUp;
  else if (cleanUp) cleanUp();
}

function isDark() {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

const theme = document.getElementById("theme");
function drawTheme() {
  theme.replaceChildren(icon(isDark() ? "sun" : "moon"));
}
theme.addEventListener("click", () => {
  const next = isDark() ? "light" : "dark";
  document.documentElement.dataset.theme = next;
  localStorage.setItem("theme", next);
  drawTheme();
});
drawTheme();
addEventListener("hashchange", show);
show();
