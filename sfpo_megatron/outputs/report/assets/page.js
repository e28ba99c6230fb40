"use strict";
// The charts of the page, from the JSON that stands in it.

const data = JSON.parse(document.getElementById("data").textContent);
const ARM_COLORS = 8;
const armColor = (place) => `--arm-${place % ARM_COLORS}`;

// ---- axes -------------------------------------------------------------------------------------

function longest(axis) {
  const ends = data.runs.map((run) => run.train[axis]?.at(-1) ?? 0);
  return Math.max(0, ...ends);
}

function secondsAxis() {
  const most = longest("seconds");
  const [size, unit] = most > 7200 ? [3600, "hours"] : most > 300 ? [60, "minutes"] : [1, "seconds"];
  return { name: "seconds", size, label: `${unit} of train steps (without evaluation)`, unit, format: plain };
}

const AXES = {
  rollouts: { name: "rollouts", size: 1, label: "rollouts", format: (v) => compact.format(v), reads: (v) => whole.format(v) },
  seconds: secondsAxis(),
  passes: { name: "passes", size: 1, label: "backward passes (sweeps over a rollout batch)", unit: "backward passes", format: (v) => compact.format(v), reads: (v) => whole.format(v) },
};
const STEPS = { name: "step", size: 1, label: "train step", unit: "steps", format: (v) => whole.format(v), whole: true };

function along(columns, axis) {
  return (columns[axis.name] ?? []).map((value) => (value === null ? null : value / axis.size));
}

// ---- series -----------------------------------------------------------------------------------

/** An arm's mean with its band, and its seeds as thin lines: their column `seed`. */
function armSeries(table, name, axis, seed = name) {
  return data.arms.flatMap((arm, place) => {
    const band = arm[table][name];
    if (!band) return [];
    const [x, color, group] = [along(arm[table], axis), armColor(place), arm.name];
    const mean = { group, color, x, y: band.mean, dots: table === "evals", dash: place >= ARM_COLORS };
    if (arm.runs.length === 1) return [mean];
    const seeds = arm.runs.map((index) => data.runs[index][table]).filter((columns) => columns[seed])
      .map((columns) => ({ kind: "thin", group, color, x: along(columns, axis), y: columns[seed] }));
    return [{ ...mean, range: band }, { kind: "band", group, color, x, low: band.low, high: band.high }, ...seeds];
  });
}

function line(run, name, group, color, more = {}) {
  return { group, color, x: along(run.train, STEPS), y: run.train[name], ...more };
}

function present(columns, names) {
  return names.filter((name) => columns[name]);
}

/** A chart, unless it would be empty. */
function chart(host, spec) {
  const series = spec.series.filter((one) => one.x?.length && (one.y ?? one.high)?.some((v) => v !== null));
  if (series.length) new Chart(host, { ...spec, series });
}

function atStep(run, step, axis) {
  const row = run.train.step.findIndex((at) => at >= step);
  return row < 0 ? null : along(run.train, axis)[row];
}

// ---- all arms ---------------------------------------------------------------------------------

function seedsNote() {
  return data.arms.some((arm) => arm.runs.length > 1) ? " Line: mean over seeds; band: lowest to highest seed; thin lines: seeds." : "";
}

function learning(axis) {
  const host = document.getElementById("learning");
  host.replaceChildren();
  const alone = data.runs.length === 1 ? data.runs[0] : null;
  const rules = alone?.close_step ? [{ x: atStep(alone, alone.close_step, axis), label: `gate closes, step ${alone.close_step}` }] : [];
  const levels = data.target === null ? [] : [{ y: data.target, label: `target ${percent(data.target)}` }];
  const band = seedsNote();
  chart(host, { title: "Held-out accuracy", x: axis, y: { label: "share of correct responses", format: percent }, rules, levels,
    series: armSeries("evals", "accuracy", axis), note: `At every evaluation.${band}` });
  const raw = alone?.train.reward_mean ? [{ kind: "dots", group: data.arms[0].name, color: armColor(0), x: along(alone.train, axis), y: alone.train.reward_mean }] : [];
  chart(host, { title: "Train reward", x: axis, y: { label: "mean reward of a rollout batch", format: plain }, rules,
    series: [...armSeries("train", "reward_mean", axis, "reward_smooth"), ...raw],
    note: `Running mean of 7 train steps.${raw.length ? " Dots: each step." : band}` });
  if (!host.children.length) host.append(element("p", { class: "empty" }, "Nothing to draw yet."));
}

