// A line chart as SVG: several lines over steps, with a crosshair, and a logarithmic scale if it is wanted.
import { h, number, short } from "./dom.js";

const NS = "http://www.w3.org/2000/svg";
const LEFT = 56, RIGHT = 10, TOP = 10, BOTTOM = 26;

function draw(tag, attributes, text) {
  const element = document.createElementNS(NS, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text !== undefined) element.textContent = text;
  return element;
}

function nice(low, high, count) {
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((n) => n * power).find((n) => n >= rough * 0.999);
  const ticks = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high * (1 + 1e-12); i++) ticks.push(Number((i * step).toPrecision(12)));
  return ticks;
}

function decades(low, high) {
  const ticks = [];
  for (let power = Math.floor(Math.log10(low)); 10 ** power <= high; power++) {
    for (const n of [1, 2, 5]) if (n * 10 ** power >= low && n * 10 ** power <= high) ticks.push(Number((n * 10 ** power).toPrecision(3)));
  }
  return ticks.length > 1 ? ticks : nice(low, high, 4);
}

// lines: [{name, x, y, colour, faint, dots}]; log: whether the values' axis is logarithmic where they allow it.
export function chart(lines, { log = false, label = "chart" } = {}) {
  const box = h("div", { className: "chart" });
  const tip = h("div", { className: "tip", hidden: true });
  const drawn = lines.filter((line) => line.x.length);
  if (!drawn.length) return h("div", { className: "empty small" }, "No values yet.");

  function paint() {
    const width = Math.max(box.clientWidth, 280);
    const height = width < 500 ? 220 : 280;
    const svg = draw("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label });
    svg.style.height = `${height}px`;
    const every = drawn.filter((line) => !line.faint).concat(drawn.every((line) => line.faint) ? drawn : []);
    const values = every.flatMap((line) => line.y);
    const logs = log && Math.min(...values) > 0;
    let low = Math.min(...values), high = Math.max(...values);
    const most = Math.max(...drawn.flatMap((line) => line.x[line.x.length - 1]), 1);
    if (logs) [low, high] = [low / 1.15, high * 1.15];
    else {
      const room = 0.07 * (high - low) || 0.05 * Math.abs(high) || 1;
      [low, high] = [low >= 0 ? Math.max(0, low - room) : low - room, high + room];
    }
    const scale = logs ? Math.log : (value) => value;
    const across = (x) => LEFT + (x / most) * (width - LEFT - RIGHT);
    const up = (y) => TOP + (1 - (scale(y) - scale(low)) / (scale(high) - scale(low))) * (height - TOP - BOTTOM);
    for (const tick of logs ? decades(low, high) : nice(low, high, 4)) {
      svg.append(draw("line", { class: "grid", x1: LEFT, x2: width - RIGHT, y1: up(tick), y2: up(tick) }));
      svg.append(draw("text", { x: LEFT - 8, y: up(tick) + 4, "text-anchor": "end" }, number(tick, 3)));
    }
    for (const tick of nice(0, most, width < 500 ? 3 : 7)) {
      svg.append(draw("text", { x: across(tick), y: height - 8, "text-anchor": tick ? "middle" : "start" }, tick >= 1e4 ? short(tick) : tick));
    }
    for (const line of drawn) {
      const inside = (y) => Math.min(Math.max(up(y), TOP - 2), height - BOTTOM + 2);
      const points = line.x.map((x, i) => `${across(x).toFixed(1)},${inside(line.y[i]).toFixed(1)}`);
      const style = { fill: "none", stroke: line.colour, "stroke-width": line.faint ? 1 : 1.9, "stroke-opacity": line.faint ? 0.28 : 1, "stroke-linejoin": "round" };
      svg.append(draw("polyline", { points: points.join(" "), ...style }));
      if (line.dots || line.x.length === 1) {
        for (const point of points) {
          const [x, y] = point.split(",");
          svg.append(draw("circle", { cx: x, cy: y, r: 3, fill: line.colour }));
        }
      }
    }
    const hair = draw("line", { class: "hair", y1: TOP, y2: height - BOTTOM, visibility: "hidden" });
    svg.append(hair);
    svg.addEventListener("pointermove", (event) => {
      const place = svg.getBoundingClientRect();
      const at = (((event.clientX - place.left) / place.width) * width - LEFT) / (width - LEFT - RIGHT) * most;
      const near = every.map((line) => {
        let best = 0;
        line.x.forEach((x, i) => { if (Math.abs(x - at) < Math.abs(line.x[best] - at)) best = i; });
        return { line, x: line.x[best], y: line.y[best] };
      });
      const x = near[0].x;
      hair.setAttribute("x1", across(x));
      hair.setAttribute("x2", across(x));
      hair.setAttribute("visibility", "visible");
      tip.hidden = false;
      tip.replaceChildren(h("div", { className: "faint" }, `step ${x}`), ...near.map(({ line, y }) => {
        const swatch = h("i", { className: "swatch" });
        swatch.style.cssText = `background:${line.colour};width:8px;height:8px;margin-right:.4rem`;
        return h("div", {}, swatch, `${every.length > 1 ? `${line.name} ` : ""}${number(y)}`);
      }));
      const share = (across(x) / width) * place.width;
      tip.style.left = share > place.width / 2 ? "" : `${share + 12}px`;
      tip.style.right = share > place.width / 2 ? `${place.width - share + 12}px` : "";
    });
    svg.addEventListener("pointerleave", () => {
      tip.hidden = true;
      hair.setAttribute("visibility", "hidden");
    });
    box.replaceChildren(svg, tip);
  }
  new ResizeObserver(() => requestAnimationFrame(paint)).observe(box);
  const named = drawn.filter((line) => line.name && !line.faint);
  const legend = named.length > 1 && h("div", { className: "legend" }, named.map((line) => {
    const swatch = h("i", { className: "swatch" });
    swatch.style.background = line.colour;
    return h("span", {}, swatch, line.name);
  }));
  return h("div", {}, box, legend);
}

export const colour = (i) => `var(--c${i % 7})`;

// A row of buttons of which one is pressed.
export function chips(names, chosen, choose) {
  const row = h("div", { className: "chips", role: "group" });
  for (const [value, text] of Object.entries(names)) {
    row.append(h("button", { type: "button", "aria-pressed": String(value === chosen), onclick: (event) => {
      for (const other of row.children) other.setAttribute("aria-pressed", String(other === event.target));
      choose(value);
    } }, text));
  }
  return row;
}
