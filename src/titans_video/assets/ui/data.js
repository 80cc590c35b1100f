// A data set: check it, see what is left out and why, and read and edit the captions beside film strips.
import { address, ago, badge, bar, button, code, get, h, poll, post, progressText, toast } from "./dom.js";
import { chips } from "./chart.js";
import { debounce, formOf } from "./forms.js";

export async function render(root, parameters) {
  const { groups, checks } = await get("data/form");
  const values = {};
  let chosen = parameters.get("check") || checks[0]?.name || null;
  let view = "rows";
  let drawn = "";
  const error = h("div", { className: "message", hidden: true });
  const command = code("");
  const result = h("div", { className: "stack" });

  const explain = debounce(350, async () => {
    if (!Object.keys(values).length) return;
    const found = await post("data/explain", { values });
    command.set(found.command);
    form.wrong(found.field);
    error.hidden = !found.error || !values.manifest;
    error.textContent = found.error || "";
  });
  const form = formOf(groups, values, explain);
  const start = button("Check", async () => {
    try {
      const { name } = await post("data/start", { values });
      chosen = name;
      drawn = "";
      await read();
    } catch (failure) {
      error.hidden = false;
      error.textContent = failure.message;
    }
  }, "main");
  const earlier = h("select", { id: "check", "aria-label": "Earlier checks", hidden: !checks.length, onchange: () => { chosen = earlier.value; drawn = ""; read(); } },
    checks.map((one) => h("option", { value: one.name }, `${one.manifest} (${ago(one.started)})`)));
  earlier.style.width = "auto";
  if (chosen) earlier.value = chosen;
  const fields = h("div", { className: "card stack" }, form.basic, form.more, error, h("details", {}, h("summary", {}, "Command"), command), h("div", { className: "row" }, start));
  root.append(h("div", { className: "head" }, h("h1", {}, "Data"), earlier), h("div", { className: "stack" }, fields, result));

  function drawResult(check) {
    const running = check.state === "running";
    const head = h("div", { className: "titled" }, h("h2", {}, check.manifest), badge(check.state === "done" ? (check.passes ? "done" : "failed") : check.state),
      running && button("Stop", () => post("data/stop", { name: check.name }), "danger", "stop"));
    if (check.state !== "done") {
      result.replaceChildren(h("div", { className: "card" }, head,
        running ? h("div", { className: "stack" }, bar(check.progress?.total ? check.progress.done / check.progress.total : 0), h("p", { className: "small sub" }, progressText(check.progress) || "Starting")) : "",
        check.error ? h("div", { className: "message" }, check.error) : ""));
      return;
    }
    const numbers = { Usable: check.usable, "Left out": check.left_out_count, Buckets: Object.keys(check.buckets).length };
    const body = h("div");
    const show = () => {
      if (view === "captions") drawCaptions(body, check);
      else if (view === "report") body.replaceChildren(h("iframe", { className: "report", title: "Data report", sandbox: "", src: address("data/file", { check: check.name, name: "report.html" }) }));
      else drawLeftOut(body, check);
    };
    result.replaceChildren(h("div", { className: "card" }, head,
      h("dl", { className: "stats" }, Object.entries(numbers).map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value)))),
      check.passes ? "" : h("p", { className: "message" }, "Training would stop: too few rows can be used.")),
      h("div", { className: "card" }, h("div", { className: "titled" }, chips({ rows: "Left out", captions: "Captions", report: "Report" }, view, (name) => { view = name; show(); })), body));
    show();
  }

  function drawLeftOut(body, check) {
    if (!check.left_out_count) {
      body.replaceChildren(h("div", { className: "empty" }, h("h2", {}, "Nothing is left out"), h("p", {}, "Training can use every row.")));
      return;
    }
    const more = check.left_out_count > check.left_out.length ? h("p", { className: "small faint" }, `The first ${check.left_out.length} rows. quarantine.jsonl has all.`) : "";
    body.replaceChildren(h("p", { className: "row small sub" }, Object.entries(check.reasons).map(([reason, n]) => h("span", {}, h("b", {}, n), ` ${reason}`))),
      h("div", { className: "scroll" }, h("table", { className: "small" },
        h("tr", {}, ["Reason", "Clip", "Why"].map((name) => h("th", {}, name))),
        check.left_out.map((row) => h("tr", {}, h("td", { className: "mono" }, row.reason),
          h("td", {}, row.video.split("/").pop(), h("div", { className: "faint" }, `line ${row.line}`)), h("td", {}, row.detail))))), more);
  }

  function drawCaptions(body, check) {
    let which = "all";
    let first = 0;
    const manifest = check.manifest;
    const base = check.values.data_root ? { manifest, root: check.values.data_root } : { manifest };
    const list = h("div", { className: "clips" });
    const pages = h("div", { className: "row" });
    const search = h("input", { type: "search", placeholder: "Find a caption or a clip", "aria-label": "Find a caption or a clip", oninput: debounce(300, () => { first = 0; load(); }) });
    search.style.maxWidth = "22rem";
    async function load() {
      try {
        const found = await get("data/captions", { ...base, which, words: search.value, first });
        list.replaceChildren(...found.rows.map((row) => clip(row, base)));
        const end = first + found.rows.length;
        pages.replaceChildren(h("span", { className: "small faint grow" }, found.total ? `${first + 1} to ${end} of ${found.total}` : "No captions match."),
          first > 0 ? button("Back", () => { first = Math.max(0, first - 50); return load(); }) : "",
          end < found.total ? button("Next", () => { first = end; return load(); }) : "");
      } catch (failure) {
        list.replaceChildren(h("div", { className: "message note" }, failure.message));
      }
    }
    body.replaceChildren(h("div", { className: "titled" }, chips({ all: "All", missing: "Missing", model: "By a model", edited: "Edited" }, which, (name) => { which = name; first = 0; load(); }), search), list, pages);
    pages.style.marginTop = "1rem";
    load();
  }

  function clip(row, base) {
    const note = h("p", { className: "small faint" }, [row.origin, row.seconds, row.writer].filter(Boolean).join(" · "));
    const text = h("textarea", { rows: 2, value: row.caption, "aria-label": `Caption of ${row.video}` });
    const save = button("Save", async () => {
      const next = await post("data/caption", { ...base, key: row.key, before: row.caption, caption: text.value });
      row.caption = next.caption;
      save.hidden = true;
      toast("Saved in the manifest.");
    }, "main");
    save.hidden = true;
    text.addEventListener("input", () => { save.hidden = text.value.trim() === row.caption; });
    return h("div", { className: "card clip" },
      h("img", { className: "filmstrip", loading: "lazy", alt: `Frames of ${row.video}`, src: address("data/strip", { ...base, key: row.key }) }),
      h("div", { className: "stack" }, h("h3", {}, row.video), text, note, save));
  }

  async function read() {
    if (!chosen) {
      result.replaceChildren(h("div", { className: "card empty" }, h("h2", {}, "No data set yet"), h("p", {}, "Name a manifest or a folder of clips, and check it. Nothing in it is changed.")));
      return;
    }
    const check = await get("data/check", { name: chosen });
    const { log, ...state } = check;
    if (JSON.stringify(state) === drawn) return;
    drawn = JSON.stringify(state);
    drawResult(check);
  }

  return poll(1.5, read);
}