/** What the updates do, against rollouts. */
function compared(host) {
  const x = AXES.rollouts;
  const smooth = `Running mean of 7 train steps.${data.arms.some((arm) => arm.runs.length > 1) ? " Line: mean over seeds; band: lowest to highest seed." : ""}`;
  chart(host, { title: "Entropy", x, y: { label: "nats a token, in the slow correction", format: plain }, series: armSeries("train", "entropy", x, null), note: smooth });
  chart(host, { title: "Drift in a step", x, y: { label: "KL to the policy before the step, nats a token", format: plain },
    series: armSeries("train", "ppo_kl", x, null), note: `In the slow correction, or the only pass. ${smooth}` });
  chart(host, { title: "Response length", x, y: { label: "mean tokens of a response", format: plain }, series: armSeries("train", "response_tokens_mean", x, null), note: smooth });
}

/** lines: {name, color, drift}, the drift of each pass: fast ones joined, the slow correction apart. */
function profiles(host, lines, title = "Drift by pass") {
  const most = Math.max(...lines.map((one) => one.drift.length));
  const passes = { label: "pass", unit: "", format: (v) => String(v), reads: (v) => `pass ${v}`, whole: true };
  const alone = lines.length === 1;
  const series = lines.flatMap(({ name, color, drift }) => [
    { group: alone ? "fast passes" : name, color: alone ? "--arm-0" : color, dots: true, x: drift.slice(0, -1).map((_, i) => i + 1), y: drift.slice(0, -1) },
    { group: alone ? "slow correction" : name, color: alone ? "--warn" : color, x: [drift.length], y: drift.slice(-1) },
  ]);
  chart(host, { title, x: passes, y: { label: "KL to the policy before the step, nats a token", format: plain, low: 0 },
    rules: alone && most > 1 ? [{ x: most - 0.5, label: "reposition" }] : [], series,
    note: `Mean over the steps with fast passes, each pass over its own minibatches. The reposition pulls the weights back, so that the slow correction${alone ? "" : ", the dot apart,"} begins nearer to where the step began than the last fast pass ended.` });
}

// ---- one run ----------------------------------------------------------------------------------

function oneRun(run) {
  const host = document.getElementById("one-run");
  host.replaceChildren();
  if (!run.train.step) {
    host.append(element("p", { class: "empty" }, "This run has no train step yet."));
    return;
  }
  const mean = run.steps_a_row > 1 ? ` Each point is the mean of ${run.steps_a_row} steps.` : "";
  gate(host, run, mean);
  drift(host, run, mean);
  phases(host, run, mean);
  rollouts(host, run, mean);
  updates(host, run, mean);
}

function gate(host, run, mean) {
  const rules = run.close_step ? [{ x: run.close_step, label: `gate closes, step ${run.close_step}` }] : [];
  const [window, threshold] = [run.window ?? 30, run.threshold];
  const hasGate = run.num_passes > 1;
  const relative = run.relative && `${percent(run.relative)} ${run.two_sided ? "from" : "above"} the mean`;
  const either = (z) => [threshold !== null && z, relative].filter(Boolean).join(", or ");
  const ways = either(`mean ${run.two_sided ? "±" : "+"} ${threshold} standard deviations of the last ${window} steps`);
  const patience = run.patience > 1 ? `, ${run.patience} steps in a row, while the window waits` : "";
  const bounds = (hasGate ? [["bound", ""], ...(run.two_sided ? [["low_bound", "-"]] : [])] : [])
    .map(([name, sign]) => line(run, name, `closes here (${either(`z = ${sign}${threshold}`)})`, "--warn", { dash: true }));
  chart(host, { title: "Entropy and the gate", x: STEPS, y: { label: "nats a token, in the slow correction", format: plain }, rules: hasGate ? rules : [],
    series: [line(run, "entropy", "entropy", "--arm-0"), ...bounds],
    note: (!hasGate ? "There are no fast passes, so no gate." : !ways ? "Entropy does not close the gate."
      : `The gate closes when the entropy reaches ${ways}${patience}${run.train.bound ? "" : ", which are not there yet"}.`) + mean });
  if (!hasGate) return;
  chart(host, { title: "z-score of the entropy", x: STEPS, y: { label: `over a window of ${window} steps`, format: plain }, rules,
    levels: (threshold === null ? [] : run.two_sided ? [1, -1] : [1]).map((side) => ({ y: side * threshold, label: `threshold ${side * threshold}` })), series: [line(run, "z", "z", "--arm-2")],
    note: `None before the window is full.${mean}` });
}

