// Which experts are in memory: a row per layer, a column per expert, darker the longer it stayed.

import { byId, fillRows, percent, setText } from "/static/format.js";

const AGES = [0, 3, 15, 60]; // seconds in memory from which a cell is a shade stronger
const MINUTE_S = 60;
const LEFT = 26; // room for the layers' numbers
const DIGIT_BITS = new Map([..."0123456789abcdef"].map((digit, i) => [digit, i]));

// Bits of a bitmap in hexadecimal digits, expert 0 first.
export function bitsOf(hex, n) {
  const bits = new Uint8Array(n);
  for (let i = 0; i < n; i += 1) {
    const digit = DIGIT_BITS.get(hex[hex.length - 1 - (i >> 2)]) ?? 0;
    bits[i] = (digit >> (i & 3)) & 1;
  }
  return bits;
}

// What one model's experts did since the page looks.
export class Residency {
  constructor() { this.clear(); }

  clear() {
    this.nExpert = 0;
    this.layers = new Map(); // il -> { bits, since: seconds per expert, moves: [at, came, left] }
    this.streamed = null;
  }

  update(told, now) {
    const experts = told?.experts ?? null;
    this.streamed = told?.layers ?? null;
    if (experts === null) { this.layers.clear(); this.nExpert = 0; return; }
    if (experts.n_expert !== this.nExpert) { this.layers.clear(); this.nExpert = experts.n_expert; }
    for (const [il, hex] of experts.layers) this.updateLayer(il, bitsOf(hex, this.nExpert), now);
  }

  updateLayer(il, bits, now) {
    const known = this.layers.get(il);
    if (known === undefined) {
      this.layers.set(il, { bits, since: new Float64Array(this.nExpert).fill(now - AGES[1]), moves: [] });
      return;
    }
    let came = 0;
    let left = 0;
    for (let i = 0; i < bits.length; i += 1) {
      if (bits[i] === known.bits[i]) continue;
      if (bits[i]) { came += 1; known.since[i] = now; } else left += 1;
    }
    known.bits = bits;
    if (came || left) known.moves.push([now, came, left]);
    while (known.moves.length && known.moves[0][0] < now - MINUTE_S) known.moves.shift();
  }

  nResident(layer) { return layer.bits.reduce((sum, bit) => sum + bit, 0); }

  // Experts of all layers: in memory, and all there are.
  totals() {
    let resident = 0;
    for (const layer of this.layers.values()) resident += this.nResident(layer);
    return { resident, all: this.layers.size * this.nExpert };
  }

  moved(layer, now) {
    const recent = layer.moves.filter((move) => move[0] >= now - MINUTE_S);
    return [1, 2].map((i) => recent.reduce((sum, move) => sum + move[i], 0));
  }
}

export class HeatMap {
  constructor() {
    this.canvas = byId("heat-map");
    this.spot = byId("heat-spot");
    this.residency = null;
    this.now = 0;
    this.drawKey();
    this.canvas.addEventListener("pointermove", (event) => this.point(event));
    this.canvas.addEventListener("pointerleave", () => setText(this.spot, ""));
    new ResizeObserver(() => this.draw()).observe(byId("heat"));
    byId("heat-details").addEventListener("toggle", () => this.fillTable());
  }

  drawKey() {
    const words = ["on disk", `under ${AGES[1]} s`, `${AGES[1]} s +`, `${AGES[2]} s +`, "1 min +"];
    byId("heat-key").append("Seen in memory for: ", ...words.map((word, i) => {
      const each = document.createElement("span");
      each.className = `shade shade-${i}`;
      each.textContent = word;
      return each;
    }));
  }

  show(residency, now, state) {
    this.residency = residency;
    this.now = now;
    const paged = residency !== null && residency.layers.size > 0;
    byId("heat-body").hidden = !paged;
    byId("heat-empty").hidden = paged;
    setText(byId("heat-empty"), emptyWords(residency, state));
    if (!paged) { setText(byId("heat-sum"), ""); return; }
    const { resident, all } = residency.totals();
    setText(byId("heat-sum"), `${resident} of ${all}, ${percent(resident / all)}`);
    this.canvas.setAttribute("aria-label", `Experts in memory: ${resident} of ${all} in ` +
      `${residency.layers.size} layers of ${residency.nExpert}. A table of them follows.`);
    this.draw();
    this.fillTable();
  }

