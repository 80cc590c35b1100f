// Start a training: recipe, preset and fields, with the command, the YAML and the plan that they stand for.
import { button, code, get, h, post } from "./dom.js";
import { chips } from "./chart.js";
import { debounce, formOf } from "./forms.js";

export async function render(root) {
  const { recipes } = await get("train/recipes");
  let recipe = recipes[0];
  let preset = "";
  let values = {};
  let form = null;
  let shown = "command";
  let found = { command: "", yaml: "" };
  const purpose = h("p", { className: "small sub" });
  const presetField = h("select", { id: "preset", onchange: () => { preset = presetField.value; load(); } });
  const recipeField = h("select", { id: "recipe", onchange: () => { choose(recipes[recipeField.value]); load(); } },
    recipes.map((one, i) => h("option", { value: i }, one.title)));
  const box = h("div", { className: "stack" });
  const error = h("div", { className: "message", hidden: true });
  const notes = h("div", { className: "message note", hidden: true });
  const text = code("");
  const gpus = h("input", { id: "gpus", type: "text", inputMode: "numeric", placeholder: "as here", oninput: () => makePlan() });
  const memory = h("input", { id: "gpu-memory", type: "text", placeholder: "as here", oninput: () => makePlan() });
  const planBody = h("div", { className: "stack" });
  const plan = h("div", { className: "card stack", hidden: true }, h("h2", {}, "Plan"),
    h("div", { className: "fields tight" },
      h("div", { className: "field" }, h("div", { className: "name" }, h("label", { htmlFor: "gpus" }, "GPUs")), gpus),
      h("div", { className: "field" }, h("div", { className: "name" }, h("label", { htmlFor: "gpu-memory" }, "Memory of a GPU")), memory)), planBody);
  const processes = h("input", { id: "processes", type: "text", inputMode: "numeric", value: "1" });

  function choose(next) {
    recipe = next;
    preset = "";
    purpose.textContent = recipe.purpose;
    presetField.replaceChildren(h("option", { value: "" }, "none: the defaults"), ...recipe.presets.map((one) => h("option", { value: one.path }, one.label)));
  }

  function drawText() {
    text.set((shown === "command" ? found.command : found.yaml) || "# everything has its default");
  }

  async function explain() {
    found = await post("train/explain", { recipe: recipe.name, preset, values });
    drawText();
    form.wrong(found.field);
    const empty = !values.manifest && !values.metadata;
    error.hidden = !found.error || empty;
    error.textContent = found.error || "";
    if (empty) {
      form.wrong(null);
      found.notes.unshift("Name a manifest or a folder of clips.");
    }
    notes.hidden = !found.notes.length;
    notes.textContent = found.notes.join("\n");
    if (!found.error || empty) makePlan(); // a plan needs no clips
  }

  // A plan takes seconds, so one is made at a time, for the settings at its start.
  let planning = false;
  const makePlan = debounce(1200, async () => {
    if (planning) return makePlan();
    planning = true;
    const asked = JSON.stringify([recipe.name, preset, values, gpus.value, memory.value]);
    try {
      drawPlan(await post("train/plan", { recipe: recipe.name, preset, values, gpus: gpus.value, gpu_memory: memory.value }));
    } catch (failure) {
      drawPlan({ error: failure.message });
    } finally {
      planning = false;
    }
    if (asked !== JSON.stringify([recipe.name, preset, values, gpus.value, memory.value])) makePlan();
  });

  function drawPlan(made) {
    plan.hidden = false;
    planBody.replaceChildren(...(made.error ? [h("div", { className: "message note" }, made.error)] : [
      h("p", {}, h("b", {}, made.fits ? "It fits." : "It does not fit."), made.change ? ` It fits with ${made.change}.` : ""),
      h("table", { className: "small" }, made.rows.map(([name, value]) => h("tr", {}, h("td", { className: "sub" }, name), h("td", { className: "number" }, value)))),
      h("details", {}, h("summary", {}, "Details"), h("pre", { className: "log" }, made.text)),
    ]));
  }

  async function load() {
    const { groups, suggested } = await get("train/form", { recipe: recipe.name, preset });
    const kept = Object.fromEntries(["manifest", "pretrained_model"].filter((name) => values[name]).map((name) => [name, values[name]]));
    values = { ...suggested, ...kept };
    form = formOf(groups, values, debounce(350, explain));
    box.replaceChildren(form.basic, ...(form.more ? [form.more] : []));
    await explain();
  }

  const start = button("Start training", async () => {
    try {
      const { run } = await post("train/start", { recipe: recipe.name, preset, values, processes: Number(processes.value) || 1 });
      location.hash = `#/run?path=${encodeURIComponent(run)}`;
    } catch (failure) {
      error.hidden = false;
      error.textContent = failure.message;
      error.scrollIntoView({ block: "nearest" });
    }
  }, "main", "play");

  choose(recipe);
  root.append(h("div", { className: "head" }, h("h1", {}, "Train")),
    h("div", { className: "split train" },
      h("div", { className: "card stack" },
        h("div", { className: "fields" },
          h("div", { className: "field" }, h("div", { className: "name" }, h("label", { htmlFor: "recipe" }, "Recipe")), recipeField),
          h("div", { className: "field" }, h("div", { className: "name" }, h("label", { htmlFor: "preset" }, "Preset"), h("span", { className: "flag mono" }, "--config")), presetField),
          h("div", { className: "field" }, h("div", { className: "name" }, h("label", { htmlFor: "processes" }, "Processes"), h("span", { className: "flag mono" }, "accelerate launch")), processes)),
        purpose, box),
      h("div", { className: "sticky stack" },
        h("div", { className: "card stack" },
          h("div", { className: "titled" }, h("h2", {}, "What this runs"), chips({ command: "Command", yaml: "YAML" }, shown, (name) => { shown = name; drawText(); })),
          text, notes, error, h("div", { className: "row" }, start)),
        plan)));
  await load();
}
