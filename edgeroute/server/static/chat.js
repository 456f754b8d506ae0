// The chat box: streams an answer and shows what it cost. Model output is only ever text.

import { stackedBar } from "/static/charts.js";
import { byId, count, decimal, element, fillFigures, percent, seconds, setText, svg } from "/static/format.js";
import { Refused, ask, readEvents } from "/static/stream.js";

const MOST_MESSAGES = 60; // shown; older ones leave the page, and the model's context with them

export class Chat {
  // onAsk is told the name of the model that is asked.
  constructor(onAsk) {
    this.onAsk = onAsk;
    this.log = byId("chat-log");
    this.input = byId("chat-input");
    this.model = byId("chat-model");
    this.messages = []; // { role, content }
    this.abort = null;
    byId("chat-form").addEventListener("submit", (event) => { event.preventDefault(); this.send(); });
    byId("chat-stop").addEventListener("click", () => this.abort?.abort());
    byId("chat-clear").addEventListener("click", () => this.clear());
    this.input.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); this.send(); }
      else if (event.key === "Escape") this.abort?.abort();
    });
  }

  // Reads which models and adapters may be asked.
  async refresh() {
    const { data } = await (await ask("/v1/models")).json();
    const chosen = this.model.value;
    const ids = data.map((each) => each.id);
    if (ids.join("\n") !== this.known) {
      this.known = ids.join("\n");
      this.model.replaceChildren(...data.map((each) =>
        element("option", { value: each.id, "data-model": each.edgeroute?.model ?? each.id }, each.id)));
    }
    if (ids.includes(chosen)) this.model.value = chosen;
  }

  clear() {
    this.abort?.abort();
    this.abort = null;
    this.messages = [];
    for (const each of [...this.log.querySelectorAll("article")]) each.remove();
    byId("chat-empty").hidden = false;
    setText(byId("chat-status"), "New chat");
    this.input.focus();
  }

  async send() {
    const text = this.input.value.trim();
    if (!text || this.abort !== null) return;
    const status = byId("chat-status");
    if (!this.model.value) { setText(status, "There is no model to ask: the server has not told any."); return; }
    this.input.value = "";
    this.onAsk(this.model.selectedOptions[0].dataset.model);
    byId("chat-empty").hidden = true;
    const talk = this.messages; // another one after "New chat"
    talk.push({ role: "user", content: text });
    this.add("You", "user").textContent = text;
    const answer = new Answer(this.add(this.model.value, "assistant"), this.log);
    const abort = new AbortController();
    this.abort = abort;
    this.busy(true);
    setText(status, "Waiting for the first token");
    try {
      await answer.stream(await ask("/v1/chat/completions", { body: this.body(), signal: abort.signal }),
        () => setText(status, "Answering"));
      setText(status, answer.summary());
    } catch (error) {
      if (abort.signal.aborted) {
        if (abort === this.abort) setText(status, `Stopped after ${answer.nPieces} pieces.`);
      } else {
        answer.fail(error instanceof Refused ? error.message : `the answer broke off: ${error.message}`);
        setText(status, "No whole answer came.");
      }
    } finally {
      answer.end();
      if (answer.text) talk.push({ role: "assistant", content: answer.text });
      else talk.pop();
      if (this.abort === abort || this.abort === null) {
        this.abort = null;
        this.busy(false);
      }
    }
  }

  body() {
    const number = (id) => { const value = byId(id).valueAsNumber; return Number.isFinite(value) ? value : undefined; };
    const edgeroute = { stats: true };
    for (const name of ["depth", "steps"]) {
      const value = byId(`chat-${name}`).value;
      if (value) edgeroute[name] = value;
    }
    return {
      model: this.model.value, messages: this.messages, stream: true, stream_options: { include_usage: true },
      max_tokens: number("chat-max"), temperature: number("chat-temperature"), edgeroute,
    };
  }

  add(who, role) {
    const text = element("div", { class: "text" });
    this.log.append(element("article", { class: role, "aria-label": who }, element("h3", {}, who), text));
    while (this.log.querySelectorAll("article").length > MOST_MESSAGES) this.log.querySelector("article").remove();
    if (this.messages.length > MOST_MESSAGES) this.messages.splice(0, 2);
    this.log.scrollTop = this.log.scrollHeight;
    return text;
  }

  busy(is) {
    byId("chat-send").disabled = is;
    byId("chat-stop").disabled = !is;
    this.log.setAttribute("aria-busy", String(is));
  }
}

class Answer {
  constructor(host, log) {
    Object.assign(this, { host, log, text: "", nPieces: 0, run: null, waiting: [], frame: 0, told: {}, usage: null });
    this.began = performance.now();
    this.first = null;
    this.foot = element("div", { class: "foot" });
    host.after(this.foot);
    host.classList.add("writing");
  }