function drift(host, run, mean) {
  const numbers = [...Array(run.num_passes).keys()].map((i) => i + 1).filter((k) => run.train[`pass_${k}/ppo_kl`]);
  if (numbers.length > 1) profiles(host, [{ name: run.name, drift: profileOf(run, numbers) }]);
  const last = numbers.length;
  const named = (k) => (last === 1 ? "the pass" : k === last ? "slow correction" : `fast pass ${k}`);
  const color = (k) => (k === last ? "--warn" : `--fast-${Math.min(3, Math.floor(((k - 1) * 4) / Math.max(1, last - 1)))}`);
  chart(host, { title: "Drift, step by step", x: STEPS, y: { label: "KL to the policy before the step, nats a token", format: plain },
    series: numbers.map((k) => line(run, `pass_${k}/ppo_kl`, named(k), color(k))), note: `Mean over the tokens of each pass, each minibatch before its optimizer step; an estimate that may be a little below 0.${mean}` });
}

function profileOf(run, numbers) {
  const last = run.train[`pass_${numbers.at(-1)}/ppo_kl`];
  return numbers.map((k) => {
    const values = run.train[`pass_${k}/ppo_kl`].filter((value, i) => value !== null && last[i] !== null);
    return values.length ? values.reduce((sum, value) => sum + value, 0) / values.length : null;
  });
}

function phases(host, run, mean) {
  const sums = run.train.step.map(() => 0);
  const series = run.phases.map((name) => {
    const value = run.train[`time/${name}`] ?? sums.map(() => 0);
    const low = [...sums];
    value.forEach((seconds, i) => { sums[i] += seconds ?? 0; });
    return { kind: "area", group: name, color: `--phase-${name}`, x: along(run.train, STEPS), low, high: [...sums], value };
  });
  chart(host, { title: "Seconds of a train step", x: STEPS, y: { label: "by phase, stacked", format: plain, low: 0 }, series,
    note: `Rank 0's wall clock, without evaluation.${mean}` });
}

function quantiles(host, run, prefix, most, spec) {
  const [low, middle, high] = ["p10", "p50", "p90"].map((end) => run.train[`${prefix}_${end}`]);
  const meanName = { response_tokens: "response_tokens_mean", reward: "reward_mean" }[prefix];
  const x = along(run.train, STEPS);
  const series = [line(run, meanName, "mean", "--arm-0")];
  const range = low && high ? { low, high } : undefined;
  if (range) series.push({ kind: "band", group: "10th to 90th percentile", color: "--arm-0", x, ...range });
  if (middle) series.push(line(run, `${prefix}_p50`, "median", "--arm-2", { dash: true, range }));
  for (const end of present(run.train, [`${prefix}_max`])) series.push(line(run, end, most, "--arm-1"));
  chart(host, { ...spec, x: STEPS, series });
}

function rollouts(host, run, mean) {
  quantiles(host, run, "response_tokens", "longest", { title: "Response lengths", y: { label: "tokens", format: plain }, note: `Of the rollouts of each step.${mean}` });
  quantiles(host, run, "reward", "highest", { title: "Rewards", y: { label: "reward of a rollout", format: plain }, note: `Of the rollouts of each step.${mean}` });
  chart(host, { title: "Groups and ends", x: STEPS, y: { label: "share", format: percent, low: 0 },
    series: [line(run, "zero_variance_groups", "groups with equal rewards (no gradient)", "--arm-1"), line(run, "solved_by_all", "groups all right", "--arm-2"),
      line(run, "solved_by_none", "groups all wrong", "--arm-4"), line(run, "truncated", "rollouts cut off", "--arm-3")], note: mean.trim() });
  const speed = (name) => `speed/${name}tokens_per_s`;
  chart(host, { title: "Tokens a second", x: STEPS, y: { label: "tokens/s", format: plain, low: 0 }, note: `By the seconds of each phase.${mean}`,
    series: [line(run, speed("generation_"), "generation", "--phase-generate"), line(run, speed("training_"), "training, each pass", "--phase-passes"), line(run, speed(""), "end to end", "--phase-refit")] });
  chart(host, { title: "Engines at work", x: STEPS, y: { label: "share", format: percent, low: 0 }, note: `Busy: of the seconds of generation, mean over the engines; keys and values: of the fullest engine's blocks.${mean}`,
    series: [line(run, "engines/busy", "busy", "--phase-generate"), line(run, "kv_cache_usage_max", "keys and values", "--arm-2")] });
  chart(host, { title: "Wait in an engine's queue", x: STEPS, y: { label: "seconds", format: plain, low: 0 }, series: [line(run, "engines/queue_s", "mean of the requests", "--arm-1")],
    note: `Until a request was first scheduled.${mean}` });
}

