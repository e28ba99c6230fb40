"use strict";
// Line charts in SVG: axes, bands, stacked areas, a readout for pointer and keys, a table of the data.

const SVG_NAMESPACE = "http://www.w3.org/2000/svg";

function element(tag, attributes = {}, ...children) {
  return filled(document.createElement(tag), attributes, children);
}

function shape(tag, attributes = {}, ...children) {
  return filled(document.createElementNS(SVG_NAMESPACE, tag), attributes, children);
}

function filled(made, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "color") made.style.setProperty("--color", `var(${value})`);
    else made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

// ---- numbers ----------------------------------------------------------------------------------

const compact = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 });
const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });

function plain(value) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1000) return whole.format(value);
  return size < 1e-3 ? value.toExponential(1) : String(Number(value.toPrecision(4)));
}

function percent(value) {
  return `${Number((100 * value).toFixed(2))}%`;
}

/** Round numbers from the one at or below `low` to the one at or above `high`. */
function ticksOf(low, high, count) {
  const raw = (high - low || Math.abs(high) || 1) / Math.max(1, count);
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map((f) => f * power).find((s) => s >= raw * 0.999);
  const ticks = [];
  for (let i = Math.floor(low / step + 1e-9); i <= Math.ceil(high / step - 1e-9); i += 1) {
    ticks.push(Number((i * step).toPrecision(12)));
  }
  return ticks.length > 1 ? ticks : [low, low + step];
}

function within(values) {
  const known = values.filter((value) => value !== null && value !== undefined);
  return known.length ? [Math.min(...known), Math.max(...known)] : null;
}

// ---- a chart ----------------------------------------------------------------------------------

/**
 * spec: title, note, x {label, format}, y {label, format, low?, high?}, series, rules, levels.
 * A series: group (an entry of the legend), color, x, y, and low + high of a band or area;
 * kind "line" | "thin" | "dots" | "band" | "area". rules: vertical {x, label}; levels: {y, label}.
 */
class Chart {
  constructor(host, spec) {
    this.spec = spec;
    this.hidden = new Set();
    this.plot = element("div", {
      class: "plot", tabindex: "0", role: "group",
      "aria-label": `${spec.title}. Arrow keys read the values.`,
    });
    this.tip = element("div", { class: "tip", hidden: "" });
    this.live = element("p", { class: "unseen", "aria-live": "polite" });
    const figure = element(
      "figure", { class: spec.wide ? "chart wide" : "chart" },
      element("h3", {}, spec.title), element("p", { class: "unit" }, spec.y.label),
      this.legend(), element("div", { class: "frame" }, this.plot, this.tip), this.live,
    );
    if (spec.note) figure.append(element("figcaption", {}, spec.note));
    figure.append(this.table());
    host.append(figure);
    this.listen();
    this.draw();
    new ResizeObserver(() => this.width !== this.plot.clientWidth && this.draw()).observe(this.plot);
  }

  visible() {
    return this.spec.series.filter((one) => !this.hidden.has(one.group));
  }

  legend() {
    const seen = new Map();
    for (const one of this.spec.series) if (!seen.has(one.group)) seen.set(one.group, one);
    const list = element("ul", { class: "legend", "aria-label": "Show or hide" });
    if (seen.size < 2) return list;
    for (const [group, one] of seen) {
      const mark = element("span", { class: `swatch ${{ area: "filled", band: "soft" }[one.kind] ?? (one.dash ? "dashed" : "")}`, color: one.color });
      const button = element("button", { type: "button", "aria-pressed": "true" }, mark, group);
      button.addEventListener("click", () => {
        const shown = this.hidden.delete(group) || !this.hidden.add(group);
        button.setAttribute("aria-pressed", String(shown));
        this.draw();
      });
      list.append(element("li", {}, button));
    }
    return list;
  }

  scales(width, height) {
    const { x, y, series, levels = [] } = this.spec;
    const shown = this.visible();
    const xs = within((shown.length ? shown : series).flatMap((one) => one.x)) ?? [0, 1];
    const ys = within([
      ...(shown.length ? shown : series).flatMap((one) => [...(one.y ?? []), ...(one.low ?? []), ...(one.high ?? [])]),
      ...levels.map((level) => level.y),
    ]) ?? [0, 1];
    const yTicks = ticksOf(y.low ?? ys[0], y.high ?? ys[1], Math.max(2, height / 48));
    const left = 12 + 7 * Math.max(...yTicks.map((tick) => y.format(tick).length));
    const area = { left, right: width - 14, top: 18, bottom: height - 40 };
    const [x0, x1] = xs[0] === xs[1] ? [xs[0] - 0.5, xs[1] + 0.5] : xs;
    const xTicks = ticksOf(x0, x1, Math.max(2, (area.right - left) / 80)).filter((t) => t >= x0 && t <= x1 && (!x.whole || Number.isInteger(t)));
    const [y0, y1] = [yTicks[0], yTicks[yTicks.length - 1]];
    return {
      area, xTicks, yTicks, x0, x1,
      px: (value) => area.left + ((value - x0) / (x1 - x0)) * (area.right - area.left),
      py: (value) => area.bottom - ((value - y0) / (y1 - y0)) * (area.bottom - area.top),
    };
  }

