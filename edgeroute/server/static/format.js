// Numbers as text, and elements whose text is always text.

const SPACE = "\u00a0"; // a figure and its unit stay on one line
const NARROW = "\u202f";
const UNITS = ["B", "KiB", "MiB", "GiB", "TiB"];

export function bytes(n) {
  if (!Number.isFinite(n)) return "–";
  let unit = 0;
  while (Math.abs(n) >= 1024 && unit < UNITS.length - 1) { n /= 1024; unit += 1; }
  const digits = unit === 0 || Math.abs(n) >= 100 ? 0 : Math.abs(n) >= 10 ? 1 : 2;
  return `${n.toFixed(digits)}${SPACE}${UNITS[unit]}`;
}

export function count(n) {
  return Number.isFinite(n) ? Math.round(n).toLocaleString("en").replaceAll(",", NARROW) : "–";
}

export function decimal(n) {
  if (!Number.isFinite(n)) return "–";
  if (n === 0) return "0";
  return n.toFixed(Math.abs(n) >= 100 ? 0 : Math.abs(n) >= 10 ? 1 : 2);
}

export function percent(ratio) {
  if (!Number.isFinite(ratio)) return "–";
  const value = 100 * ratio;
  if (value === 0) return `0${SPACE}%`;
  // 99.97 % must not read as 100 %.
  const digits = value > 0 && (value < 10 || value > 99) && value !== 100 ? 1 : 0;
  const shown = Math.min(value === 100 ? 100 : 99.9, value).toFixed(digits);
  return `${shown}${SPACE}%`;
}

export function seconds(s) {
  if (!Number.isFinite(s)) return "–";
  if (s < 0.9995) return `${(1000 * s).toFixed(s < 0.01 ? 1 : 0)}${SPACE}ms`;
  if (s < 120) return `${s.toFixed(s < 10 ? 2 : 1)}${SPACE}s`;
  return `${Math.floor(s / 60)} min ${Math.round(s % 60)} s`;
}

// A browser may refuse to keep anything: then it is kept until the page is left.
const unkept = new Map();

// storage is "localStorage" or "sessionStorage".
export function recall(storage, name) {
  try {
    return window[storage].getItem(name);
  } catch {
    return unkept.get(name) ?? null;
  }
}

export function keep(storage, name, text) {
  try {
    if (text) window[storage].setItem(name, text);
    else window[storage].removeItem(name);
  } catch {
    unkept.set(name, text);
  }
}

export function byId(id) {
  const found = document.getElementById(id);
  if (found === null) throw new Error(`the page has no #${id}`);
  return found;
}

// Changes a text only where it differs: untouched nodes cost nothing, and readers hear less.
export function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined) made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

const SVG = "http://www.w3.org/2000/svg";

export function svg(tag, attributes = {}, ...children) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

// Makes a parent have exactly `n` children, made by `make` where there are too few.
export function resize(parent, n, make) {
  while (parent.children.length > n) parent.lastElementChild.remove();
  while (parent.children.length < n) parent.append(make());
  return parent.children;
}

// Fills a table's body; each row is a list of texts.
export function fillRows(body, rows, classes = []) {
  const made = resize(body, rows.length, () => element("tr"));
  rows.forEach((row, i) => {
    const cells = resize(made[i], row.length, () => element("td"));
    row.forEach((text, j) => {
      setText(cells[j], text);
      const wanted = classes[j] ?? "";
      if (cells[j].className !== wanted) cells[j].className = wanted;
    });
  });
}

// Fills a list of terms and figures.
export function fillFigures(list, pairs) {
  const made = resize(list, pairs.length, () => element("div", {}, element("dt"), element("dd")));
  pairs.forEach(([term, figure], i) => {
    setText(made[i].firstElementChild, term);
    setText(made[i].lastElementChild, figure);
  });
}
