// One run: its state, live curves, sample wall, settings and log; stop and resume.
import { address, ago, badge, bar, button, code, duration, film, get, h, number, poll, post, progressText, short, toast } from "./dom.js";
import { chart, chips, colour } from "./chart.js";

export async function render(root, parameters) {
  const path = parameters.get("path");
  const file = (name) => address("run/file", { run: path, name });
  const head = h("div", { className: "head" });
  const message = h("div", { className: "message", hidden: true });
  const stats = h("div", { className: "card" });
  const curveBox = h("div", { className: "card" });
  const wall = h("div", { className: "card", hidden: true });
  const about = h("div", { className: "card" });
  const log = h("pre", { className: "log" });
  const logBox = h("details", { className: "card" }, h("summary", {}, "Log"), log);
  root.append(head, h("div", { className: "stack" }, message, stats, curveBox, wall, about, logBox));
  let shown = {};
  let log10 = true;
  let curve = "loss";
  let atStep = null;

  function once(part, state, draw) {
    const text = JSON.stringify(state);
    if (shown[part] === text) return;
    shown[part] = text;
    draw();
  }

  async function resume(run) {
    const finished = run.max_steps && run.step >= run.max_steps;
    const until = finished ? prompt("This run is finished. Train until which step?", String(2 * run.max_steps)) : "";
    if (finished && !until) return;
    await post("run/resume", { run: path, max_steps: until || null });
    toast("Resuming.");
    await read();
  }

  function drawHead(run) {
    const active = run.state === "running" || run.state === "starting";
    head.replaceChildren(...[
      h("div", { className: "grow" }, h("a", { href: "#/runs", className: "small" }, "Runs"), h("h1", {}, run.path)),
      badge(run.state),
      active && button("Stop", async () => { await post("run/stop", { run: path }); toast("Stopping. A checkpoint is saved first."); }, "danger", "stop"),
      !active && run.has_checkpoint && button("Resume", () => resume(run), "main", "play"),
      run.has_weights && h("a", { className: "button", href: `#/generate?model=${encodeURIComponent(run.path)}` }, "Generate"),
    ].filter(Boolean));
  }

  function drawStats(run) {
    const items = { Step: `${run.step}${run.max_steps ? ` / ${short(run.max_steps)}` : ""}`, Loss: number(run.loss) };
    if (run.tokens_per_second) items["Tokens per second"] = short(run.tokens_per_second);
    if (run.frames_per_second) items["Frames per second"] = short(run.frames_per_second);
    if (run.state === "running") items.Left = duration(run.eta_seconds);
    else items.Changed = ago(run.changed) || "–";
    stats.replaceChildren(
      h("dl", { className: "stats" }, Object.entries(items).map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value)))),
      bar(run.max_steps ? run.step / run.max_steps : 0),
      h("p", { className: "small faint" }, run.progress ? progressText(run.progress) : run.environment?.[0]?.running || ""));
    if (run.verdict) stats.append(h("p", { className: "verdict small" }, h("b", {}, `Is it learning? ${run.verdict.state}. `), run.verdict.text));
    stats.querySelector(".bar").style.margin = ".9rem 0 .4rem";
  }

  function drawCurve(found) {
    const names = { loss: "Loss", lr: "Learning rate", grad_norm: "Gradient norm", tokens_per_second: "Speed" };
    const lines = curve === "loss"
      ? [{ name: "each step", colour: colour(0), faint: true, ...found.loss }, { name: "loss", colour: colour(0), ...found.smooth },
        { name: "held-out loss", colour: colour(1), dots: true, ...found.held_out }]
      : [{ name: names[curve], colour: colour(0), ...found[curve] }];
    curveBox.replaceChildren(
      h("div", { className: "titled" }, h("h2", {}, "Curves"),
        chips(names, curve, (value) => { curve = value; drawCurve(found); }),
        h("label", { className: "row small" }, h("input", { type: "checkbox", checked: log10, onchange: (event) => { log10 = event.target.checked; drawCurve(found); } }), "log scale")),
      chart(lines.filter((line) => line.x), { log: log10, label: names[curve] }));
  }

  function drawWall(samples) {
    wall.hidden = !samples.length;
    if (!samples.length) return;
    const follows = atStep === null;
    const films = h("div", { className: samples.some((one) => one.videos.some((video) => video.original)) ? "wall pairs" : "wall" });
    const step = h("output");
    const last = samples.length - 1;
    const slider = h("input", { type: "range", min: 0, max: last, value: last, "aria-label": "Step of the samples" });
    const set = (i) => {
      step.textContent = `step ${samples[i].step}`;
      films.replaceChildren(...samples[i].videos.map(({ prompt, file: name, original }) =>
        h("figure", { className: "shot" },
          original ? h("div", { className: "side" }, h("div", {}, film(file(name), { title: prompt }), h("small", {}, "sample")),
            h("div", {}, film(file(original), { title: `Original: ${prompt}` }), h("small", {}, "original"))) : film(file(name), { title: prompt }),
          h("figcaption", {}, prompt || "(no prompt)"))));
    };
    slider.addEventListener("input", () => {
      atStep = Number(slider.value) === last ? null : samples[slider.value].step;
      set(Number(slider.value));
    });
    const at = follows ? last : Math.max(0, samples.findIndex((one) => one.step === atStep));
    slider.value = at;
    wall.replaceChildren(h("h2", {}, "Samples"), samples.length > 1 ? h("div", { className: "slide" }, step, slider) : h("p", { className: "slide" }, step), films);
    set(at);
  }

  function drawAbout(run) {
    const rows = Object.entries(run.options);
    about.replaceChildren(
      h("h2", {}, "Settings"), run.command ? code(run.command) : null,
      h("details", {}, h("summary", {}, "Options ", h("span", { className: "faint" }, `${rows.length} differ from their defaults`)),
        h("div", { className: "scroll" }, h("table", {}, rows.map(([flag, value]) => h("tr", {}, h("td", { className: "mono" }, flag), h("td", { className: "mono" }, value)))))));
    about.querySelector("details").style.marginTop = ".7rem";
  }

  async function read() {
    const run = await get("run", { run: path });
    const { log: text, samples, options, command, error, ...rest } = run;
    once("head", [run.state, run.has_checkpoint, run.has_weights, run.step >= run.max_steps], () => drawHead(run));
    once("stats", [rest, Math.floor(Date.now() / 60000)], () => drawStats(run));
    once("wall", samples, () => drawWall(samples));
    once("about", [options, command], () => drawAbout(run));
    once("log", text, () => { logBox.hidden = !text; log.textContent = text || ""; log.scrollTop = log.scrollHeight; });
    message.hidden = !error;
    message.textContent = error || "";
    const found = await get("run/curves", { run: path });
    once("curves", [curve, found.loss?.x.length, found.loss?.x.at(-1), found.held_out?.x.length], () => drawCurve(found));
  }

  return poll(2, async () => {
    try {
      await read();
    } catch (error) {
      message.hidden = false;
      message.textContent = error.message;
    }
  });
}
