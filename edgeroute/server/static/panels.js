// The panels that show a snapshot of one model.

import { stackedBar } from "/static/charts.js";
import { byId, bytes, count, decimal, element, fillFigures, fillRows, percent, resize, seconds, setText } from "/static/format.js";

// Owners of ledger entries by kind, in the order of the bar.
const KINDS = [
  ["weights", "Weights", (owner) => owner.startsWith("weights") || owner === "stand-ins"],
  ["pages", "Paged experts, layers", (owner) => owner === "expert slots" || owner === "layer rooms"],
  ["adapters", "Adapters", (owner) => owner.startsWith("adapter slots")],
  ["kv", "KV cache", (owner) => owner === "KV cache"],
  ["compute", "Compute", (owner) => /compute|stream/.test(owner)],
  ["small", "Small model", (owner) => owner.startsWith("small model")],
  ["other", "Program and buffers", () => true],
];

export function byKind(owners) {
  const found = KINDS.map(([kind, label]) => ({ kind, label, value: 0, owners: [] }));
  for (const [owner, n] of Object.entries(owners)) {
    const small = owner.startsWith("small model");
    const at = KINDS.findIndex(([kind, , is]) => (small ? kind === "small" : is(owner)));
    found[at].value += n;
    found[at].owners.push(`${owner.replace(/^small model, /, "")} ${bytes(n)}`);
  }
  return found.filter((part) => part.value > 0);
}

export function showMemory(model) {
  byId("memory-empty").hidden = model !== null;
  byId("memory-body").hidden = model === null;
  if (model === null) { setText(byId("memory-sum"), ""); return; }
  const { budget_bytes: budget, used_bytes: used, owners } = model.memory;
  const parts = byKind(owners);
  const total = Math.max(budget, used);
  setText(byId("memory-sum"), `${bytes(used)} of ${bytes(budget)}, ${percent(used / total)}`);
  stackedBar(byId("memory-bar"), parts, total, `Memory: ${parts.map((part) => `${part.label} ${bytes(part.value)}`).join(", ")}; budget ${bytes(budget)}`);
  fillLegend(byId("memory-legend"), [
    ...parts.map((part) => [part.kind, part.label, bytes(part.value), part.owners.length > 1 ? part.owners.join(", ") : ""]),
    ["free", "Free", bytes(Math.max(0, budget - used)), ""],
  ]);
  showDisk(model);
}

// Rows are [kind, label, figure, note].
function fillLegend(list, rows) {
  const made = resize(list, rows.length, () =>
    element("li", {}, element("i", { "aria-hidden": "true" }), element("span"), element("b"), element("small")));
  rows.forEach(([kind, label, figure, note], i) => {
    const [mark, ...texts] = made[i].children;
    if (mark.dataset.kind !== kind) mark.dataset.kind = kind;
    [label, figure, note].forEach((text, j) => setText(texts[j], text));
  });
}

// The tier below: what is paged, and how much of it is in memory now.
function showDisk(model) {
  const { experts, layers } = model;
  const paged = experts !== null && experts.n_slots > 0;
  byId("disk").hidden = !paged && layers === null;
  if (paged) {
    const size = experts.slots_bytes / experts.n_slots;
    const away = Math.max(0, experts.n_pages - experts.n_slots);
    showTier([experts.n_slots, away], [["In memory", bytes(experts.slots_bytes), `${count(experts.n_slots)} of ${count(experts.n_pages)} experts`],
      ["On disk, read when needed", bytes(away * size), `${count(away)} experts`]]);
  } else if (layers !== null) {
    showTier([layers.resident, layers.streamed], [["In memory", `${count(layers.resident)} layers`, "the head counts as one"],
      ["On disk, read at every step", `${count(layers.streamed)} layers`, ""]]);
  }
}

function showTier(shares, rows) {
  const kinds = ["pages", "disk"];
  const words = rows.map(([label, figure]) => `${label} ${figure}`).join(", ");
  stackedBar(byId("disk-bar"), kinds.map((kind, i) => ({ kind, label: rows[i][0], value: shares[i] })), shares[0] + shares[1], words);
  fillLegend(byId("disk-legend"), rows.map((row, i) => [kinds[i], ...row]));
}

export function showFleet(server) {
  const models = modelsOf(server);
  byId("fleet").hidden = models.length === 0;
  setText(byId("fleet-sum"), `All models: ${bytes(server.used_bytes ?? NaN)} of ${bytes(server.budget_bytes ?? NaN)}`);
  fillRows(byId("fleet-rows"), models.map((each) => [
    each.name, `${each.state ?? "–"}${each.failed ? ", could not be opened" : ""}`, each.n_bytes ? bytes(each.n_bytes) : "–", String(each.n_busy ?? 0),
  ]), ["", "", "n", "n"]);
}