function updates(host, run, mean) {
  chart(host, { title: "Clipped tokens", x: STEPS, y: { label: "share of response tokens, in the slow correction", format: percent, low: 0 }, series: [line(run, "clip_frac", "clipped", "--arm-1")], note: mean.trim() });
  chart(host, { title: "Generator against trainer", x: STEPS, y: { label: "nats a token, before the update", format: plain, low: 0 },
    series: [line(run, "logprob_diff_mean", "mean difference of log-probs", "--arm-5")], note: `Mean of |generator - trainer| over the response tokens.${mean}` });
  chart(host, { title: "Gradient norm", x: STEPS, y: { label: "before clipping, in the slow correction", format: plain, low: 0 }, series: [line(run, "grad_norm", "norm", "--arm-3")], note: mean.trim() });
}

// ---- samples ----------------------------------------------------------------------------------

function samples(run) {
  const host = document.getElementById("sample-list");
  host.replaceChildren();
  if (!run.samples.length) {
    host.append(element("p", { class: "empty" }, "No sample rollouts of this run (no samples.jsonl)."));
    return;
  }
  const steps = [...new Set(run.samples.map((sample) => sample.step))];
  const pick = element("select", { id: "sample-step" }, ...steps.map((step, i) => element("option", { value: String(i) }, `step ${step}`)));
  const shown = element("div", { class: "samples" });
  const show = () => shown.replaceChildren(...run.samples.filter((sample) => sample.step === steps[pick.value]).map(sampleOf));
  pick.value = String(steps.length - 1);
  pick.addEventListener("change", show);
  show();
  host.append(element("p", { class: "choice" }, element("label", { for: "sample-step" }, "Train step "), pick), shown);
}

function sampleOf(sample) {
  const texts = sample.responses.map((one) => {
    const reward = one.reward === null ? "no reward" : `reward ${plain(one.reward)}`;
    const head = element("p", { class: "verdict" }, element("b", { class: one.reward > 0 ? "good" : "bad" }, reward), one.detail ? ` · ${one.detail}` : "");
    return element("li", {}, head, element("pre", { dir: "auto" }, one.text));
  });
  const parts = [element("h4", {}, "Prompt"), element("pre", { class: "prompt", dir: "auto" }, sample.prompt)];
  if (sample.answer) parts.push(element("p", { class: "verdict" }, "Reference: ", element("code", { dir: "auto" }, sample.answer)));
  parts.push(element("h4", {}, "Responses"), element("ol", {}, ...texts));
  if (sample.num_more) parts.push(element("p", { class: "empty" }, `${sample.num_more} more responses are in samples.jsonl.`));
  return element("article", { class: "sample" }, ...parts);
}

// ---- begin ------------------------------------------------------------------------------------

for (const radio of document.querySelectorAll("input[name=axis]")) {
  radio.addEventListener("change", () => learning(AXES[radio.value]));
}
const runChoice = document.getElementById("run-choice");
function choose() {
  const run = data.runs[Number(runChoice?.value ?? 0)];
  oneRun(run);
  samples(run);
}
runChoice?.addEventListener("change", choose);
learning(AXES.rollouts);
const comparison = document.getElementById("comparison");
if (comparison) {
  compared(comparison);
  const lines = data.arms.map((arm, place) => ({ name: arm.name, color: armColor(place), drift: arm.drift }));
  const fast = lines.filter((one) => one.drift.length > 1);
  if (fast.length) profiles(comparison, fast, fast.length > 1 ? undefined : `Drift by pass, ${fast[0].name}`);
  phaseBars(comparison);
}
choose();
const ratioHost = document.getElementById("ratios");
if (ratioHost) ratios(ratioHost);
