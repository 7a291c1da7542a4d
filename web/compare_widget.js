/** The compare widget of a QVD Compare node: a wipe over two videos, frame by frame, with the error of each frame. */

import { lineChart } from "./charts.js";
import { chain, growToFit } from "./comfy.js";
import { perFrame, pictureCount, pictureOf, shownFrames } from "./compare_model.js";
import { element, keepKeys } from "./dom.js";
import { decibels, number } from "./format.js";
import { frameStore } from "./frame_store.js";
import { icon, iconButton } from "./icons.js";
import { language, t } from "./translate.js";
import { wipe } from "./wipe.js";

export const COMPARE_NODE = "QVDCompare";
const LEAST = { width: 420, stage: 190 };
const MARGIN = 4; // around the widget, in the classic renderer
const FRAMES_PER_SECOND = 12;
const views = new WeakMap();

/** Give a new QVD Compare node its widget. */
export function addCompare(node) {
  const view = compareView();
  views.set(node, view);
  // The widget shows the pictures itself: neither renderer is to show them once more.
  node.hideOutputImages = true;
  node.onDrawBackground = () => {};
  const widget = node.addDOMWidget("qvd_compare", "QVD_COMPARE", view.root, {
    serialize: false,
    hideOnZoom: false,
    margin: MARGIN,
    getMinHeight: view.height,
  });
  widget.serialize = false;
  chain(node, "onExecuted", (output) => {
    showComparison(node, output);
    growToFit(node, [LEAST.width, 0]);
  });
  chain(node, "onRemoved", view.stop);
  growToFit(node, [LEAST.width, 0]);
}

/** Show what a `ui` output says of a comparison. */
export function showComparison(node, output) {
  const payload = output?.qvd_compare?.[0];
  if (payload && typeof payload === "object") {
    views.get(node)?.show(payload);
  }
}