// The overview's models as a list with names, whether it is a list or an object by name.
export function modelsOf(server) {
  const models = server?.models ?? [];
  const list = Array.isArray(models) ? models : Object.entries(models).map(([name, each]) => ({ name, ...each }));
  return list.map((each) => ({ ...each, n_bytes: each.n_bytes ?? each.bytes, n_busy: each.n_busy ?? each.busy ?? each.running }));
}

export function showNow(snapshot, model, rates) {
  setText(byId("now-speed"), model === null ? "–" : decimal(rates.speed ?? 0));
  setText(byId("now-running"), model === null ? count(snapshot.requests) : count(model.running));
  setText(byId("now-waiting"), model === null ? "" : `${count(model.waiting)} waiting`);
  setText(byId("now-memory"), bytes(model?.memory.used_bytes ?? snapshot.server.used_bytes ?? 0));
  setText(byId("now-budget"), `of ${bytes(model?.memory.budget_bytes ?? snapshot.server.budget_bytes ?? NaN)}`);
  setText(byId("now-kv"), model === null ? "–" : count(model.kv.cells - model.kv.free));
  setText(byId("now-kept"), model === null ? "" : `of ${count(model.kv.cells)}, ${count(model.kv.kept)} kept`);
  const hits = model?.experts ?? null;
  setText(byId("now-hits"), hits === null ? "–" : percent(hits.hit_ratio_now ?? hits.hit_ratio ?? NaN));
  setText(byId("now-hits-all"), hits === null ? (model === null ? "" : "nothing is paged") : `${percent(hits.hit_ratio ?? NaN)} in all`);
  setText(byId("now-steps"), model === null ? "–" : count(model.decode_steps));
  setText(byId("now-threads"), model === null ? "" : `${model.threads} of ${model.threads_max} threads`);
}

export function showExpertFigures(experts) {
  if (experts === null) return;
  fillFigures(byId("heat-figures"), [
    ["hits", count(experts.hits)], ["late", count(experts.late)], ["misses", count(experts.misses)],
    ["read on demand", bytes(experts.demand_bytes)], ["read ahead", bytes(experts.prefetch_bytes)],
    ["waited", seconds(experts.stall_s)], ["policy", experts.policy], ["prefetch", experts.prefetch],
  ]);
}

export function showLevers(model) {
  showAdapters(model);
  showSteps(model);
  showDepth(model);
  showDrafts(model);
}

function words(host, text) {
  if (host.dataset.shows === "words" && host.textContent === text) return;
  host.dataset.shows = "words";
  host.replaceChildren(element("p", { class: "empty" }, text));
}

// Gives a lever's place its own elements, made once.
function body(host, what, make) {
  if (host.dataset.shows !== what) {
    host.dataset.shows = what;
    host.replaceChildren(...make());
  }
  return host.children;
}

function showAdapters(model) {
  const host = byId("lever-adapters");
  if (model === null) { words(host, "No model is open yet."); return; }
  if (model.adapters === null) { words(host, "This model has no adapters."); return; }
  const [figures, list] = body(host, "adapters", () => [element("dl", { class: "figures" }), element("ul", { class: "bars" })]);
  const { known, n_resident: nResident, resident, hit_ratio: ratio, load_s: load } = model.adapters;
  fillFigures(figures, [["in memory", `${nResident} of ${known}`], ["found there", percent(ratio)], ["loading took", seconds(load)]]);
  const names = new Set([...resident, ...Object.keys(model.answers)]);
  const most = Math.max(1, ...Object.values(model.answers));
  const rows = [...names].map((name) => [name, model.answers[name] ?? 0, resident.includes(name)])
    .sort((a, b) => b[1] - a[1] || a[0].localeCompare(b[0])).slice(0, 12);
  fillBars(list, rows.map(([name, n, here]) => ({
    label: name === "none" ? "without one" : name, note: here ? "in memory" : name === "none" ? "" : "on disk",
    figure: `${n} answer${n === 1 ? "" : "s"}`, share: n / most, kind: here ? "adapters" : "free",
  })));
}

function fillBars(list, rows) {
  const made = resize(list, rows.length, () => element("li", {}, element("span"), element("small"), element("b"), element("i", { "aria-hidden": "true" })));
  rows.forEach((row, i) => {
    const [label, note, figure, bar] = made[i].children;
    setText(label, row.label);
    setText(note, row.note);
    setText(figure, row.figure);
    bar.dataset.kind = row.kind;
    bar.style.width = `${Math.max(0.5, 100 * row.share).toFixed(1)}%`;
  });
}

