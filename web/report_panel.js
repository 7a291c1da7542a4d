/** The report of a quantized model, from the `ui` output of a QVD Report node: summary, worst layers, heat map. */

import { meter } from "./charts.js";
import { WEAK_DB } from "./calibration_panel.js";
import { allNodes, toast } from "./comfy.js";
import { element } from "./dom.js";
import { shortened } from "./format.js";
import { heatMapView } from "./heat_map.js";
import { icon, iconButton } from "./icons.js";
import { keptCard, summary, temporalCard } from "./report_cards.js";
import * as model from "./report_model.js";
import { FIGURE_NAMES, write } from "./report_words.js";
import { isSkipped, skipWidgets, toggleSkip } from "./skip_list.js";
import { t } from "./translate.js";

/** `{root, show(entries)}`. entries: [{key, report, files}], the newest first. */
export function reportPanel() {
  const body = element("div", { class: "qvd-stack" });
  const root = element("section", { class: "qvd-stack", "aria-label": t("report.title", "Report") }, body);
  let entries = [];
  let chosen = 0;
  let figure = "sqnr_db";

  function draw() {
    const entry = entries[chosen];
    if (!entry) {
      body.replaceChildren(nothingYet());
      return;
    }
    const figures = model.figuresOf(entry.report);
    figure = figures.includes(figure) ? figure : (figures[0] ?? "sqnr_db");
    body.replaceChildren(
      ...[chooser(), summary(entry), layerCard(entry.report, figures), heatCard(entry.report), temporalCard(entry.report), keptCard(entry.report)].filter(Boolean),
    );
  }

  function show(next) {
    entries = next;
    chosen = 0;
    draw();
  }

  function chooser() {
    if (entries.length < 2) {
      return null;
    }
    const select = element("select", {
      class: "qvd-select",
      "aria-label": t("report.which", "Report"),
      onchange() {
        chosen = Number(select.value);
        draw();
        body.querySelector("select")?.focus();
      },
    });
    entries.forEach((entry, index) => {
      const name = [entry.report.model || t("report.model", "Model"), model.bits(entry.report), entry.label].filter(Boolean);
      select.append(element("option", { value: index, selected: index === chosen }, name.join(" · ")));
    });
    return select;
  }

  function figureSelect(figures) {
    if (figures.length < 2) {
      return null;
    }
    const select = element("select", {
      class: "qvd-select",
      "aria-label": t("report.figure", "Figure"),
      onchange() {
        figure = select.value;
        draw();
        body.querySelector(".qvd-figure-select")?.focus();
      },
    });
    select.classList.add("qvd-figure-select");
    select.append(...figures.map((key) => element("option", { value: key, selected: key === figure }, FIGURE_NAMES[key]())));
    return select;
  }

  function layerCard(report, figures) {
    const worst = model.worstLayers(report, figure);
    if (!worst.length) {
      return element(
        "div",
        { class: "qvd-card qvd-stack" },
        element("p", { class: "qvd-hint" }, t("report.uncalibrated", "No figures per layer: quantized without a calibration. Connect the scales of QVD Calibrate to see them.")),
      );
    }
    const rows = element("ul", { class: "qvd-rows" }, worst.map((row) => layerRow(row, figure, draw)));
    return element(
      "div",
      { class: "qvd-card qvd-stack" },
      element("h3", {}, t("report.worst", "Largest errors first")),
      figureSelect(figures),
      rows,
    );
  }

  function heatCard(report) {
    const map = model.heatMap(report, figure);
    if (!map) {
      return null;
    }
    const name = t("report.heatName", "{figure} by depth and kind of layer", { figure: FIGURE_NAMES[figure]() });
    return element(
      "div",
      { class: "qvd-card qvd-stack" },
      element("h3", {}, t("report.heat", "Depth by kind")),
      heatMapView(map, { name, write: (value) => write(figure, value), choose: (layer) => copy(layer.name) }),
    );
  }

  draw();
  return { root, show };
}

async function copy(name) {
  try {
    await navigator.clipboard.writeText(name);
    toast("success", t("report.copied", "Layer name copied"), name);
  } catch {
    toast("info", t("report.notCopied", "The browser does not let this page copy"), name);
  }
}

function layerRow({ layer, value, before, share }, figure, redraw) {
  const weak = figure === "coverage" ? value < 0.1 : value < WEAK_DB;
  const widgets = skipWidgets(allNodes());
  const skipped = isSkipped(widgets, layer.name);
  const name = element(
    "button",
    {
      type: "button",
      class: "qvd-name",
      title: `${layer.name}\n${t("report.copy", "Copy the layer name")}`,
      "aria-label": `${layer.name}, ${write(figure, value)}. ${t("report.copy", "Copy the layer name")}`,
      onclick: () => copy(layer.name),
    },
    shortened(layer.name, 40),
  );
  const was = before === null ? null : element("small", {}, t("report.before", "was {value}", { value: write(figure, before) }));
  const keep = widgets.length
    ? iconButton(
        skipped ? "locked" : "unlocked",
        t("report.keep", "Keep {layer} in full precision", { layer: layer.name }),
        (event) => {
          const now = toggleSkip(widgets, layer.name);
          toast("success", now ? t("report.nowKept", "Stays in full precision from the next run on") : t("report.notKept", "Will be quantized again"), layer.name);
          const list = event.currentTarget.closest("ul");
          const index = [...list.children].indexOf(event.currentTarget.closest("li"));
          const panel = list.closest("section");
          redraw();
          panel.querySelectorAll(".qvd-rows > li")[index]?.querySelector("[aria-pressed]")?.focus();
        },
        { "aria-pressed": String(skipped) },
      )
    : null;
  return element(
    "li",
    {},
    element("div", { class: "qvd-row" }, name, element("span", { class: "qvd-value" }, write(figure, value)), keep),
    element("div", { class: "qvd-row" }, meter(share, weak), was),
  );
}

function nothingYet() {
  return element(
    "div",
    { class: "qvd-empty" },
    icon("chart"),
    element("p", {}, t("report.empty", "No report yet.")),
    element("p", { class: "qvd-hint" }, t("report.emptyHint", "Add a QVD Report node behind QVD Quantize Model and queue it.")),
  );
}
