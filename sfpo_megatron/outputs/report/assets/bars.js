"use strict";
// What is no line chart: bars of the phases, and ratios with their intervals.

function phaseBars(host) {
  const arms = data.arms.filter((arm) => Object.keys(arm.phases).length);
  if (!arms.length) return;
  const total = (arm) => Object.values(arm.phases).reduce((sum, value) => sum + (value ?? 0), 0);
  const most = Math.max(...arms.map(total));
  const names = data.phases.filter((name) => arms.some((arm) => name in arm.phases));
  const legend = element("ul", { class: "legend" }, ...names.map((name) => element("li", {}, element("span", {}, element("i", { class: "swatch filled", color: `--phase-${name}` }), name))));
  const bars = arms.map((arm) => {
    const parts = Object.entries(arm.phases).filter(([, value]) => value).map(([name, value]) => {
      const part = element("span", { class: "part", color: `--phase-${name}`, title: `${name}: ${plain(value)} s` });
      part.style.width = `${(100 * value) / most}%`;
      return part;
    });
    const said = Object.entries(arm.phases).map(([name, value]) => `${name} ${plain(value ?? 0)} s`).join(", ");
    return element("div", { class: "bar" }, element("p", {}, arm.name, element("b", {}, ` ${plain(total(arm))} s`)),
      element("div", { class: "parts", role: "img", "aria-label": said }, ...parts));
  });
  host.append(element("figure", { class: "chart wide" }, element("h3", {}, "Seconds a train step, by phase"), element("p", { class: "unit" }, "mean over steps and seeds"), legend, ...bars));
}

/** How many times less an arm took than the baseline: dots with intervals, on a log axis. */
function ratios(host) {
  const rows = data.ratios.flatMap((arm, place) => ["rollouts", "seconds", "passes"]
    .map((axis) => ({ arm: place, axis, value: arm[axis][0], low: arm[axis][1], high: arm[axis][2] })))
    .filter((row) => row.value && row.arm !== data.baseline);
  if (!rows.length) return;
  const known = rows.flatMap((row) => [row.value, row.low, row.high]).filter((value) => value);
  const [low, high] = [Math.min(0.8, ...known) / 1.1, Math.max(1.25, ...known) * 1.1];
  const title = "Times fewer than the baseline";
  const plot = element("div", { class: "plot" });
  const colors = new Set(rows.map((row) => row.arm));
  const legend = element("ul", { class: "legend" }, ...[...colors].map((place) => element("li", {}, element("span", {}, element("i", { class: "swatch filled", color: armColor(place) }), data.arms[place].name))));
  host.append(element("figure", { class: "chart wide" }, element("h3", {}, title),
    element("p", { class: "unit" }, `${data.arms[data.baseline].name} ÷ the arm, medians over seeds; to the right of 1 the arm took less. Bars: 95 % intervals, an arrow where there is no bound.`), legend, plot));
  const draw = () => {
    const width = Math.max(240, plot.clientWidth);
    const [left, right, each] = [118, width - 24, 30];
    const px = (value) => left + (Math.log(value / low) / Math.log(high / low)) * (right - left);
    const bottom = rows.length * each + 8;
    const svg = shape("svg", { width, height: bottom + 26, role: "img" }, shape("title", {}, title));
    const near = width < 600 ? [] : [0.75, 1.5, 3, 6, 12];
    for (const tick of [0.1, 0.2, 0.5, 1, 2, 4, 8, 16, 32, ...near].filter((t) => t >= low && t <= high)) {
      svg.append(shape("line", { class: tick === 1 ? "one" : "grid", x1: px(tick), x2: px(tick), y1: 4, y2: bottom }),
        shape("text", { class: "tick", x: px(tick), y: bottom + 16, "text-anchor": "middle" }, `${tick}×`));
    }
    rows.forEach((row, i) => {
      const [y, color] = [i * each + 20, armColor(row.arm)];
      svg.append(shape("text", { x: left - 10, y: y + 4, "text-anchor": "end" }, { passes: "backward passes" }[row.axis] ?? row.axis));
      if (row.low !== null) {
        const [from, to] = [row.low ? px(row.low) : left, row.high === null ? right : px(row.high)];
        svg.append(shape("line", { class: "interval", color, x1: from, x2: to, y1: y, y2: y }));
        if (!row.low) svg.append(shape("path", { class: "line", color, d: `M${from + 7} ${y - 5}L${from} ${y}L${from + 7} ${y + 5}` }));
        if (row.high === null) svg.append(shape("path", { class: "line", color, d: `M${to - 7} ${y - 5}L${to} ${y}L${to - 7} ${y + 5}` }));
      }
      svg.append(shape("circle", { class: "dot", color, cx: px(row.value), cy: y, r: 5 }),
        shape("text", { class: "said", x: px(row.value), y: y - 9, "text-anchor": "middle" }, `${Number(row.value.toFixed(2))}×`));
    });
    plot.replaceChildren(svg);
  };
  new ResizeObserver(draw).observe(plot);
}
