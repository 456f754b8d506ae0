// Wires the page: theme, API key, the stream of snapshots, and the views of one model.

import { LineChart, Series } from "/static/charts.js";
import { Chat } from "/static/chat.js";
import { byId, bytes, decimal, element, keep, percent, recall, setText } from "/static/format.js";
import { HeatMap, Residency } from "/static/heat.js";
import { modelsOf, showExpertFigures, showFleet, showLevers, showMemory, showNow, showRequests } from "/static/panels.js";
import { Connection, apiKey, setApiKey } from "/static/stream.js";

const THEME = "edgeroute-theme";
const THEMES = ["system", "light", "dark"];
const MOST_MODELS = 16; // whose history is kept

const charts = {
  speed: new LineChart(byId("chart-speed"), { title: "Tokens per second", format: decimal, floor: 1, none: "No model is open." }),
  hits: new LineChart(byId("chart-hits"), { title: "Expert hit ratio", format: percent, top: 1, none: "Nothing is paged, or nothing was asked for yet." }),
  stall: new LineChart(byId("chart-stall"), { title: "Time lost waiting for weights", format: percent, floor: 0.01, none: "Nothing is paged: nothing is waited for." }),
  bytes: new LineChart(byId("chart-bytes"), { title: "Read on demand, per second", format: bytes, floor: 1024, base: 1024, none: "Nothing is read from disk." }),
};
const heat = new HeatMap();
const chat = new Chat((model) => { wanted = model; updateViews(shownNames); show(); });
const histories = new Map(); // model -> { series, residency, last }
let latest = null;
let shownNames = [];
let wanted = null; // a model to be shown once it is open
let told = ""; // what /v1/models depends on

function historyOf(name) {
  let found = histories.get(name);
  if (found === undefined) {
    if (histories.size >= MOST_MODELS) histories.delete(histories.keys().next().value);
    found = { residency: new Residency(), last: null, series: {} };
    for (const kind of Object.keys(charts)) found.series[kind] = new Series();
    histories.set(name, found);
  }
  return found;
}

// Figures per second since the snapshot before; null where counters began anew.
function ratesOf(model, before, elapsed) {
  const none = { speed: null, hits: null, stall: null, bytes: null };
  if (before === null || elapsed <= 0) return none;
  const since = (read) => {
    const [now, then] = [read(model), read(before)];
    return now === null || then === null || now < then ? null : (now - then) / elapsed;
  };
  const waited = (each) => each.experts?.stall_s ?? each.layers?.stall_s ?? null;
  const demanded = (each) => each.experts?.demand_bytes ?? each.layers?.bytes ?? null;
  return {
    speed: since((each) => each.tokens),
    hits: model.experts?.hit_ratio_now ?? null,
    stall: since(waited),
    bytes: since(demanded),
  };
}

function onSnapshot(snapshot) {
  latest = snapshot;
  for (const [name, model] of Object.entries(snapshot.models)) {
    const history = historyOf(name);
    const elapsed = history.last === null ? 0 : snapshot.clock_s - history.last.at;
    history.rates = ratesOf(model, history.last?.model ?? null, elapsed);
    for (const [kind, series] of Object.entries(history.series)) series.push(snapshot.clock_s, history.rates[kind]);
    history.last = { at: snapshot.clock_s, model };
  }
  updateViews(Object.keys(snapshot.models));
  show();
  const now = JSON.stringify([modelsOf(snapshot.server).map((each) => [each.name, each.state]),
    Object.values(snapshot.models).map((model) => model.adapters?.known ?? 0)]);
  if (now !== told) {
    told = now;
    chat.refresh().catch((error) => setText(byId("chat-status"), error.message));
  }
}

function updateViews(names) {
  const view = byId("view");
  if (shownNames.join("\n") !== names.join("\n")) {
    shownNames = names;
    const chosen = view.value;
    view.replaceChildren(...(names.length ? names.map((name) => element("option", { value: name }, name)) : [element("option", { value: "" }, "none open")]));
    if (names.includes(chosen)) view.value = chosen;
  }
  if (wanted !== null && names.includes(wanted)) {
    view.value = wanted;
    wanted = null;
  }
}

function show() {
  if (latest === null) return;
  const name = byId("view").value;
  const model = latest.models[name] ?? null;
  const history = model === null ? null : historyOf(name);
  showNow(latest, model, history?.rates ?? {});
  showMemory(model);
  showFleet(latest.server);
  showLevers(model);
  showExpertFigures(model?.experts ?? null);
  heat.show(history?.residency ?? null, latest.clock_s, model === null ? "none" : "open");
  for (const [kind, chart] of Object.entries(charts)) chart.show(history?.series[kind] ?? null);
  setText(byId("time-sum"), history === null ? "" : `the last ${history.series.speed.span} s`);
}

function onEvent(name, value) {
  if (name === "snapshot") onSnapshot(value);
  else if (name === "jobs") showRequests(value.rows);
  else if (name === "residency") {
    historyOf(value.model).residency.update(value.residency, latest?.clock_s ?? 0);
    if (byId("view").value === value.model) show();
  }
}

function tell(state, text) {
  const box = byId("connection");
  if (box.dataset.state !== state) box.dataset.state = state;
  setText(byId("connection-text"), text);
  byId("retry").hidden = state !== "lost";
  if (state === "refused") openKey(true);
}

// API key

function openKey(open) {
  byId("key-form").hidden = !open;
  byId("key-toggle").setAttribute("aria-expanded", String(open));
  if (open) byId("key").focus();
}

const connection = new Connection("/edgeroute/live", onEvent, tell);
byId("retry").addEventListener("click", () => connection.start());
byId("key-toggle").addEventListener("click", () => openKey(byId("key-form").hidden));
byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  setApiKey(byId("key").value.trim());
  openKey(false);
  byId("key-toggle").focus();
  told = "";
  connection.start();
});
byId("key-forget").addEventListener("click", () => {
  setApiKey("");
  byId("key").value = "";
  connection.start();
});
byId("key").value = apiKey();

// theme

function setTheme(theme) {
  if (theme === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  setText(byId("theme"), `Theme: ${theme}`);
  show();
}

function storedTheme() {
  const found = recall("localStorage", THEME);
  return THEMES.includes(found) ? found : "system";
}

byId("theme").addEventListener("click", () => {
  const next = THEMES[(THEMES.indexOf(storedTheme()) + 1) % THEMES.length];
  keep("localStorage", THEME, next);
  setTheme(next);
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", show);
byId("view").addEventListener("change", () => { wanted = null; show(); });

setTheme(storedTheme());
connection.start();
