// All runs, and the curves of the chosen ones in one chart.
import { ago, badge, bar, get, h, number, poll } from "./dom.js";
import { chart, chips, colour } from "./chart.js";

const CURVES = { smooth: "Loss", held_out: "Held-out loss", lr: "Learning rate", grad_norm: "Gradient norm", tokens_per_second: "Tokens per second" };

export async function render(root) {
  let chosen = null;
  let curve = "smooth";
  let log = true;
  let drawn = "";
  const list = h("div", { className: "runs" });
  const plot = h("div", { className: "card", hidden: true });
  root.append(h("div", { className: "head" }, h("h1", {}, "Runs")), plot, list);
  plot.style.marginBottom = "1rem";

  async function compare(force) {
    const names = [...chosen];
    const found = await Promise.all(names.map((run) => get("run/curves", { run }).catch(() => ({}))));
    const lines = names.map((name, i) => ({ name, colour: colour(i), dots: curve === "held_out", ...(found[i][curve] || { x: [], y: [] }) }));
    const state = JSON.stringify([curve, log, lines.map((line) => [line.name, line.x.length, line.x.at(-1)])]);
    if (state === drawn && !force) return;
    drawn = state;
    plot.hidden = !names.length;
    plot.replaceChildren(
      h("div", { className: "titled" },
        h("h2", {}, "Compare"),
        chips(CURVES, curve, (value) => { curve = value; compare(true); }),
        h("label", { className: "row small" }, h("input", { type: "checkbox", checked: log, onchange: (event) => { log = event.target.checked; compare(true); } }), "log scale")),
      chart(lines, { log, label: `${CURVES[curve]} of the chosen runs` }));
  }

  function draw(runs) {
    if (!runs.length) {
      list.replaceChildren(h("div", { className: "card empty" }, h("h2", {}, "No runs yet"), h("p", {}, "Trainings appear here, also those that you start in a terminal.")));
      return;
    }
    list.replaceChildren(...runs.map((run) => {
      const at = [...chosen].indexOf(run.path);
      const box = h("input", { type: "checkbox", checked: at >= 0, "aria-label": `Compare ${run.path}`, onchange: (event) => {
        if (event.target.checked) chosen.add(run.path);
        else chosen.delete(run.path);
        compare(true);
        draw(runs);
      } });
      if (at >= 0) box.style.accentColor = colour(at);
      const parameters = run.parameters ? ` · ${number(run.parameters / 1e6, 3)}M parameters` : "";
      return h("div", { className: "card run" }, box,
        h("div", {}, h("a", { className: "where", href: `#/run?path=${encodeURIComponent(run.path)}` }, run.path),
          h("div", { className: "small faint" }, `${run.recipe || "run"}${parameters}`)),
        badge(run.state),
        h("div", { className: "progress" }, bar(run.max_steps ? run.step / run.max_steps : 0),
          h("div", { className: "small faint" }, `step ${run.step}${run.max_steps ? ` of ${run.max_steps}` : ""} · loss ${number(run.loss)}`)),
        h("div", { className: "small faint when" }, ago(run.changed)));
    }));
  }

  return poll(4, async () => {
    const { runs } = await get("runs");
    chosen = chosen || new Set(runs.filter((run) => run.step).slice(0, 3).map((run) => run.path));
    draw(runs);
    await compare(false);
  });
}