function showSteps(model) {
  const host = byId("lever-steps");
  if (model === null) { words(host, "No model is open yet."); return; }
  const steps = model.steps;
  if (steps === null) { words(host, "One model writes alone: no second one is configured."); return; }
  const [text, bar, list] = body(host, "steps", () => [element("p"), element("div", { class: "stack", role: "img" }), element("ul", { class: "bars" })]);
  setText(text, steps.on ? `Policy ${steps.policy}` : `Off${steps.why ? `: ${steps.why}` : ": one model writes all steps"}`);
  const wrote = model.tokens_by;
  const total = Object.values(wrote).reduce((sum, n) => sum + n, 0);
  const rows = ["small", "large"].map((who) => ({ who, wrote: wrote[who] ?? 0, read: steps.read?.[who] ?? 0 }));
  bar.hidden = total === 0;
  stackedBar(bar, rows.map((row) => ({ kind: row.who, label: `${row.who} ${row.wrote}`, value: row.wrote, letter: row.who[0].toUpperCase() })),
    total, `Tokens written: small ${rows[0].wrote}, large ${rows[1].wrote}`);
  const most = Math.max(1, ...rows.map((row) => row.read));
  fillBars(list, rows.map((row) => ({
    label: row.who, note: `wrote ${count(row.wrote)} tokens`, figure: `read ${count(row.read)}`, share: row.read / most, kind: row.who,
  })));
}

function showDepth(model) {
  const host = byId("lever-depth");
  if (model === null) { words(host, "No model is open yet."); return; }
  const depth = model.depth;
  const streamed = model.layers;
  if (depth === null && streamed === null) { words(host, "All layers run, and all are in memory."); return; }
  const [figures] = body(host, "depth", () => [element("dl", { class: "figures" })]);
  const pairs = [];
  if (depth !== null) {
    pairs.push(["plan", depth.on ? depth.plan : `off: ${depth.reason ?? depth.plan}`]);
    if (depth.layers_total) pairs.push(["layers run", `${decimalOr(depth.layers_run)} of ${depth.layers_total}`]);
    if (Number.isFinite(depth.compute)) pairs.push(["of the work", percent(depth.compute)]);
  }
  if (streamed !== null) {
    pairs.push(["in memory", `${streamed.resident} of ${streamed.resident + streamed.streamed}`], ["read", bytes(streamed.bytes)], ["waited", seconds(streamed.stall_s)]);
  }
  fillFigures(figures, pairs);
}

function decimalOr(n) {
  if (!Number.isFinite(n)) return "–";
  return Number.isInteger(n) ? String(n) : n.toFixed(1);
}

function showDrafts(model) {
  const host = byId("lever-drafts");
  if (model === null) { words(host, "No model is open yet."); return; }
  const drafts = model.speculation;
  if (drafts === null || (!drafts.on && !drafts.drafted)) { words(host, drafts?.why ? `Off: ${drafts.why}.` : "Off."); return; }
  const [figures] = body(host, "drafts", () => [element("dl", { class: "figures" })]);
  fillFigures(figures, [
    ["drafted by", drafts.source ?? "–"], ["accepted", `${count(drafts.accepted)} of ${count(drafts.drafted)}`],
    ["tokens per pass", decimal(drafts.tokens_per_pass ?? NaN)],
  ]);
}

export function statusWords(status) {
  if (status === null) return "running";
  if (status === 499) return "499 left";
  return status < 400 ? `${status} done` : `${status} refused`;
}

export function showRequests(rows) {
  byId("requests-empty").hidden = rows.length > 0;
  byId("requests-body").hidden = rows.length === 0;
  setText(byId("requests-sum"), rows.length ? `newest ${rows.length}` : "");
  fillRows(byId("requests-rows"), rows.map((row) => [
    String(row.n), statusWords(row.status), row.endpoint, row.adapter ? `${row.model}:${row.adapter}` : row.model,
    row.ttft_s === null ? "–" : seconds(row.ttft_s), count(row.n_prompt), row.n_cached === null ? "–" : count(row.n_cached), count(row.n_generated),
    row.tok_s === null ? "–" : decimal(row.tok_s), row.hit_ratio === null ? "–" : percent(row.hit_ratio),
    row.steps === null ? "–" : Object.entries(row.steps).map(([who, n]) => `${who} ${n}`).join(", "),
    row.layers === null ? "–" : `${decimalOr(row.layers[0])} of ${row.layers[1]}`,
  ]), ["n", "", "", "", "n", "n", "n", "n", "n", "n", "", "n"]);
}
