// Small helpers: elements, calls of the server, and formats. Texts are always set as text, never as HTML.

export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name in element && name !== "list" && name !== "form") element[name] = value;
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

const SHAPES = {
  chart: "M4 19V5M4 19h16M8 15l4-5 3 3 5-7",
  film: "M4 5h16v14H4zM4 9h16M4 15h16M9 5v4M15 5v4M9 15v4M15 15v4",
  train: "M5 18l5-6 4 3 5-9M19 6h-4M19 6v4",
  data: "M4 6h7v5H4zM13 6h7v5h-7zM4 13h7v5H4zM13 13h7v5h-7z",
  sun: "M12 8a4 4 0 1 0 0 8 4 4 0 0 0 0-8M12 2v3M12 19v3M2 12h3M19 12h3M5 5l2 2M17 17l2 2M19 5l-2 2M7 17l-2 2",
  moon: "M20 14.5A8 8 0 0 1 9.5 4 8 8 0 1 0 20 14.5z",
  copy: "M9 9h10v10H9zM5 15V5h10",
  stop: "M7 7h10v10H7z",
  play: "M8 5v14l11-7z",
  down: "M12 4v11M7 11l5 5 5-5M5 20h14",
  dice: "M5 5h14v14H5zM9 9h.01M15 15h.01M15 9h.01M9 15h.01M12 12h.01",
};

export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("aria-hidden", "true");
  const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
  path.setAttribute("d", SHAPES[name]);
  svg.append(path);
  return svg;
}

async function answer(response) {
  const found = await response.json().catch(() => ({ error: `The server answers with ${response.status}.` }));
  if (!response.ok) throw new Error(found.error || `The server answers with ${response.status}.`);
  return found;
}

export const address = (name, given = {}) => `api/${name}?${new URLSearchParams(given)}`;
export const get = async (name, given) => answer(await fetch(address(name, given), { cache: "no-store" }));
export const post = async (name, given = {}) =>
  answer(
    await fetch(`api/${name}`, {
      method: "POST",
      headers: { "content-type": "application/json", "x-titans-video": "1" },
      body: JSON.stringify(given),
    }),
  );
export const upload = async (file) =>
  answer(
    await fetch(address("upload", { name: file.name }), { method: "POST", headers: { "x-titans-video": "1" }, body: file }),
  );

export function toast(text) {
  const shown = h("div", { className: "toast" }, String(text));
  document.getElementById("toasts").append(shown);
  setTimeout(() => shown.remove(), 7000);
}

// Call `read` now and again after each `seconds`, while the page is visible; returns a function that ends it.
export function poll(seconds, read) {
  let ended = false;
  let timer = null;
  async function turn() {
    if (!document.hidden) {
      try {
        await read();
      } catch (error) {
        if (!ended) console.info(error.message);
      }
    }
    if (!ended) timer = setTimeout(turn, seconds * 1000);
  }
  turn();
  return () => {
    ended = true;
    clearTimeout(timer);
  };
}

export function button(text, action, kind = "", shape = null) {
  const made = h("button", { type: "button", className: kind }, shape && icon(shape), text);
  made.addEventListener("click", async () => {
    made.disabled = true;
    try {
      await action();
    } catch (error) {
      toast(error.message);
    } finally {
      made.disabled = false;
    }
  });
  return made;
}

export function code(text) {
  const pre = h("pre");
  const copy = h("button", { type: "button", className: "quiet", title: "Copy", "aria-label": "Copy" }, icon("copy"));
  copy.addEventListener("click", async () => {
    await navigator.clipboard.writeText(pre.textContent);
    toast("Copied.");
  });
  const box = h("div", { className: "code" }, pre, copy);
  // A line may break between words, but not within a flag.
  box.set = (next) => pre.replaceChildren(...next.split(/(--[\w-]+)/).map((part) => (part.startsWith("--") ? h("span", {}, part) : part)));
  box.set(text);
  return box;
}

export const badge = (state) => h("span", { className: `badge ${state}` }, state);

export const number = (value, digits = 4) =>
  value === null || value === undefined ? "–" : Math.abs(value) >= 1e4 ? short(value) : String(Number(value.toPrecision(digits)));

export function short(value) {
  for (const [size, letter] of [[1e9, "G"], [1e6, "M"], [1e3, "k"]]) {
    if (Math.abs(value) >= size) return `${Number((value / size).toPrecision(3))}${letter}`;
  }
  return String(Number(value.toPrecision(3)));
}

export function duration(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  const total = Math.round(seconds);
  for (const [size, name, smaller, its] of [[86400, "d", 3600, "h"], [3600, "h", 60, "min"], [60, "min", 1, "s"]]) {
    if (total >= size) {
      const rest = Math.floor((total % size) / smaller);
      return `${Math.floor(total / size)} ${name}${rest ? ` ${rest} ${its}` : ""}`;
    }
  }
  return `${total} s`;
}

export function ago(time) {
  if (!time) return "";
  const seconds = Date.now() / 1000 - (typeof time === "number" ? time : Date.parse(time) / 1000);
  return seconds < 60 ? "just now" : `${duration(seconds).split(" ").slice(0, 2).join(" ")} ago`;
}

export function progressText(progress) {
  if (!progress) return "";
  const of = progress.total ? ` of ${progress.total}` : "";
  return `${progress.what || "step"} ${progress.done}${of}`;
}

export function bar(share) {
  const fill = h("i");
  fill.style.width = `${Math.round(100 * Math.min(1, Math.max(0, share || 0)))}%`;
  return h("div", { className: "bar", role: "progressbar", "aria-valuenow": Math.round(100 * (share || 0)) }, fill);
}

export function film(source, attributes = {}) {
  const video = h("video", { muted: true, loop: true, autoplay: true, playsInline: true, preload: "auto", ...attributes });
  video.muted = true;
  video.src = source;
  return video;
}
