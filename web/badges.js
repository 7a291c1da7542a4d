/** Badges on QVD's nodes, as a DOM widget: bits, memory saved, cache hit, progress, warnings. */

import { describe } from "./badge_model.js";
import { fraction, isRunning } from "./calibration_state.js";
import { phaseText } from "./calibration_panel.js";
import { chain, growToFit } from "./comfy.js";
import { element, keepKeys } from "./dom.js";
import { percent } from "./format.js";
import { language, t } from "./translate.js";

/** The node classes whose `ui` output holds `qvd`. */
export const WITH_BADGES = ["QVDQuantizeModel", "QVDLoadDiffusionModel", "QVDCalibrate", "QVDCalibrateTwoExperts"];

const MARGIN = 4; // around the widget, in the classic renderer
const LEAST_HEIGHT = 28;
const views = new WeakMap();

/** Give a new node its badges. */
export function addBadges(node) {
  const view = badgeView(() => growToFit(node));
  views.set(node, view);
  const widget = node.addDOMWidget("qvd_badges", "QVD_BADGES", view.root, {
    serialize: false,
    hideOnZoom: false,
    margin: MARGIN,
    getMinHeight: view.height,
    getMaxHeight: view.height,
  });
  widget.serialize = false;
  chain(node, "onExecuted", (output) => showOutput(node, output));
}

/** Show what a `ui` output says of a node. */
export function showOutput(node, output) {
  const payloads = (output?.qvd ?? []).filter((payload) => payload && typeof payload === "object");
  if (payloads.length) {
    views.get(node)?.show(payloads);
  }
}

/** Show a running calibration on its node; once it ended, what the node said before. */
export function showProgress(node, run) {
  views.get(node)?.progress(run);
}

function badgeView(resized) {
  const row = element("div", { class: "qvd-badges", role: "list", "aria-label": t("badge.list", "Quantization") });
  const list = element("ul", { class: "qvd-warnings", hidden: true });
  const root = element("div", { class: "qvd qvd-node" }, row, list);
  keepKeys(root);
  let payloads = [];
  let open = false;

  function height() {
    const inside = row.scrollHeight + (list.hidden ? 0 : list.scrollHeight + 6);
    return Math.max(LEAST_HEIGHT, inside + 8) + 2 * MARGIN;
  }

  function chip({ text, tone, title }) {
    const name = title ? `${text}: ${title}` : text;
    return element("span", { class: `qvd-chip qvd-${tone}`, role: "listitem", title: title || null, "aria-label": name }, text);
  }

  function warningChip(warnings) {
    const name = t("badge.warnings", "Warnings: {count}", { count: warnings.length });
    const button = element(
      "button",
      {
        type: "button",
        class: "qvd-chip qvd-warn",
        "aria-expanded": String(open),
        "aria-label": name,
        title: name,
        onclick() {
          open = !open;
          draw();
          row.querySelector("button")?.focus();
        },
      },
      `⚠ ${warnings.length}`,
    );
    return element("span", { role: "listitem" }, button);
  }

  function draw() {
    if (!payloads.length) {
      row.replaceChildren(chip({ text: t("badge.none", "not run yet"), tone: "muted", title: "" }));
    } else {
      const { badges, warnings } = describe(payloads);
      row.replaceChildren(...badges.map(chip), ...(warnings.length ? [warningChip(warnings)] : []));
      list.replaceChildren(...warnings.map((warning) => element("li", {}, warning)));
      list.hidden = !(open && warnings.length);
    }
    resized();
  }

  function show(next) {
    payloads = next;
    draw();
  }

  function progress(run) {
    if (!isRunning(run)) {
      draw();
      return;
    }
    const text = `${phaseText(run)} ${percent(fraction(run), language())}`;
    row.replaceChildren(chip({ text, tone: "busy", title: "" }));
    resized();
  }

  draw();
  return { root, show, progress, height };
}
