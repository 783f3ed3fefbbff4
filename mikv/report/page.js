"use strict";
// Everything that comes from records is put into the document as text (textContent), never as HTML.
const content = JSON.parse(document.getElementById("content").textContent);
const SVG = "http://www.w3.org/2000/svg";
const WIDTH = 720, HEIGHT = 420, LEFT = 64, RIGHT = 12, TOP = 10, BOTTOM = 46;

function element(name, attributes = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (value !== null) node.setAttribute(key, value);
  }
  node.append(...children.filter((child) => child !== null).map((child) => (child instanceof Node ? child : String(child))));
  return node;
}

function drawn(name, attributes = {}, ...children) {
  const node = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

// ---- numbers

function number(value) {
  if (value === null || value === undefined) return "";
  if (value !== 0 && Math.abs(value) < 0.01) return value.toPrecision(2);
  return Math.abs(value) < 100 ? value.toFixed(3) : value.toPrecision(4);
}
const range = (bounds, text = number) => (bounds ? `${text(bounds[0])} to ${text(bounds[1])}` : "no interval");
const signed = (value, text) => (value > 0 ? "+" : "") + text(value);
const inPoints = (value) => (100 * value).toFixed(1);
const kilobytes = (bytes) => (bytes / 1000).toFixed(0);

/** A change from the full cache: in points where the measure is a share, else in its own unit. */
function change(measure, view) {
  if (measure.difference === undefined) return null;
  const text = view.share ? inPoints : number;
  const bounds = measure.difference_ci95;
  return {
    value: signed(measure.difference, text),
    bounds: bounds ? `${signed(bounds[0], text)} to ${signed(bounds[1], text)}` : "no interval",
    unit: view.share ? " points" : "",
  };
}

// ---- marks

const MARKS = {
  o: "M-5,0a5,5 0 1,0 10,0a5,5 0 1,0 -10,0z",
  s: "M-4.5,-4.5h9v9h-9z",
  D: "M0,-6L6,0L0,6L-6,0z",
  "^": "M0,-6L5.5,4.5H-5.5z",
  v: "M0,6L5.5,-4.5H-5.5z",
  P: "M-2,-6h4v4h4v4h-4v4h-4v-4h-4v-4h4z",
  X: "M-5,-3L-3,-5L0,-2L3,-5L5,-3L2,0L5,3L3,5L0,2L-3,5L-5,3L-2,0z",
  "*": "M0,-8L2,-2.5H8L3.2,1.2L5,7L0,3.6L-5,7L-3.2,1.2L-8,-2.5H-2z",
};
const mark = (style) => drawn("path", { class: "mark", d: MARKS[style.marker] || MARKS.o, fill: style.colour });

// ---- curves

function ticks(low, high, logarithmic) {
  if (logarithmic) {
    const found = [];
    for (let e = Math.floor(Math.log10(low)); e <= Math.ceil(Math.log10(high)); e++) found.push(10 ** e);
    return found.filter((t) => t >= low && t <= high);
  }
  const raw = (high - low) / 6, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= raw);
  const found = [];
  for (let i = Math.ceil(low / step); i * step <= high + 1e-12; i++) found.push(i * step);
  return found;
}

function limits(run, view) {
  if (view.share) return [-0.03, 1.03];
  const values = view.points.map((i) => run.points[i].measures[view.key].value);
  if (view.log) return [Math.min(...values) / 3, Math.max(...values) * 3];
  const bounds = view.points.flatMap((i) => run.points[i].measures[view.key].ci95 || []);
  const low = Math.min(...values, ...bounds), high = Math.max(...values, ...bounds), pad = 0.06 * (high - low || 1);
  return [low - pad, high + pad];
}

function describe(point, view) {
  const measure = point.measures[view.key];
  const lines = [point.label, `${view.name} ${number(measure.value)}   (95 %: ${range(measure.ci95)}, n = ${measure.n})`];
  const bytes = point.bytes === null ? "" : `, ${kilobytes(point.bytes)} kB per sample`;
  lines.push(`size ${point.size.toFixed(1)} % of the 16-bit cache${bytes}`);
  const changed = change(measure, view);
  if (changed) {
    const test = measure.mcnemar_p === null || measure.mcnemar_p === undefined ? "" : `, McNemar p = ${number(measure.mcnemar_p)}`;
    lines.push(`against full: ${changed.value}${changed.unit}   (95 %: ${changed.bounds})${test}`);
    lines.push(`got worse ${measure.lost}, got better ${measure.gained}`);
  }
  return lines.join("\n");
}