function compareView() {
  const stage = wipe();
  const empty = element("p", { class: "qvd-hint qvd-stage-empty" }, t("compare.empty", "Queue the workflow to compare two videos here."));
  const scrubber = element("input", { type: "range", class: "qvd-scrubber", min: 0, max: 0, step: 1, value: 0, "aria-label": t("compare.frame", "Frame") });
  const reading = element("output", { class: "qvd-frame-number" });
  const playButton = iconButton("play", t("compare.play", "Play"), () => (timer === null ? play() : stop()));
  const differenceButton = iconButton("difference", t("compare.difference", "Show the difference"), toggleDifference, { "aria-pressed": "false" });
  const chart = element("div", { class: "qvd-frame-chart" });
  const chips = element("div", { class: "qvd-badges" });
  const controls = element("div", { class: "qvd-row qvd-controls", role: "group", "aria-label": t("compare.controls", "Playback") }, playButton, scrubber, reading, differenceButton);
  const root = element("div", { class: "qvd qvd-node qvd-compare", role: "group", "aria-label": t("compare.title", "Comparison of two videos") }, empty);
  keepKeys(root);

  let payload = null;
  let shown = [];
  let store = null;
  let line = null;
  let index = 0;
  let difference = false;
  let timer = null;
  let wanted = 0;

  const pictures = () => pictureCount(payload);
  const frames = () => payload?.frames ?? pictures();

  function height() {
    if (!payload) {
      return 60;
    }
    return 2 * MARGIN + LEAST.stage + [chips, controls, chart].reduce((sum, part) => sum + (part.offsetHeight || 30) + 6, 12);
  }

  async function showPicture(next) {
    index = Math.min(Math.max(0, next), Math.max(0, pictures() - 1));
    const frame = shown[index] ?? 0;
    const psnr = perFrame(payload.psnr)[frame];
    const text = t("compare.frameOf", "{frame} / {frames}", { frame: frame + 1, frames: frames() });
    scrubber.value = index;
    scrubber.setAttribute("aria-valuetext", Number.isFinite(psnr) ? `${text}, ${decibels(psnr, language())}` : text);
    reading.textContent = text;
    line?.mark(frame);
    wanted += 1;
    const mine = wanted;
    const kinds = difference ? ["difference"] : ["reference", "test"];
    const images = await Promise.all(kinds.map((kind) => store.get(kind, index)));
    if (mine === wanted) {
      stage.show(...images);
    }
  }

  function preload(from, count) {
    for (let step = 1; step <= count; step += 1) {
      for (const kind of difference ? ["difference"] : ["reference", "test"]) {
        store.get(kind, (from + step) % Math.max(1, pictures()));
      }
    }
  }

  function dressPlayButton() {
    const name = timer === null ? t("compare.play", "Play") : t("compare.pause", "Pause");
    playButton.replaceChildren(icon(timer === null ? "play" : "pause"));
    playButton.setAttribute("aria-label", name);
    playButton.title = name;
  }

  function play() {
    timer = setTimeout(async function turn() {
      await showPicture((index + 1) % pictures());
      preload(index, 3);
      if (timer !== null) {
        timer = setTimeout(turn, 1000 / FRAMES_PER_SECOND);
      }
    }, 0);
    dressPlayButton();
  }

  function stop() {
    clearTimeout(timer);
    timer = null;
    dressPlayButton();
  }

  function toggleDifference() {
    difference = !difference;
    differenceButton.setAttribute("aria-pressed", String(difference));
    stage.single(difference);
    showPicture(index);
  }

  function drawChart() {
    const values = perFrame(payload.psnr);
    line = null;
    chart.replaceChildren();
    chart.hidden = values.filter((value) => value !== null).length < 2;
    if (chart.hidden) {
      return;
    }
    const name = t("compare.chart", "PSNR of each frame: {mean} on average, {min} in frame {worst}", {
      mean: decibels(payload.psnr.mean, language()),
      min: decibels(payload.psnr.min, language()),
      worst: (payload.psnr.worst_frame ?? 0) + 1,
    });
    line = lineChart(values, name);
    line.root.addEventListener("pointerdown", (event) => {
      stop();
      showPicture(pictureOf(line.indexAt(event), shown));
    });
    chart.append(line.root);
  }

  function drawChips() {
    const chip = (text, tone, title) => element("span", { class: `qvd-chip qvd-${tone}`, title }, text);
    const list = [];
    if (payload.identical) {
      list.push(chip(t("compare.identical", "identical"), "good", t("compare.identicalHint", "Every pixel of every frame is the same")));
    }
    if (Number.isFinite(payload.psnr?.mean)) {
      list.push(chip(`PSNR ${decibels(payload.psnr.mean, language())}`, "plain", t("compare.psnr", "Over all frames; higher is closer")));
    }
    if (Number.isFinite(payload.ssim?.mean)) {
      list.push(chip(`SSIM ${number(payload.ssim.mean, 4, language())}`, "plain", t("compare.ssim", "Structural similarity; 1 is identical")));
    }
    const worst = payload.psnr?.worst_frame;
    if (Number.isInteger(worst) && !payload.identical) {
      const name = t("compare.worst", "worst frame {frame}", { frame: worst + 1 });
      const go = () => showPicture(pictureOf(worst, shown));
      list.push(element("button", { type: "button", class: "qvd-chip qvd-plain", title: decibels(payload.psnr.min, language()), onclick: go }, name));
    }
    chips.replaceChildren(...list);
  }

  function show(next) {
    stop();
    payload = next;
    shown = shownFrames(payload);
    store = frameStore(payload);
    if (pictures() === 0) {
      root.replaceChildren(element("p", { class: "qvd-hint qvd-stage-empty" }, t("compare.noFrames", "The comparison holds no frames.")));
      return;
    }
    scrubber.max = pictures() - 1;
    controls.classList.toggle("qvd-still", pictures() < 2);
    differenceButton.hidden = !(payload.difference?.length > 0);
    stage.shape(payload.width, payload.height);
    root.replaceChildren(chips, stage.root, controls, chart);
    drawChips();
    drawChart();
    showPicture(Math.min(index, pictures() - 1));
    preload(index, 2);
  }

  scrubber.addEventListener("input", () => {
    stop();
    showPicture(Number(scrubber.value));
  });
  return { root, show, stop, height };
}
