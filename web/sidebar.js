/** The QVD tab of the side bar: the live calibration and the report, one behind the other. */

import { calibrationPanel } from "./calibration_panel.js";
import { advance, emptyRun, ended, isRunning } from "./calibration_state.js";
import { api, app, findNode } from "./comfy.js";
import { element, keepKeys } from "./dom.js";
import { reportPanel } from "./report_panel.js";
import { serverSettings } from "./settings.js";
import { t } from "./translate.js";

export const TAB_ID = "qvd";
const KEPT_REPORTS = 8;
const STORED = "qvd.calibration";

const state = { run: restored(), reports: [], page: "live", version: "" };
let view = null;

function restored() {
  try {
    const run = { ...emptyRun(), ...JSON.parse(sessionStorage.getItem(STORED)) };
    return Array.isArray(run.levels) ? run : emptyRun();
  } catch {
    return emptyRun();
  }
}

function store() {
  try {
    sessionStorage.setItem(STORED, JSON.stringify(state.run));
  } catch {
    // private windows may refuse: the run is then forgotten with the page
  }
}

/** Move on by one server message. Returns the run as it is now. */
export function receive(message) {
  const before = state.run;
  state.run = advance(before, message);
  if (isRunning(state.run) && !isRunning(before)) {
    turnTo("live");
  }
  return update();
}

/** Mark a run as ended that the server will say no more of. */
export function receiveEnd(phase, message) {
  state.run = ended(state.run, phase, message);
  return update();
}

function update() {
  view?.live.show(state.run);
  if (!isRunning(state.run)) {
    store();
  }
  return state.run;
}

/** Add a report to the panel, in place of an earlier one of the same node. */
export function addReport(key, output, title = "") {
  const report = output?.qvd_report?.[0];
  if (!report || typeof report !== "object") {
    return;
  }
  const entry = { key, report, files: output.qvd_files ?? [], label: title };
  state.reports = [entry, ...state.reports.filter((other) => other.key !== key)].slice(0, KEPT_REPORTS);
  view?.report.show(state.reports);
}

/** Bring one of the two pages to the front: "live" or "report". */
export function turnTo(page) {
  state.page = page;
  view?.turn(page);
}

/** Open the tab where it is not open. polite: not in place of another one. */
export function open(polite = false) {
  const bar = app.extensionManager?.sidebarTab;
  if (!bar || bar.activeSidebarTabId === TAB_ID || (polite && bar.activeSidebarTabId)) {
    return;
  }
  bar.toggleSidebarTab(TAB_ID);
}

function reveal(id) {
  const node = findNode(id);
  if (!node) {
    return;
  }
  if (node.graph && app.canvas.graph !== node.graph) {
    app.canvas.setGraph?.(node.graph);
  }
  app.canvas.centerOnNode(node);
  app.canvas.selectNode?.(node, false);
}

/** Put the tab into the side bar. */
export function registerSidebar() {
  app.extensionManager.registerSidebarTab({
    id: TAB_ID,
    icon: "pi pi-gauge",
    title: "QVD",
    tooltip: t("tab.tooltip", "QVD: calibration and report"),
    type: "custom",
    render: mount,
    destroy: () => {
      view = null;
    },
  });
}

function mount(container) {
  const live = calibrationPanel({ stop: () => api.interrupt(null), reveal });
  const report = reportPanel();
  const pages = {
    live: { name: t("tab.live", "Calibration"), body: live.root },
    report: { name: t("tab.report", "Report"), body: report.root },
  };
  const tabs = element("div", { class: "qvd-tabs", role: "tablist", "aria-label": "QVD" });
  const root = element("div", { class: "qvd qvd-side-panel" }, tabs);
  const buttons = {};
  for (const [page, { name, body }] of Object.entries(pages)) {
    const attributes = { type: "button", role: "tab", id: `qvd-tab-${page}`, "aria-controls": `qvd-page-${page}`, onclick: () => turnTo(page) };
    buttons[page] = element("button", attributes, name);
    tabs.append(buttons[page]);
    pages[page].panel = element("div", { class: "qvd-page", role: "tabpanel", id: `qvd-page-${page}`, "aria-labelledby": `qvd-tab-${page}`, tabindex: 0 }, body);
    root.append(pages[page].panel);
  }

  function turn(page) {
    for (const [name, button] of Object.entries(buttons)) {
      button.setAttribute("aria-selected", String(name === page));
      button.tabIndex = name === page ? 0 : -1;
      pages[name].panel.hidden = name !== page;
    }
  }

  tabs.addEventListener("keydown", (event) => {
    if (["ArrowLeft", "ArrowRight", "Home", "End"].includes(event.key)) {
      const next = event.key === "Home" || (event.key !== "End" && state.page === "report") ? "live" : "report";
      turnTo(next);
      buttons[next].focus();
    }
  });
  keepKeys(root);
  const foot = element("footer", { class: "qvd-foot" });
  root.append(foot);
  about(foot);
  container.classList.add("qvd-tab-place");
  container.replaceChildren(root);
  view = { live, report, turn };
  turn(state.page);
  live.show(state.run);
  report.show(state.reports);
}

async function about(foot) {
  state.about ??= await serverSettings();
  const { version, cache_folder: folder, default_cache_folder: standard } = state.about;
  const where = folder || standard;
  foot.replaceChildren(
    ...[
      version ? element("span", {}, `QVD ${version}`) : null,
      where ? element("span", { title: where }, t("tab.cache", "Cache: {folder}", { folder: where })) : null,
    ].filter(Boolean),
  );
}
