// Fields from the descriptions of the options. A form only keeps what differs from the defaults.
import { address, get, h, upload, toast } from "./dom.js";

export function fieldOf(field, value, change) {
  const id = `field-${field.name}`;
  let input;
  const set = (text) => change(field.name, text);
  if (field.kind === "switch") {
    input = h("select", { id, onchange: () => set(input.value) }, h("option", { value: "on" }, "on"), h("option", { value: "off" }, "off"));
    input.value = value ?? (field.default === "on" ? "on" : "off");
  } else if (field.kind === "choice" && !field.repeatable) {
    const none = field.default === "" ? [h("option", { value: "" }, "default")] : [];
    input = h("select", { id, onchange: () => set(input.value) }, none, field.choices.map((choice) => h("option", { value: choice }, choice)));
    input.value = value ?? field.default;
  } else if (field.repeatable) {
    input = h("textarea", { id, rows: 2, placeholder: field.default || "one a line", value: value ?? "", oninput: () => set(input.value) });
  } else {
    input = h("input", { id, type: "text", spellcheck: false, autocomplete: "off", inputMode: field.kind === "number" ? "decimal" : "text",
      placeholder: field.default || (field.kind === "number" ? "default" : ""), value: value ?? "", oninput: () => set(input.value) });
  }
  const box = h("div", { className: `field${field.repeatable ? " wide" : ""}`, "data-name": field.name },
    h("div", { className: "name" }, h("label", { htmlFor: id }, field.label), h("span", { className: "flag mono" }, field.flag)),
    input, h("div", { className: "help" }, field.help));
  if (field.limits) input.title = `It must be ${field.limits}.`;
  box.set = (text) => { input.value = text ?? (field.kind === "switch" ? field.default || "off" : field.kind === "choice" ? field.default : ""); };
  return box;
}

// All fields of a command: the basic ones, and the others by group with a filter.
export function formOf(groups, values, change) {
  const boxes = new Map();
  const make = (field) => {
    const box = fieldOf(field, values[field.name], (name, text) => {
      const usual = field.kind === "switch" ? field.default || "off" : field.kind === "choice" ? field.default : "";
      if (text === usual) delete values[name];
      else values[name] = text;
      box.classList.toggle("changed", name in values);
      change();
    });
    box.classList.toggle("changed", field.name in values);
    box.words = `${field.label} ${field.flag} ${field.help}`.toLowerCase();
    boxes.set(field.name, box);
    return box;
  };
  const basic = h("div", { className: "fields" }, groups.flatMap((group) => group.fields.filter((field) => field.basic)).map(make));
  const rest = groups.map((group) => {
    const fields = group.fields.filter((field) => !field.basic).map(make);
    return fields.length ? h("div", { className: "group" }, h("h3", {}, group.title), h("p", { className: "small faint" }, group.purpose), h("div", { className: "fields" }, fields)) : null;
  }).filter(Boolean);
  const count = rest.reduce((sum, group) => sum + group.querySelectorAll(".field").length, 0);
  const filter = h("input", { type: "search", placeholder: "Find an option", "aria-label": "Find an option", oninput: () => {
    const wanted = filter.value.toLowerCase().trim();
    for (const group of rest) {
      let any = false;
      for (const box of group.querySelectorAll(".field")) {
        box.hidden = Boolean(wanted) && !box.words.includes(wanted);
        any = any || !box.hidden;
      }
      group.hidden = !any;
    }
  } });
  filter.style.marginBottom = ".6rem";
  const more = count ? h("details", { className: "more" }, h("summary", {}, "All options ", h("span", { className: "faint" }, `${count} more`)), filter, rest) : null;
  return {
    basic, more, boxes,
    wrong(name) {
      for (const [field, box] of boxes) box.classList.toggle("wrong", field === name);
      const box = boxes.get(name);
      if (more && box && more.contains(box)) more.open = true;
    },
    fill(found) {
      for (const name of Object.keys(values)) delete values[name];
      Object.assign(values, found);
      for (const [name, box] of boxes) {
        box.set(values[name]);
        box.classList.toggle("changed", name in values);
      }
    },
  };
}

// A field for a picture or clip: choose it, or drop it. `show` returns the address of a thumbnail.
export function dropField(box, put, show) {
  const picker = h("input", { type: "file", accept: "image/*,video/*", hidden: true });
  const thumb = h("img", { alt: "", hidden: true });
  const text = h("span", { className: "small faint" }, "Choose a file, or drop it here.");
  const take = async (file) => {
    if (!file) return;
    try {
      const { path } = await upload(file);
      put(path);
      text.textContent = file.name;
      thumb.hidden = !file.type.startsWith("image/");
      if (!thumb.hidden) thumb.src = URL.createObjectURL(file);
    } catch (error) {
      toast(error.message);
    }
  };
  picker.addEventListener("change", () => take(picker.files[0]));
  const area = h("div", { className: "drop" }, thumb, h("button", { type: "button", onclick: () => picker.click() }, "Choose"), text, picker);
  for (const name of ["dragover", "dragleave", "drop"]) {
    area.addEventListener(name, (event) => {
      event.preventDefault();
      area.classList.toggle("over", name === "dragover");
      if (name === "drop") take(event.dataTransfer.files[0]);
    });
  }
  area.style.marginTop = ".4rem";
  box.querySelector("input").after(area);
  return { clear() { thumb.hidden = true; text.textContent = "Choose a file, or drop it here."; } };
}

export const debounce = (milliseconds, action) => {
  let timer = null;
  return () => {
    clearTimeout(timer);
    timer = setTimeout(action, milliseconds);
  };
};
