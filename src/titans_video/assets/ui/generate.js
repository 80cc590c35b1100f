// Generate: a prompt and its settings, the video while it is made, and all earlier ones.
import { address, ago, badge, bar, button, code, film, get, h, icon, poll, post, progressText, toast } from "./dom.js";
import { debounce, dropField, formOf } from "./forms.js";

export async function render(root, parameters) {
  const { groups } = await get("generate/form");
  let models = [{ label: "Shipped model", values: {} }];
  const values = {};
  const drops = [];
  const file = (video, name) => address("generate/file", { video, name });
  const error = h("div", { className: "message", hidden: true });
  const command = code("");
  let shown = null;
  let drawn = "";  // what the player and the list show
  let listed = "";

  const explain = debounce(350, async () => {
    const found = await post("generate/explain", { values });
    command.set(found.command);
    form.wrong(found.field);
    error.hidden = !found.error;
    error.textContent = found.error || "";
  });
  const form = formOf(groups, values, explain);

  const prompt = form.boxes.get("prompt");
  const area = h("textarea", { id: "field-prompt", rows: 3, placeholder: "a blue square moving up", oninput: () => { values.prompt = area.value; if (!area.value) delete values.prompt; explain(); } });
  prompt.querySelector("input").replaceWith(area);
  prompt.set = (text) => { area.value = text ?? ""; };
  prompt.classList.add("wide");
  form.boxes.get("negative_prompt").classList.add("wide");
  for (const name of ["image", "last_image", "video"]) {
    const box = form.boxes.get(name);
    box.classList.add("wide");
    drops.push(dropField(box, (path) => { values[name] = path; box.set(path); explain(); }));
    box.querySelector("input").placeholder = "path of a file here";
  }
  const seed = form.boxes.get("seed");
  const dice = h("button", { type: "button", className: "quiet", title: "A random seed", "aria-label": "A random seed", onclick: () => {
    values.seed = String(Math.floor(Math.random() * 2 ** 31));
    seed.set(values.seed);
    explain();
  } }, icon("dice"));
  const row = h("div", { className: "row" });
  seed.querySelector("input").replaceWith(row);
  const seedInput = h("input", { id: "field-seed", type: "text", inputMode: "numeric", className: "grow", placeholder: "0", oninput: () => { values.seed = seedInput.value; explain(); } });
  seed.set = (text) => { seedInput.value = text ?? ""; };
  row.append(seedInput, dice);
  row.style.flexWrap = "nowrap";

  const model = h("select", { id: "model", onchange: () => pick(Number(model.value)) }, h("option", { value: 0 }, models[0].label));
  function pick(i) {
    for (const name of ["checkpoint", "lora", "pretrained_model"]) {
      delete values[name];
      form.boxes.get(name)?.set();
    }
    for (const [name, text] of Object.entries(models[i].values)) {
      values[name] = text;
      form.boxes.get(name)?.set(text);
    }
    explain();
  }
  // Reading the runs may take a while; the form does not wait for it.
  get("generate/models").then((found) => {
    models = found.models;
    model.replaceChildren(...models.map((one, i) => h("option", { value: i }, one.label)));
    const wanted = models.findIndex((one) => one.label === parameters.get("model"));
    if (wanted > 0) {
      model.value = wanted;
      pick(wanted);
    }
  });

  const start = button("Generate", async () => {
    try {
      const { name } = await post("generate/start", { values });
      shown = name;
      await read();
      player.scrollIntoView({ block: "nearest", behavior: "smooth" });
    } catch (failure) {
      error.hidden = false;
      error.textContent = failure.message;
    }
  }, "main", "film");

  const player = h("div", { className: "card player" });
  const history = h("div", { className: "history" });
  const left = h("div", { className: "card sticky-form" },
    h("div", { className: "field" }, h("div", { className: "name" }, h("label", { htmlFor: "model" }, "Model")), model,
      h("div", { className: "help" }, "The shipped model, or one that you trained. More are under all options: --checkpoint, --pretrained-model and --lora.")),
    form.basic, error, h("div", { className: "row" }, start), form.more);
  left.classList.add("stack");
  form.basic.classList.add("tight");
  root.append(h("div", { className: "head" }, h("h1", {}, "Generate")),
    h("div", { className: "split" }, left,
      h("div", { className: "stack" }, player, h("div", { className: "card" }, h("h2", {}, "Command"), command), h("div", { className: "card" }, h("h2", {}, "History"), history))));
  explain();

  function drawPlayer(video) {
    if (!video) {
      player.replaceChildren(h("div", { className: "stage faint" }, "Your video appears here."));
      return;
    }
    const running = video.state === "running";
    const stage = h("div", { className: "stage" });
    if (video.videos.length && !running) stage.append(...video.videos.slice(0, 1).map((name) => film(file(video.name, name), { controls: true })));
    else if (video.preview) stage.append(h("img", { alt: "Preview", src: file(video.name, "job/preview.jpg") + `&at=${video.progress?.done ?? 0}` }));
    else stage.append(h("span", { className: "faint" }, running ? "Loading the model" : "No video"));
    const tools = running
      ? [h("span", { className: "small sub grow" }, progressText(video.progress) || "Starting"), button("Stop", () => post("generate/stop", { name: video.name }), "danger", "stop")]
      : [badge(video.state), h("span", { className: "grow" }),
        ...video.videos.map((name) => h("a", { className: "button", href: file(video.name, name), download: `${video.name}-${name}` }, icon("down"), video.videos.length > 1 ? name : "Download")),
        button("Use these settings", () => { form.fill(video.values); drops.forEach((drop) => drop.clear()); model.value = String(Math.max(0, models.findIndex((one) => Object.keys(one.values).length && Object.entries(one.values).every(([k, v]) => video.values[k] === v)))); explain(); window.scrollTo({ top: 0, behavior: "smooth" }); })];
    const settings = video.settings?.command ? h("details", {}, h("summary", {}, "Settings"), code(JSON.stringify(video.settings, null, 1))) : null;
    player.replaceChildren(stage, running && video.progress ? bar(video.progress.done / video.progress.total) : "",
      h("div", { className: "row" }, ...tools), h("p", {}, video.prompt), video.error ? h("div", { className: "message" }, video.error) : "", settings || "");
    player.classList.add("stack");
    player.style.textAlign = "left";
  }

  async function read() {
    const { videos } = await get("generate/list");
    if (shown === null && videos.length) shown = videos[0].name;
    const current = videos.find((one) => one.name === shown);
    const now = JSON.stringify(current ?? null);
    if (now !== drawn) {
      drawPlayer(current && await get("generate/video", { name: shown }));
      drawn = now;
    }
    // Progress is not in the list, and a change of it must not load all videos again.
    const list = JSON.stringify([shown, videos.map(({ progress, ...rest }) => rest)]);
    if (list === listed) return;
    listed = list;
    history.replaceChildren(...videos.map((one) => h("button", { type: "button", "aria-current": one.name === shown ? "true" : null, onclick: () => { shown = one.name; read(); } },
      h("div", { className: "thumb" }, one.videos.length && one.state !== "running" ? film(file(one.name, one.videos[0])) : one.preview ? h("img", { alt: "", src: file(one.name, "job/preview.jpg") }) : badge(one.state)),
      h("p", {}, one.prompt || "(no prompt)"))));
    if (!videos.length) history.replaceChildren(h("p", { className: "small faint" }, "Your videos and their settings stay here."));
  }

  return poll(1, read);
}
