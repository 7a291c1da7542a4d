/** The front-end extension of QVD: what ComfyUI tells it, handed on to the panels and widgets. */

import { addBadges, showOutput, showProgress, WITH_BADGES } from "./badges.js";
import { isRunning } from "./calibration_state.js";
import { api, app, chain, findNode, rootGraph, setting } from "./comfy.js";
import { addCompare, COMPARE_NODE, showComparison } from "./compare_widget.js";
import { element } from "./dom.js";
import { earlierRuns, newestOutputs } from "./history.js";
import { addReport, open, receive, receiveEnd, registerSidebar, turnTo } from "./sidebar.js";
import { applyDefaultPreset, settings } from "./settings.js";
import { loadTranslations, t } from "./translate.js";

const REPORT_NODE = "QVDReport";
const KEYS = ["qvd", "qvd_report", "qvd_compare"];

/** Show whatever of ours a node's `ui` output holds. */
function showAll(node, id, output) {
  showOutput(node, output);
  showComparison(node, output);
  addReport(String(id), output, node?.title ?? "");
}

function loadStyle() {
  const href = new URL("./qvd.css", import.meta.url).href;
  document.head.append(element("link", { rel: "stylesheet", href }));
}

let announced = ""; // the node whose calibration opened the panel

function onMessage(message) {
  const run = receive(message);
  const node = findNode(run.node);
  if (node) {
    showProgress(node, run);
  }
  if (isRunning(run) && run.node !== announced && setting("QVD.LivePanel", true)) {
    open(true);
  }
  announced = isRunning(run) ? run.node : "";
}

function onEnd(phase, message = "") {
  const run = receiveEnd(phase, message);
  const node = findNode(run.node);
  if (node) {
    showProgress(node, run);
  }
  announced = "";
}

function listen() {
  api.addEventListener("qvd.calibration", (event) => onMessage(event.detail ?? {}));
  api.addEventListener("execution_interrupted", () => onEnd("interrupted"));
  api.addEventListener("execution_error", (event) => onEnd("failed", event.detail?.exception_message ?? ""));
}

/** Bring back what ran before the page was loaded: reports of any workflow, the rest of this one. */
async function restore() {
  const runs = await earlierRuns();
  for (const [id, output] of newestOutputs(runs, ["qvd_report"]).reverse()) {
    addReport(id, output, findNode(id)?.title ?? "");
  }
  const workflow = String(rootGraph()?.id ?? "");
  const own = runs.filter((run) => run.workflow && run.workflow === workflow);
  for (const [id, output] of newestOutputs(own, KEYS)) {
    const node = findNode(id);
    if (node) {
      showOutput(node, output);
      showComparison(node, output);
    }
  }
}

app.registerExtension({
  name: "qvd",
  settings,
  commands: [
    {
      id: "QVD.ShowCalibration",
      label: "QVD: show the live calibration",
      icon: "pi pi-gauge",
      function: () => {
        turnTo("live");
        open();
      },
    },
    {
      id: "QVD.ShowReport",
      label: "QVD: show the report",
      icon: "pi pi-chart-bar",
      function: () => {
        turnTo("report");
        open();
      },
    },
  ],

  async init() {
    loadStyle();
    await loadTranslations();
  },

  setup() {
    registerSidebar();
    listen();
  },

  /** A workflow was opened. */
  afterConfigureGraph() {
    restore();
  },

  nodeCreated(node) {
    if (WITH_BADGES.includes(node.comfyClass)) {
      addBadges(node);
      applyDefaultPreset(node);
    } else if (node.comfyClass === COMPARE_NODE) {
      addCompare(node);
    } else if (node.comfyClass === REPORT_NODE) {
      addReportButton(node);
    }
  },

  /** Another workflow came to the front: its outputs are known, but no node is executed. */
  onNodeOutputsUpdated(outputs) {
    for (const [id, output] of Object.entries(outputs ?? {})) {
      const node = findNode(id);
      if (node && KEYS.some((key) => output?.[key]?.length)) {
        showAll(node, id, output);
      }
    }
  },
});

function addReportButton(node) {
  chain(node, "onExecuted", (output) => addReport(String(node.id), output, node.title));
  const show = () => {
    turnTo("report");
    open();
  };
  node.addWidget("button", "qvd_open_report", null, show, { serialize: false }).label = t("report.open", "Open the report");
}
