/** The live view of a calibration: phase, step, layer, time left, and the error of each layer as it is searched. */

import { announcer } from "./announce.js";
import { emptyRun, fraction, isRunning, rollingMean, worst } from "./calibration_state.js";
import { barChart } from "./charts.js";
import { element } from "./dom.js";
import { decibels, duration, percent, shortened } from "./format.js";
import { icon } from "./icons.js";
import { language, t } from "./translate.js";

const BARS = 80;
export const WEAK_DB = 20; // below it a layer's error is a tenth of its output

const PHASES = {
  sampling: () => t("live.sampling", "Sampling the model"),
  search: () => t("live.search", "Searching the scales"),
  cached: () => t("live.cached", "Scales taken from the cache"),
  done: () => t("live.done", "Calibration finished"),
  failed: () => t("live.failed", "Calibration failed"),
  interrupted: () => t("live.interrupted", "Calibration stopped"),
};

const EXPERTS = {
  high: () => t("live.high", "high-noise expert"),
  low: () => t("live.low", "low-noise expert"),
};

const TONES = { failed: "qvd-bad", interrupted: "qvd-warn", done: "qvd-good", cached: "qvd-good" };

/** The phase in words; unknown ones as they are. */
export function phaseText(run) {
  return PHASES[run.phase]?.() ?? run.phase;
}

function position(run) {
  if (run.phase === "sampling" && run.steps > 0) {
    return run.prompts > 1
      ? t("live.promptStep", "Prompt {prompt} of {prompts}, step {step} of {steps}", run)
      : t("live.step", "Step {step} of {steps}", run);
  }
  return run.phase === "search" ? t("live.searched", "Layers searched: {count}", { count: run.levels.length }) : "";
}

function spoken(run) {
  const parts = [phaseText(run)];
  if (isRunning(run)) {
    parts.push(percent(fraction(run), language()), position(run));
  }
  return parts.filter(Boolean).join(", ");
}

/** `{root, show(run)}`; stop: what the stop button does; reveal: bring the calibrating node into view. */
export function calibrationPanel({ stop, reveal }) {
  const live = announcer();
  const none = nothingYet();
  const above = element("div", { class: "qvd-stack" });
  const below = element("div");
  const stopButton = button("stop", t("live.stop", "Stop"), stop, "qvd-danger");
  const revealButton = button("place", t("live.reveal", "Show node"), () => reveal(shown.node));
  // The buttons stay the same while all around them is drawn anew: a click may last longer than a message.
  const card = element("div", {}, above, element("div", { class: "qvd-row" }, stopButton, revealButton));
  const root = element("section", { class: "qvd-stack", "aria-label": t("live.title", "Live calibration") });
  root.append(none, card, below, live.region);
  let shown = emptyRun();
  let scheduled = false;

  function draw() {
    scheduled = false;
    none.hidden = shown.phase !== "";
    card.hidden = below.hidden = shown.phase === "";
    stopButton.hidden = !isRunning(shown);
    card.className = `qvd-card qvd-stack ${TONES[shown.phase] ?? ""}`;
    above.replaceChildren(...head(shown));
    below.replaceChildren(...[levels(shown)].filter(Boolean));
  }

  function show(run) {
    const changed = run.phase !== shown.phase || run.expert !== shown.expert;
    shown = run;
    if (run.phase !== "") {
      live.say(spoken(run), changed);
    }
    if (!scheduled) {
      scheduled = true;
      requestAnimationFrame(draw);
    }
  }

  draw();
  return { root, show };
}

function button(symbol, name, onclick, kind = "") {
  return element("button", { type: "button", class: `qvd-button ${kind}`, onclick }, icon(symbol), name);
}

function nothingYet() {
  return element(
    "div",
    { class: "qvd-empty" },
    icon("gauge"),
    element("p", {}, t("live.empty", "No calibration has run yet.")),
    element("p", { class: "qvd-hint" }, t("live.emptyHint", "Queue a workflow with a QVD Calibrate node to watch it here.")),
  );
}

/** What stands above the buttons. */
function head(run) {
  const share = fraction(run);
  const bar = element(
    "div",
    {
      class: "qvd-progress",
      role: "progressbar",
      "aria-label": phaseText(run),
      "aria-valuemin": 0,
      "aria-valuemax": 100,
      "aria-valuenow": Math.round(share * 100),
      "aria-valuetext": [percent(share, language()), position(run)].filter(Boolean).join(", "),
    },
    element("span", { style: `width:${(share * 100).toFixed(1)}%` }),
  );
  const title = EXPERTS[run.expert] ? `${phaseText(run)} · ${EXPERTS[run.expert]()}` : phaseText(run);
  const figures = element("dl", { class: "qvd-figures" });
  const figure = (name, value) => figures.append(element("div", {}, element("dt", {}, name), element("dd", {}, value)));
  figure(t("live.elapsed", "Elapsed"), duration(run.seconds, language()));
  if (isRunning(run)) {
    figure(t("live.left", "Time left"), run.eta === null ? "–" : `≈ ${duration(run.eta, language())}`);
  }
  if (run.levels.length) {
    const mean = run.levels.reduce((sum, [, level]) => sum + level, 0) / run.levels.length;
    figure(t("live.mean", "Mean SQNR"), decibels(mean, language()));
  }
  return [
    element(
      "div",
      { class: "qvd-row" },
      element("h3", { class: "qvd-grow" }, title),
      isRunning(run) ? element("strong", { class: "qvd-share" }, percent(share, language())) : null,
    ),
    isRunning(run) ? bar : null,
    isRunning(run) && position(run) ? element("div", { class: "qvd-hint" }, position(run)) : null,
    isRunning(run) && run.layer ? element("code", { class: "qvd-layer", title: run.layer }, shortened(run.layer, 48)) : null,
    run.message ? element("p", { class: "qvd-message" }, run.message) : null,
    figures,
  ].filter(Boolean);
}

function levels(run) {
  if (!run.levels.length) {
    return null;
  }
  const recent = run.levels.slice(-BARS);
  const means = rollingMean(run.levels.map(([, level]) => level)).slice(-BARS);
  const named = ([layer, level, expert]) =>
    `${expert ? `${EXPERTS[expert]?.() ?? expert} · ` : ""}${layer}: ${decibels(level, language())}`;
  const bars = recent.map((entry) => ({ value: entry[1], label: named(entry), weak: entry[1] < WEAK_DB }));
  const name = t("live.chartName", "Error of the last {count} layers searched; the latest: {latest}", {
    count: recent.length,
    latest: named(recent[recent.length - 1]),
  });
  return element(
    "div",
    { class: "qvd-card qvd-stack" },
    element("h3", {}, t("live.chart", "Signal to quantization noise, layer by layer")),
    barChart(bars, means, name),
    element(
      "div",
      { class: "qvd-legend" },
      element("span", { class: "qvd-key" }, t("live.perLayer", "layer (dB)")),
      element("span", { class: "qvd-key qvd-key-mean" }, t("live.rolling", "rolling mean")),
      element("span", { class: "qvd-key qvd-key-weak" }, t("live.weak", "below {limit}", { limit: decibels(WEAK_DB) })),
    ),
    element("h4", {}, t("live.worst", "Largest errors so far")),
    element(
      "ol",
      { class: "qvd-list" },
      worst(run.levels).map((entry) =>
        element(
          "li",
          {},
          element("code", { title: entry[0] }, shortened(entry[0], 40)),
          element("span", {}, decibels(entry[1], language())),
        ),
      ),
    ),
  );
}
