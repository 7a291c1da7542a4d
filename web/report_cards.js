/** The cards of the report panel that only show: summary, temporal features, layers kept in full precision. */

import { meter } from "./charts.js";
import { viewUrl } from "./comfy.js";
import { element } from "./dom.js";
import { bytes, number, percent, shortened } from "./format.js";
import { icon } from "./icons.js";
import * as model from "./report_model.js";
import { ACTIVATIONS, KINDS, MEANS, measured, MEASURED, write } from "./report_words.js";
import { language, t } from "./translate.js";

/** What the model is and what quantization saves. */
export function summary({ report, files }) {
  const kinds = model.kinds(report);
  const counts = Object.entries(kinds).sort(([, one], [, other]) => other - one).map(([kind, count]) => `${number(count, 0, language())} ${KINDS[kind]?.() ?? kind}`);
  const saved = model.savedShare(report);
  const table = element("dl", { class: "qvd-summary" });
  const line = (name, value) => value && table.append(element("div", {}, element("dt", {}, name), element("dd", {}, value)));
  line(t("report.family", "Family"), report.family);
  line(t("report.activation", "Activation scales"), ACTIVATIONS[report.settings?.activation]?.() ?? report.settings?.activation);
  line(t("report.layers", "Quantized layers"), counts.join(" · "));
  const kept = model.keptLayers(report).length;
  line(t("report.kept", "Kept in full precision"), kept ? number(kept, 0, language()) : "");
  for (const figure of model.figuresOf(report)) {
    line(MEANS[figure](), write(figure, model.mean(report, figure)));
  }
  for (const [name, value] of [...Object.entries(report.quality ?? {}), ...Object.entries(report.speed ?? {})]) {
    line(MEASURED[name]?.() ?? name.replaceAll("_", " "), measured(name, value));
  }
  const prompts = model.promptCount(report);
  line(t("report.calibratedOn", "Prompts of the calibration"), prompts ? number(prompts, 0, language()) : "");
  const links = (files ?? []).filter((file) => file?.filename);
  return element(
    "div",
    { class: "qvd-card qvd-stack" },
    element(
      "div",
      { class: "qvd-row" },
      element("h3", { class: "qvd-grow" }, report.model || t("report.model", "Model")),
      model.bits(report) ? element("span", { class: "qvd-chip qvd-good" }, model.bits(report)) : null,
    ),
    saved === null ? null : memory(report, saved),
    table,
    links.length ? element("div", { class: "qvd-row qvd-wrap" }, links.map(link)) : null,
  );
}

function memory(report, saved) {
  const [before, after] = [report.float_bytes, report.int8_bytes].map((size) => bytes(size, language()));
  return element(
    "div",
    { class: "qvd-memory" },
    element("div", { class: "qvd-big" }, `−${percent(saved, language())}`),
    element(
      "div",
      { class: "qvd-grow qvd-stack" },
      meter(1 - saved),
      element("span", { class: "qvd-hint" }, t("report.memory", "Weights: {before} → {after}", { before, after })),
    ),
  );
}

function link(file) {
  const kind = file.filename.split(".").pop().toUpperCase();
  return element(
    "a",
    { class: "qvd-button", href: viewUrl(file), download: file.filename, title: file.filename },
    icon("download"),
    kind,
  );
}

/** The quantizers of the temporal features, or null. */
export function temporalCard(report) {
  const rows = model.temporalRows(report);
  if (!rows.length) {
    return null;
  }
  const head = [t("report.quantizer", "Quantizer"), t("report.tdKept", "Distances kept"), t("report.projections", "Projections")];
  return element(
    "div",
    { class: "qvd-card qvd-stack" },
    element("h3", {}, t("report.temporal", "Temporal features")),
    element(
      "table",
      { class: "qvd-table" },
      element("thead", {}, element("tr", {}, head.map((text) => element("th", { scope: "col" }, text)))),
      element(
        "tbody",
        {},
        rows.map(({ layers, name, kept }) =>
          element("tr", {}, element("td", {}, name), element("td", {}, percent(kept, language(), 1)), element("td", { title: layers.join("\n") }, number(layers.length, 0, language()))),
        ),
      ),
    ),
  );
}

/** The layers that stay in full precision and why, or null. */
export function keptCard(report) {
  const kept = model.keptLayers(report);
  if (!kept.length) {
    return null;
  }
  return element(
    "details",
    { class: "qvd-card" },
    element("summary", {}, t("report.keptList", "Kept in full precision: {count}", { count: kept.length })),
    element("ul", { class: "qvd-list qvd-reasons" }, kept.map(([name, why]) => element("li", {}, element("code", { title: name }, shortened(name, 40)), element("span", {}, why)))),
  );
}
