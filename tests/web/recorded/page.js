/** Brings web/ up as ComfyUI would, and lets a test replay the recordings: `window.page`. */

const query = new URLSearchParams(location.search);
document.documentElement.classList.toggle("dark-theme", query.get("theme") !== "light");
document.documentElement.style.setProperty("--side", `${query.get("side") ?? 380}px`);

const { app, recorded } = await import("/scripts/app.js");
const { api } = await import("/scripts/api.js");
recorded.settings.set("Comfy.Locale", query.get("locale") ?? "en");
await import("/extensions/qvd/qvd.js");
for (const extension of app.extensions) {
  await extension.init?.();
}
for (const extension of app.extensions) {
  await extension.setup?.();
}
const nodes = {
  settings: recorded.add(1, "QVDQuantizeSettings", [["modules_to_not_convert", ""]]),
  calibrate: recorded.add(2, "QVDCalibrate", [["preset", "fast"]]),
  quantize: recorded.add(3, "QVDQuantizeModel", [["preset", "fast"]]),
  report: recorded.add(4, "QVDReport"),
  compare: recorded.add(5, "QVDCompare"),
};
for (const extension of app.extensions) {
  await extension.afterConfigureGraph?.([], app);
}

const recording = async (name) => (await fetch(`${name}.json`)).json();

window.page = {
  app,
  api,
  recorded,
  nodes,
  recording,
  /** Say the first `count` recorded messages of a calibration at once. */
  async replay(count = Infinity) {
    (await recording("messages")).slice(0, count).forEach((message) => api.say("qvd.calibration", message));
  },
  /** A node was executed with the recorded `ui` output. */
  async execute(node, name) {
    nodes[node].onExecuted(await recording(name));
    nodes[node].fit();
  },
};
document.documentElement.dataset.ready = "true";