  async stream(response, onFirst) {
    let failure = null;
    await readEvents(response, (_, data) => {
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) { failure = chunk.error.message ?? "an error"; return; }
      if (chunk.usage) this.usage = chunk.usage;
      if (chunk.edgeroute) Object.assign(this.told, chunk.edgeroute);
      const piece = chunk.choices?.[0]?.delta?.content;
      if (!piece) return;
      if (this.first === null) { this.first = performance.now(); onFirst(); }
      this.nPieces += 1;
      this.text += piece;
      this.waiting.push([piece, chunk.edgeroute?.model ?? null]);
      this.frame ||= requestAnimationFrame(() => this.flush());
    });
    if (failure !== null) throw new Error(failure);
  }

  // Adds what came since the last frame; a run of one writer's pieces is one element.
  flush() {
    this.frame = 0;
    const { log } = this;
    const low = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
    for (const [piece, who] of this.waiting) {
      if (this.run === null || this.run.who !== who) {
        const span = element("span", who ? { class: `by-${who}`, title: `written by the ${who} model` } : {});
        this.run = { who, node: document.createTextNode("") };
        span.append(this.run.node);
        this.host.append(span);
      }
      this.run.node.appendData(piece);
    }
    this.waiting = [];
    if (low) log.scrollTop = log.scrollHeight;
  }

  end() {
    cancelAnimationFrame(this.frame);
    this.flush();
    this.host.classList.remove("writing");
    const { id, stats } = this.told;
    if (stats) this.foot.append(...this.figures(stats));
    if (id && this.text) this.foot.append(this.thumbs(id));
    this.log.scrollTop = this.log.scrollHeight;
  }

  fail(words) {
    this.foot.append(element("p", { class: "error" }, `Error: ${words}`));
  }

  ttft() {
    return this.first === null ? NaN : (this.first - this.began) / 1000;
  }

  summary() {
    const n = this.told.stats?.n_generated ?? this.usage?.completion_tokens;
    const speed = this.told.stats?.decode_tok_s;
    return n === undefined ? "Answered." : `Answered with ${n} tokens${speed ? ` at ${decimal(speed)} per second` : ""}.`;
  }

  figures(stats) {
    const list = element("dl", { class: "figures" });
    const pairs = [
      ["tok/s", decimal(stats.decode_tok_s)], ["TTFT", seconds(stats.ttft_s)], ["seen here", seconds(this.ttft())],
      ["tokens", count(stats.n_generated)], ["prompt", count(stats.n_prompt)], ["cached", count(stats.n_cached)],
    ];
    const adapter = this.told.adapter;
    if (adapter || stats.adapters) pairs.push(["adapter", adapter ?? "none"]);
    if (stats.experts) {
      pairs.push(["expert hits", percent(stats.experts.hit_ratio)], ["waited for them", seconds(stats.experts.stall_s)]);
    }
    if (stats.depth) pairs.push(["layers run", `${stats.depth.layers_run} of ${stats.depth.layers_total}`]);
    if (stats.layers) pairs.push(["waited for layers", seconds(stats.layers.stall_s)]);
    if (stats.speculation?.on) pairs.push(["tokens per pass", decimal(stats.speculation.tokens_per_pass)]);
    fillFigures(list, pairs);
    return stats.steps?.length ? [list, ...this.steps(stats.steps)] : [list];
  }

  // One segment per step, as wide as its tokens; a letter and a pattern say who wrote it.
  steps(steps) {
    const bar = element("div", { class: "stack steps", role: "img" });
    const parts = steps.map((step) => ({
      kind: step.model, letter: step.model[0].toUpperCase(), value: step.n_tokens,
      label: `step ${step.index + 1}: ${step.model} model, ${step.n_tokens} tokens, ${seconds(step.seconds)}`,
    }));
    const total = parts.reduce((sum, part) => sum + part.value, 0);
    const by = (who) => steps.filter((step) => step.model === who);
    const words = ["small", "large"].filter((who) => by(who).length).map((who) =>
      `${who} model (${who[0].toUpperCase()}): ${by(who).length} ${by(who).length === 1 ? "step" : "steps"}, ${by(who).reduce((sum, step) => sum + step.n_tokens, 0)} tokens`).join("; ");
    stackedBar(bar, parts, total, words);
    return [bar, element("p", { class: "note" }, words)];
  }

  thumbs(id) {
    const note = element("span", { role: "status" });
    const give = async (reward, button) => {
      try {
        await ask("/v1/feedback", { body: { id, reward } });
        button.setAttribute("aria-pressed", "true");
        for (const each of box.querySelectorAll("button")) each.disabled = true;
        setText(note, "noted");
      } catch (error) {
        setText(note, error.message);
      }
    };
    const make = (label, reward) => {
      const icon = svg("svg", { viewBox: "0 0 16 16", width: 14, height: 14, "aria-hidden": "true", class: reward ? "" : "down" },
        svg("path", { d: "M2 7h2.5v7H2zM6 7l2.6-5.2c1.2 0 1.9.9 1.7 2L9.8 6H14l-.9 6.6c-.1.8-.8 1.4-1.6 1.4H6z" }));
      const button = element("button", { type: "button", "aria-pressed": "false" }, icon, label);
      button.addEventListener("click", () => give(reward, button));
      return button;
    };
    const box = element("div", { class: "thumbs", role: "group", "aria-label": "Feedback" }, make("Good", 1), make("Poor", 0), note);
    return box;
  }
}