  draw() {
    this.width = this.plot.clientWidth;
    const width = Math.max(240, this.width);
    const height = this.spec.height ?? (width < 480 ? 240 : 290);
    const scale = this.scales(width, height);
    this.scale = scale;
    const { title, note } = this.spec;
    const svg = shape("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img" },
      shape("title", {}, title), shape("desc", {}, note ?? this.spec.y.label));
    this.axes(svg, width, height);
    for (const kind of ["area", "band", "thin", "dots", "line"]) {
      for (const one of this.visible()) if ((one.kind ?? "line") === kind) svg.append(...this.marks(one));
    }
    this.annotate(svg);
    this.cursor = shape("line", { class: "cursor", y1: scale.area.top, y2: scale.area.bottom, visibility: "hidden" });
    svg.append(this.cursor);
    this.plot.replaceChildren(svg);
  }

  axes(svg, width, height) {
    const { area, xTicks, yTicks, px, py } = this.scale;
    for (const tick of yTicks) {
      svg.append(shape("line", { class: "grid", x1: area.left, x2: area.right, y1: py(tick), y2: py(tick) }));
      svg.append(shape("text", { class: "tick", x: area.left - 7, y: py(tick) + 4, "text-anchor": "end" }, this.spec.y.format(tick)));
    }
    for (const tick of xTicks) {
      svg.append(shape("line", { class: "notch", x1: px(tick), x2: px(tick), y1: area.bottom, y2: area.bottom + 4 }));
      svg.append(shape("text", { class: "tick", x: px(tick), y: area.bottom + 17, "text-anchor": "middle" }, this.spec.x.format(tick)));
    }
    svg.append(shape("line", { class: "axis", x1: area.left, x2: area.right, y1: area.bottom, y2: area.bottom }));
    svg.append(shape("text", { class: "label", x: (area.left + area.right) / 2, y: height - 6, "text-anchor": "middle" }, this.spec.x.label));
  }

  marks(one) {
    const { px, py } = this.scale;
    const kind = one.kind ?? "line";
    if (kind === "band" || kind === "area") {
      const rows = one.x.map((_, i) => i).filter((i) => one.low[i] !== null && one.high[i] !== null && one.x[i] !== null);
      if (!rows.length) return [];
      const upper = rows.map((i) => `${px(one.x[i]).toFixed(1)},${py(one.high[i]).toFixed(1)}`);
      const lower = rows.map((i) => `${px(one.x[i]).toFixed(1)},${py(one.low[i]).toFixed(1)}`).reverse();
      return [shape("polygon", { class: kind, color: one.color, points: [...upper, ...lower].join(" ") })];
    }
    const radius = one.x.length === 1 ? 5 : one.x.length > (this.scale.area.right - this.scale.area.left) / 10 ? 2 : 3;
    const points = one.x.map((x, i) => (x === null || one.y[i] === null ? null : [px(x), py(one.y[i])]));
    const made = [];
    if (kind !== "dots") {
      let path = "";
      points.forEach((point, i) => {
        if (point) path += `${i && points[i - 1] ? "L" : "M"}${point[0].toFixed(1)} ${point[1].toFixed(1)}`;
      });
      made.push(shape("path", { class: `${kind} ${one.dash ? "dashed" : ""}`, color: one.color, d: path || "M0 0" }));
    }
    if (kind === "dots" || one.dots || points.filter(Boolean).length === 1) {
      for (const point of points.filter(Boolean)) {
        made.push(shape("circle", { class: kind === "dots" ? "dot faint" : "dot", color: one.color, cx: point[0].toFixed(1), cy: point[1].toFixed(1), r: kind === "dots" ? radius - 0.5 : radius }));
      }
    }
    return made;
  }

  annotate(svg) {
    const { area, px, py, x0, x1 } = this.scale;
    for (const { y, label } of this.spec.levels ?? []) {
      svg.append(shape("line", { class: "level", x1: area.left, x2: area.right, y1: py(y), y2: py(y) }));
      svg.append(shape("text", { class: "said", x: area.left + 4, y: py(y) - 5 }, label));
    }
    for (const { x, label } of (this.spec.rules ?? []).filter((rule) => rule.x >= x0 && rule.x <= x1)) {
      const late = px(x) > (area.left + area.right) / 2;
      svg.append(shape("line", { class: "rule", x1: px(x), x2: px(x), y1: area.top - 6, y2: area.bottom }));
      svg.append(shape("text", { class: "said rule-said", x: px(x) + (late ? -6 : 6), y: area.top - 6, "text-anchor": late ? "end" : "start" }, label));
    }
  }

  // ---- reading values: pointer and keys ---------------------------------------------------------

  listen() {
    this.plot.addEventListener("pointermove", (event) => {
      const { area, x0, x1 } = this.scale;
      const at = event.clientX - this.plot.getBoundingClientRect().left;
      this.read(x0 + ((at - area.left) / (area.right - area.left)) * (x1 - x0));
    });
    for (const name of ["pointerleave", "blur"]) this.plot.addEventListener(name, () => this.leave());
    this.plot.addEventListener("keydown", (event) => {
      const all = [...new Set(this.visible().flatMap((one) => one.x))].filter((x) => x !== null).sort((a, b) => a - b);
      const now = all.indexOf(this.at);
      const next = { ArrowRight: now + 1, ArrowLeft: now < 0 ? all.length - 1 : now - 1, Home: 0, End: all.length - 1 }[event.key];
      if (event.key === "Escape") this.leave();
      if (next === undefined || !all.length) return;
      event.preventDefault();
      this.read(all[Math.min(Math.max(next, 0), all.length - 1)]);
      this.live.textContent = this.tip.innerText.replace(/\n+/g, ", ");
    });
  }

  /** Show the values at the row that is nearest to `x`, of each series that has one there. */
  read(x) {
    const read = this.visible().filter((one) => one.kind !== "thin" && one.kind !== "dots" && one.x.length);
    if (!read.length) return;
    const nearest = (one) => one.x.reduce((best, value, i) => (value !== null && Math.abs(value - x) < Math.abs(one.x[best] - x) ? i : best), 0);
    const all = read.map((one) => one.x[nearest(one)]);
    this.at = all.reduce((best, value) => (Math.abs(value - x) < Math.abs(best - x) ? value : best));
    const { x: axis, y } = this.spec;
    const rows = [element("strong", {}, `${axis.reads ? axis.reads(this.at) : axis.format(this.at)} ${axis.unit ?? axis.label}`)];
    for (const one of read) {
      const row = nearest(one);
      const spacing = Math.abs((one.x[1] ?? one.x[0]) - one.x[0]);
      if (Math.abs(one.x[row] - this.at) > spacing) continue;
      const value = one.value ? one.value[row] : one.y?.[row];
      if (value === null || value === undefined) continue;
      const format = y.reads ?? y.format;
      const range = one.range ? ` (${format(one.range.low[row])} to ${format(one.range.high[row])})` : "";
      rows.push(element("span", {}, element("i", { class: "swatch filled", color: one.color }), `${one.group}  ${format(value)}${range}`));
    }
    const { px } = this.scale;
    this.cursor.setAttribute("x1", px(this.at));
    this.cursor.setAttribute("x2", px(this.at));
    this.cursor.setAttribute("visibility", "visible");
    this.tip.replaceChildren(...rows);
    this.tip.hidden = false;
    const room = this.plot.clientWidth - this.tip.offsetWidth - 4;
    const side = px(this.at) > this.plot.clientWidth / 2 ? px(this.at) - this.tip.offsetWidth - 12 : px(this.at) + 12;
    this.tip.style.left = `${Math.max(2, Math.min(side, room))}px`;
  }

  leave() {
    this.at = undefined;
    this.tip.hidden = true;
    this.cursor?.setAttribute("visibility", "hidden");
  }

  // ---- the same numbers as a table --------------------------------------------------------------

  table() {
    const details = element("details", { class: "data" }, element("summary", {}, "Data as a table"));
    details.addEventListener("toggle", () => {
      if (!details.open || details.querySelector("table")) return;
      const told = this.spec.series.filter((one) => one.kind !== "thin" && one.kind !== "band");
      const xs = [...new Set(told.flatMap((one) => one.x))].filter((x) => x !== null).sort((a, b) => a - b);
      const rows = xs.map((x) => told.map((one) => (one.value ?? one.y)[one.x.indexOf(x)]));
      details.append(tableOf(this.spec, told.map((one) => one.group), xs, rows));
    });
    return details;
  }
}

function tableOf(spec, names, xs, rows) {
  const head = element("tr", {}, ...[spec.x.label, ...names].map((name) => element("th", { scope: "col", class: "number" }, name)));
  const format = (value) => (value === null || value === undefined ? "–" : (spec.y.reads ?? spec.y.format)(value));
  const body = rows.map((row, i) => element("tr", {},
    element("th", { scope: "row", class: "number" }, (spec.x.reads ?? spec.x.format)(xs[i])),
    ...row.map((value) => element("td", { class: "number" }, format(value)))));
  const table = element("table", {}, element("caption", {}, element("span", {}, `${spec.title}: ${spec.y.label}`)), element("thead", {}, head), element("tbody", {}, ...body));
  return element("div", { class: "scroll tall", tabindex: "0", role: "region", "aria-label": `Data of ${spec.title}` }, table);
}
