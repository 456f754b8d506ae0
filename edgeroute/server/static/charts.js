// Small line charts over up to five minutes, drawn as SVG.

import { element, setText, svg } from "/static/format.js";

export const WINDOW_S = 300;
const LEAST_S = 60; // what a chart covers at first
const GAP_S = 5; // points further apart are not joined
const MAX_POINTS = 2 * WINDOW_S;
const HEIGHT = 96;
const TOP = 6;
const BOTTOM = 4;

// Figures over time; null where there is none.
export class Series {
  constructor() { this.points = []; }

  push(at, value) {
    const last = this.points.at(-1);
    if (last && at <= last[0]) return;
    this.points.push([at, Number.isFinite(value) ? value : null]);
    while (this.points.length > MAX_POINTS || this.points[0][0] < at - WINDOW_S) this.points.shift();
  }

  // Seconds that a chart of it covers.
  get span() {
    const age = this.points.length ? this.points.at(-1)[0] - this.points[0][0] : 0;
    return Math.min(WINDOW_S, Math.max(LEAST_S, Math.ceil(age)));
  }

  get latest() { return this.points.at(-1)?.[1] ?? null; }

  // The newest that is not null, and the least and the most.
  range() {
    const values = this.points.map((point) => point[1]).filter((value) => value !== null);
    if (!values.length) return null;
    return { last: values.at(-1), least: Math.min(...values), most: Math.max(...values) };
  }
}

// Rounds the top of an axis up to 1, 2 or 5 times a power of ten, of a unit where there is a base.
function niceTop(most, floor, base = 1) {
  const value = Math.max(most, floor);
  const unit = base === 1 ? 1 : base ** Math.floor(Math.log(value) / Math.log(base));
  const power = unit * 10 ** Math.floor(Math.log10(value / unit));
  return power * [1, 2, 5, 10].find((step) => step * power >= value * 0.999);
}

export class LineChart {
  // what: { title, format, top (fixed) or floor (least top), base (of units), none (words without data) }
  constructor(figure, what) {
    this.what = what;
    this.series = null;
    this.width = 0;
    this.value = element("b");
    this.note = element("small");
    this.empty = element("p", { class: "empty" }, what.none);
    this.plot = svg("svg", { role: "img", height: HEIGHT, "aria-label": `${what.title}: ${what.none}` });
    this.grid = svg("path", { class: "grid" });
    this.area = svg("path", { class: "area" });
    this.line = svg("path", { class: "line" });
    this.dot = svg("circle", { class: "dot", r: 3 });
    this.plot.append(this.grid, this.area, this.line, this.dot);
    this.most = element("span");
    const axis = element("div", { class: "axis", "aria-hidden": "true" }, this.most, element("span", {}, "0"));
    this.frame = element("div", { class: "plot off" }, axis, this.plot, this.empty);
    figure.append(element("figcaption", {}, element("span", {}, what.title), this.value, this.note), this.frame);
    new ResizeObserver(() => this.draw()).observe(this.plot);
  }

  show(series) {
    this.series = series;
    this.draw();
  }

  draw() {
    const { what, series } = this;
    const range = series?.range() ?? null;
    this.empty.hidden = range !== null;
    this.frame.classList.toggle("off", range === null);
    setText(this.value, range === null ? "" : series.latest === null ? "–" : what.format(series.latest));
    setText(this.note, range === null ? "" : `${what.format(range.least)} to ${what.format(range.most)}`);
    if (range === null) {
      for (const each of [this.grid, this.area, this.line]) each.setAttribute("d", "");
      this.dot.setAttribute("visibility", "hidden");
      setText(this.most, "");
      return;
    }
    const top = what.top ?? niceTop(range.most, what.floor, what.base);
    setText(this.most, what.format(top));
    this.plot.setAttribute("aria-label", `${what.title}: now ` +
      `${series.latest === null ? "nothing" : what.format(series.latest)}, lowest ` +
      `${what.format(range.least)}, highest ${what.format(range.most)}`);
    this.trace(top);
  }

  trace(top) {
    const width = this.plot.clientWidth || 300;
    const points = this.series.points;
    const end = points.at(-1)[0];
    const { span } = this.series;
    const x = (at) => width * (1 - (end - at) / span);
    const y = (value) => TOP + (HEIGHT - TOP - BOTTOM) * (1 - Math.min(value, top) / top);
    const base = y(0);
    let line = "";
    let area = "";
    let before = null;
    const close = () => { if (before) area += `L${x(before[0]).toFixed(1)} ${base}Z`; };
    for (const point of points) {
      if (point[1] === null) continue;
      const at = `${x(point[0]).toFixed(1)} ${y(point[1]).toFixed(1)}`;
      if (before && point[0] - before[0] <= GAP_S) {
        line += `L${at}`;
        area += `L${at}`;
      } else {
        close();
        line += `M${at}`;
        area += `M${x(point[0]).toFixed(1)} ${base}L${at}`;
      }
      before = point;
    }
    close();
    this.plot.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    this.grid.setAttribute("d", [0, 0.5, 1].map((part) => `M0 ${y(part * top)}H${width}`).join(""));
    this.line.setAttribute("d", line);
    this.area.setAttribute("d", area);
    this.dot.setAttribute("visibility", before && before[0] === end ? "visible" : "hidden");
    if (before) {
      this.dot.setAttribute("cx", Math.min(width - 3, x(before[0])).toFixed(1));
      this.dot.setAttribute("cy", y(before[1]).toFixed(1));
    }
  }
}

// A bar of parts side by side: parts are { label, value, kind, note }; the rest stays empty.
export function stackedBar(host, parts, total, label) {
  const shown = parts.filter((part) => part.value > 0);
  while (host.children.length > shown.length) host.lastElementChild.remove();
  while (host.children.length < shown.length) host.append(element("span"));
  shown.forEach((part, i) => {
    const segment = host.children[i];
    if (segment.dataset.kind !== part.kind) segment.dataset.kind = part.kind;
    const width = `${(100 * part.value / Math.max(total, 1)).toFixed(2)}%`;
    if (segment.style.width !== width) segment.style.width = width;
    setText(segment, part.letter ?? "");
    segment.title = part.label;
  });
  if (host.getAttribute("aria-label") !== label) host.setAttribute("aria-label", label);
}