function curves(run, measure = 0) {
  const hidden = new Set();
  const tip = element("div", { class: "tip", role: "status", hidden: "" });
  const holder = element("div");
  const choice = element("select", { "aria-label": `measure of ${run.title}`, onchange: () => draw() });
  run.views.forEach((view, i) => choice.append(element("option", { value: i }, view.name)));
  choice.value = measure;
  const policies = [...new Set(run.points.map((point) => point.policy))];
  const legend = element("div", { class: "legend" });
  for (const name of policies) {
    const icon = drawn("svg", { viewBox: "-9 -9 18 18", "aria-hidden": "true" }, mark(content.style[name]));
    const button = element("button", { type: "button", "aria-pressed": "true", title: "show or hide" }, icon, name);
    button.addEventListener("click", () => {
      if (!hidden.delete(name)) hidden.add(name);
      button.setAttribute("aria-pressed", String(!hidden.has(name)));
      draw();
    });
    legend.append(button);
  }
  const figure = element("div", { class: "chart" }, element("header", {}, element("h3", {}, run.title), choice), holder, legend, tip);

  function draw() {
    tip.hidden = true;
    const view = run.views[Number(choice.value)];
    const [low, high] = limits(run, view);
    const most = 1.03 * Math.max(100, ...run.points.map((point) => point.size));
    const x = (value) => LEFT + ((WIDTH - LEFT - RIGHT) * value) / most;
    const scale = view.log ? Math.log10 : (value) => value;
    const y = (value) => {
      const inside = Math.min(high, Math.max(low, value));
      return TOP + ((HEIGHT - TOP - BOTTOM) * (scale(high) - scale(inside))) / (scale(high) - scale(low));
    };
    const svg = drawn("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "group", "aria-label": `${run.title}: ${view.name}` });
    for (const tick of ticks(low, high, view.log)) {
      svg.append(drawn("line", { class: "axis", x1: LEFT, x2: WIDTH - RIGHT, y1: y(tick), y2: y(tick) }));
      const text = view.log ? tick.toExponential(0).replace("e+", "e") : String(+tick.toPrecision(6));
      svg.append(drawn("text", { x: LEFT - 8, y: y(tick) + 4, "text-anchor": "end" }, text));
    }
    for (const tick of ticks(0, most, false)) {
      svg.append(drawn("line", { class: "axis", x1: x(tick), x2: x(tick), y1: TOP, y2: HEIGHT - BOTTOM }));
      svg.append(drawn("text", { x: x(tick), y: HEIGHT - BOTTOM + 18, "text-anchor": "middle" }, String(tick)));
    }
    const middle = TOP + (HEIGHT - TOP - BOTTOM) / 2;
    const below = { x: LEFT + (WIDTH - LEFT - RIGHT) / 2, y: HEIGHT - 8, "text-anchor": "middle" };
    svg.append(drawn("text", below, "cache size, % of the 16-bit cache (bytes counted from stored tensors)"));
    const beside = { x: 14, y: middle, "text-anchor": "middle", transform: `rotate(-90 14 ${middle})` };
    svg.append(drawn("text", beside, view.name + (view.lower ? ", lower is better" : "")));
    const at = (i) => [x(run.points[i].size), y(run.points[i].measures[view.key].value)];
    if (!hidden.size) svg.append(drawn("polyline", { class: "front", points: view.front.map((i) => at(i).join()).join(" ") }));
    const shown = view.points.filter((i) => !hidden.has(run.points[i].policy));
    for (const i of shown) {
      const bounds = run.points[i].measures[view.key].ci95;
      if (!bounds) continue;
      const colour = content.style[run.points[i].policy].colour;
      svg.append(drawn("line", { x1: at(i)[0], x2: at(i)[0], y1: y(bounds[0]), y2: y(bounds[1]), stroke: colour, "stroke-width": 1.5 }));
    }
    for (const i of shown) {
      const [px, py] = at(i);
      const point = drawn("g", { class: "point", transform: `translate(${px} ${py})`, tabindex: 0, role: "img" });
      point.setAttribute("aria-label", describe(run.points[i], view));
      point.append(drawn("circle", { r: 11, fill: "transparent" }), mark(content.style[run.points[i].policy]));
      const show = () => {
        const near = shown.filter((j) => j === i || Math.hypot(at(j)[0] - px, at(j)[1] - py) < 7);
        tip.textContent = near.map((j) => describe(run.points[j], view)).join("\n\n");
        tip.hidden = false;
        const shrunk = holder.clientWidth / WIDTH;
        const left = Math.min(px * shrunk + 14, holder.clientWidth - tip.offsetWidth);
        tip.style.left = `${Math.max(0, left)}px`;
        tip.style.top = `${holder.offsetTop + py * shrunk + 14}px`;
      };
      point.addEventListener("mouseenter", show);
      point.addEventListener("focus", show);
      for (const end of ["mouseleave", "blur"]) point.addEventListener(end, () => (tip.hidden = true));
      svg.append(point);
    }
    holder.replaceChildren(svg);
  }
  draw();
  return figure;
}

// ---- the table

/** Columns: name, whether it is text, the value to sort by, and what stands in the cell (a second line is its interval). */
function columns() {
  const main = ({ run, point }) => [point.measures[run.views[0].key], run.views[0]];
  const found = [{ name: "policy", text: true, key: ({ point }) => point.label, cell: ({ point }) => [point.label] }];
  if (content.runs.length > 1) {
    found.push({ name: "run", text: true, key: ({ run }) => run.name, cell: ({ run }) => [run.title, run.name] });
  }
  const names = [...new Set(content.runs.map((run) => run.views[0].name))];
  found.push({
    name: names.length === 1 ? names[0] : "score",
    key: (entry) => main(entry)[0].value,
    cell: (entry) => [number(main(entry)[0].value), range(main(entry)[0].ci95)],
  });
  found.push({ name: "size %", key: ({ point }) => point.size, cell: ({ point }) => [point.size.toFixed(1)] });
  found.push({
    name: "kB per sample",
    key: ({ point }) => point.bytes,
    cell: ({ point }) => [point.bytes === null ? "" : kilobytes(point.bytes)],
  });
  const against = (entry) => change(...main(entry));
  found.push({
    name: "vs full, points",
    key: (entry) => main(entry)[0].difference ?? null,
    cell: (entry) => (against(entry) ? [against(entry).value, against(entry).bounds] : [""]),
  });
  const fields = { "McNemar p": "mcnemar_p", "got worse": "lost", "got better": "gained" };
  for (const [name, field] of Object.entries(fields)) {
    const value = (entry) => main(entry)[0][field] ?? null;
    found.push({ name, key: value, cell: (entry) => [field === "mcnemar_p" ? number(value(entry)) : value(entry) ?? ""] });
  }
  const others = new Map(content.runs.flatMap((run) => run.views.slice(1)).map((view) => [view.key, view.name]));
  for (const [key, name] of others) {
    const measure = ({ run, point }) => (run.views[0].key === key ? null : point.measures[key] ?? null);
    found.push({
      name,
      key: (entry) => measure(entry)?.value ?? null,
      cell: (entry) => (measure(entry) ? [number(measure(entry).value), measure(entry).ci95 && range(measure(entry).ci95)] : [""]),
    });
  }
  return found;
}

function table() {
  const entries = content.runs.flatMap((run) => run.points.map((point) => ({ run, point })));
  const head = element("tr"), body = element("tbody");
  const fill = (rows) => body.replaceChildren(...rows.map(line));
  const all = columns();
  const line = (entry) =>
    element("tr", {}, ...all.map((column) => {
      const [text, below] = column.cell(entry);
      return element("td", { class: column.text ? "text" : null }, text, below ? element("span", { class: "soft" }, below) : null);
    }));
  for (const column of all) {
    const cell = element("th", { scope: "col", class: column.text ? "text" : null, "aria-sort": "none" });
    cell.append(element("button", { type: "button", title: "sort" }, column.name));
    cell.firstChild.addEventListener("click", () => {
      const down = cell.getAttribute("aria-sort") === "ascending";
      for (const other of head.children) other.setAttribute("aria-sort", "none");
      cell.setAttribute("aria-sort", down ? "descending" : "ascending");
      fill([...entries].sort((a, b) => compare(column.key(a), column.key(b), down)));
    });
    head.append(cell);
  }
  fill(entries);
  return element("div", { class: "wide" }, element("table", { id: "points" }, element("thead", {}, head), body));
}

/** What has no value comes last, whichever way the column is sorted. */
function compare(a, b, down) {
  if (a === null || b === null) return (a === null) - (b === null);
  const order = typeof a === "string" ? a.localeCompare(b) : a - b;
  return down ? -order : order;
}

// ---- samples that flipped

function answer(given) {
  return element("td", {}, element("pre", {}, given.text), ...given.outcomes.map((name) => element("span", { class: "flag" }, name.replaceAll("_", " "))));
}

function flipped(run) {
  if (!run.flips.length) {
    const why = run.has_samples ? "No outcome differs from the full cache's." : "The samples of this run are not here, only its summary.";
    return element("p", { class: "soft" }, why);
  }
  const body = element("tbody");
  const counts = new Map();
  for (const flip of run.flips) counts.set(flip.label, (counts.get(flip.label) || 0) + 1);
  const choice = element("select", { "aria-label": `policy of ${run.title}`, onchange: () => fill() });
  for (const [label, count] of counts) choice.append(element("option", { value: label }, `${label} (${count})`));
  const fill = () =>
    body.replaceChildren(...run.flips.filter((flip) => flip.label === choice.value).map((flip) =>
      element("tr", {},
        element("td", { class: "narrow" }, flip.sample, element("span", { class: "soft" }, `target ${flip.target}`)),
        element("td", { class: "narrow" }, element("span", { class: flip.better ? "gained" : "lost" }, flip.better ? "got better" : "got worse")),
        ...flip.answers.map(answer))));
  fill();
  const head = ["sample", "change", "full cache", "this policy"].map((name) => element("th", { scope: "col", class: "text" }, name));
  const left = run.flips_left_out ? element("p", { class: "soft" }, `${run.flips_left_out} more are in samples.jsonl.`) : null;
  return element("div", {}, choice, left, element("div", { class: "wide" },
    element("table", { class: "flips" }, element("thead", {}, element("tr", {}, ...head)), body)));
}

// ---- the page

/** A chart per run; of a single run also its divergence, which sees what a score on few samples can't. */
function charts() {
  const [run] = content.runs, second = run.views.findIndex((view, i) => i > 0 && view.key === "kl");
  if (content.runs.length > 1 || second < 0) return content.runs.map((one) => curves(one));
  return [curves(run), curves(run, second)];
}

function about(run) {
  const facts = element("dl", { class: "facts" }, ...run.facts.flatMap(([name, text]) => [element("dt", {}, name), element("dd", {}, text)]));
  const config = run.config ? element("details", {}, element("summary", {}, "configuration"), element("pre", {}, run.config)) : null;
  return element("div", {}, element("h3", {}, `${run.title}  (${run.name})`), facts, config);
}

document.getElementById("page").append(
  element("h1", {}, document.title),
  element("p", { class: "soft" },
    "A point is a policy; bars and ranges are 95 % intervals. The dashed line joins the points that no smaller cache beats. " +
    "Changes against the full cache are paired, sample by sample. Point at a mark, or reach it with the tab key, for its numbers."),
  element("div", { class: "charts" }, ...charts()),
  element("h2", {}, "All points"),
  table(),
  element("h2", {}, "Samples that flipped"),
  ...content.runs.flatMap((run) => (content.runs.length > 1 ? [element("h3", {}, run.title)] : []).concat(flipped(run))),
  element("h2", {}, "What was run"),
  ...content.runs.map(about),
);