  // Pixels of the device per cell, and where the cells begin.
  measure() {
    const scale = window.devicePixelRatio || 1;
    const width = Math.floor(byId("heat").clientWidth * scale);
    const left = Math.round(LEFT * scale);
    const cell = Math.max(1, (width - left) / Math.max(1, this.residency.nExpert));
    const row = Math.round(Math.min(16 * scale, Math.max(5 * scale, Math.min(cell, 12 * scale))));
    return { scale, width, left, cell, row };
  }

  draw() {
    const residency = this.residency;
    if (residency === null || !residency.layers.size || byId("heat-body").hidden) return;
    const { scale, width, left, cell, row } = this.measure();
    const rows = [...residency.layers.entries()].sort((a, b) => a[0] - b[0]);
    const height = row * rows.length;
    const { canvas } = this;
    if (canvas.width !== width || canvas.height !== height) {
      canvas.width = width;
      canvas.height = height;
      canvas.style.height = `${height / scale}px`;
    }
    const style = getComputedStyle(canvas);
    const shades = [0, 1, 2, 3, 4].map((i) => style.getPropertyValue(`--heat-${i}`));
    const draw = canvas.getContext("2d");
    draw.clearRect(0, 0, width, height);
    draw.font = `${Math.round(10 * scale)}px ${style.fontFamily}`;
    draw.textBaseline = "middle";
    draw.textAlign = "right";
    const gap = cell >= 4 * scale ? Math.max(1, Math.round(scale)) : 0;
    const labelled = Math.max(1, Math.ceil(12 * scale / row));
    rows.forEach(([il, layer], y) => {
      if (y % labelled === 0) {
        draw.fillStyle = style.color;
        draw.fillText(String(il), left - 6 * scale, Math.max(6 * scale, y * row + row / 2));
      }
      for (let i = 0; i < residency.nExpert; i += 1) {
        const age = this.now - layer.since[i];
        const shade = layer.bits[i] ? AGES.filter((from) => age >= from).length : 0;
        const x = left + Math.round(i * cell);
        draw.fillStyle = shades[layer.bits[i] ? Math.max(1, shade) : 0];
        draw.fillRect(x, y * row, Math.max(1, left + Math.round((i + 1) * cell) - x - gap), row - Math.min(gap || 1, row - 1));
      }
    });
  }

  point(event) {
    const { scale, left, cell, row } = this.measure();
    const box = this.canvas.getBoundingClientRect();
    const expert = Math.floor(((event.clientX - box.left) * scale - left) / cell);
    const y = Math.floor((event.clientY - box.top) * scale / row);
    const rows = [...this.residency.layers.entries()].sort((a, b) => a[0] - b[0]);
    const found = rows[y];
    if (found === undefined || expert < 0 || expert >= this.residency.nExpert) {
      setText(this.spot, "");
      return;
    }
    const [il, layer] = found;
    const age = Math.round(this.now - layer.since[expert]);
    const where = layer.bits[expert] ? `seen in memory for ${age >= MINUTE_S ? "a minute or more" : `${age} s`}` : "on disk";
    setText(this.spot, `layer ${il}, expert ${expert}: ${where}`);
  }

  fillTable() {
    if (!byId("heat-details").open || this.residency === null) return;
    const rows = [...this.residency.layers.entries()].sort((a, b) => a[0] - b[0]);
    fillRows(byId("heat-rows"), rows.map(([il, layer]) => {
      const [came, left] = this.residency.moved(layer, this.now);
      return [String(il), `${this.residency.nResident(layer)} of ${this.residency.nExpert}`, String(came), String(left)];
    }), ["", "n", "n", "n"]);
  }
}

function emptyWords(residency, state) {
  if (state === "none") return "No model is open yet.";
  const streamed = residency?.streamed ?? null;
  if (streamed !== null) {
    return `This model has no experts, or they all stay. It does not fit as a whole: ` +
      `${streamed.streamed.length} of its parts (layers, and the head as one more) are streamed from disk at every step, ` +
      `${streamed.resident.length} stay in memory.`;
  }
  return "Nothing is paged: all weights of this model are in memory.";
}
