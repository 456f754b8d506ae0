// Requests with the API key, server-sent events over fetch, and a connection that comes back.

import { keep, recall } from "/static/format.js";

const KEY = "edgeroute-api-key";
const LONGEST_EVENT = 4 << 20;
const SILENCE_MS = 15000; // the server's heartbeat is every 5 s
const LONGEST_PAUSE_S = 30;

export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export function apiKey() {
  return recall("sessionStorage", KEY) ?? "";
}

export function setApiKey(text) {
  keep("sessionStorage", KEY, text);
}

// Asks this server; throws Refused with the server's own words where the status is not 2xx.
export async function ask(path, { body, signal } = {}) {
  const headers = {};
  if (apiKey()) headers.Authorization = `Bearer ${apiKey()}`;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  const response = await fetch(path, {
    method: body === undefined ? "GET" : "POST", headers, signal, cache: "no-store",
    body: body === undefined ? undefined : JSON.stringify(body),
  });
  if (!response.ok) {
    let words = `the server answered ${response.status}`;
    try {
      words = (await response.json()).error?.message ?? words;
    } catch { /* not JSON: the status says enough */ }
    throw new Refused(response.status, words);
  }
  return response;
}

// Reads events until the stream ends, calling onEvent(name, data); onBytes at any sign of life.
export async function readEvents(response, onEvent, onBytes = () => {}) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      onBytes();
      rest += value.replaceAll("\r", "");
      if (rest.length > LONGEST_EVENT) throw new Error("an event is too long");
      let end = rest.indexOf("\n\n");
      while (end >= 0) {
        dispatch(rest.slice(0, end), onEvent);
        rest = rest.slice(end + 2);
        end = rest.indexOf("\n\n");
      }
    }
  } finally {
    await reader.cancel().catch(() => {});
  }
}

function dispatch(block, onEvent) {
  let name = "message";
  const data = [];
  for (const line of block.split("\n")) {
    if (line.startsWith("event:")) name = line.slice(6).trim();
    else if (line.startsWith("data:")) data.push(line.slice(5).replace(/^ /, ""));
  }
  if (data.length) onEvent(name, data.join("\n"));
}

// Keeps a stream of events open. tell(state, text) says how it is:
// waiting, live, lost (coming back by itself) or refused (needs the user).
export class Connection {
  constructor(path, onEvent, tell) {
    Object.assign(this, { path, onEvent, tell, failures: 0, timer: 0, abort: null });
  }

  // Begins, or begins anew at once, for instance with another key.
  start() {
    clearTimeout(this.timer);
    this.abort?.abort();
    const abort = new AbortController();
    this.abort = abort;
    this.run(abort).catch((error) => { if (abort === this.abort) this.lost(error); });
  }

  async run(abort) {
    this.tell("waiting", "connecting");
    let silence = 0;
    const alive = () => {
      clearTimeout(silence);
      silence = setTimeout(() => abort.abort(), SILENCE_MS);
    };
    alive();
    try {
      const response = await ask(this.path, { signal: abort.signal });
      await readEvents(response, (name, data) => {
        if (abort !== this.abort) return;
        this.failures = 0;
        this.onEvent(name, JSON.parse(data));
        this.tell("live", "live");
      }, alive);
    } finally {
      clearTimeout(silence);
    }
    throw new Error("the server ended the stream");
  }

  lost(error) {
    if (error instanceof Refused && (error.status === 401 || error.status === 403)) {
      this.tell("refused", "the server wants an API key");
      return;
    }
    const pause = Math.min(LONGEST_PAUSE_S, 2 ** this.failures) * (0.75 + Math.random() / 2);
    this.failures += 1;
    const why = error instanceof Refused ? `${error.message}; ` : "";
    this.tell("lost", `${why}no connection, next try in ${Math.ceil(pause)} s`);
    this.timer = setTimeout(() => this.start(), 1000 * pause);
  }
}
