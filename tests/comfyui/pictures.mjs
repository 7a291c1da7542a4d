// Opens every example workflow in ComfyUI's own front end: checks that it sends the recorded prompt and that no nodes
// overlap, and takes its picture. `node pictures.mjs <server> <repository> [pictures]`; prints one JSON line per workflow.
import { readFileSync, readdirSync, writeFileSync } from "node:fs";
import { createRequire } from "node:module";
import { join } from "node:path";

const [server, repository, pictures] = process.argv.slice(2);
const require = createRequire(join(process.env.QVD_NODE_MODULES ?? join(repository, "node_modules"), "anything.js"));
const { chromium } = require("playwright-core");
const SIZE = { width: 1600, height: 900 };
const JPEG_QUALITIES = [80, 65, 50, 35];
const LARGEST_BYTES = 150_000;

/** Left, top, right and bottom of all nodes as the front end drew them, with their titles. */
const measure = () =>
  window.app.graph.nodes.map((node) => {
    const [x, y] = node.pos;
    return { type: node.type, box: [x, y - 30, x + node.size[0], y + node.size[1]], missing: Boolean(node.has_errors) };
  });

const overlaps = (nodes) => {
  const found = [];
  for (const [index, one] of nodes.entries()) {
    for (const other of nodes.slice(index + 1)) {
      const [a, b] = [one.box, other.box];
      const apart = a[2] <= b[0] || b[2] <= a[0] || a[3] <= b[1] || b[3] <= a[1];
      if (!apart) found.push(`${one.type} and ${other.type}`);
    }
  }
  return found;
};

/** Left, top, right and bottom of the whole graph. */
const extent = () => {
  const boxes = [
    ...window.app.graph.nodes.map((node) => [...node.pos, ...node.size]),
    ...window.app.graph.groups.map((group) => [...group.pos, ...group.size]),
  ];
  return [
    Math.min(...boxes.map(([x]) => x)) - 20,
    Math.min(...boxes.map(([, y]) => y)) - 40,
    Math.max(...boxes.map(([x, , width]) => x + width)) + 20,
    Math.max(...boxes.map(([, y, , height]) => y + height)) + 20,
  ];
};

/** Put the whole graph into view. */
const fit = ([left, top, right, bottom]) => {
  const { ds, canvas } = window.app.canvas;
  const [width, height] = [canvas.width / devicePixelRatio, canvas.height / devicePixelRatio];
  ds.scale = Math.min(width / (right - left), height / (bottom - top));
  ds.offset[0] = -left + (width / ds.scale - (right - left)) / 2;
  ds.offset[1] = -top + (height / ds.scale - (bottom - top)) / 2;
  window.app.canvas.setDirty(true, true);
};

const browser = await chromium.launch({
  executablePath: process.env.QVD_CHROMIUM ?? "/usr/bin/chromium",
  args: ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"],
});
try {
  const page = await browser.newPage({ viewport: SIZE });
  const complaints = [];
  page.on("pageerror", (error) => complaints.push(String(error)));
  const settings = { "Comfy.TutorialCompleted": true };
  // Off: what is no part of the graph.
  for (const name of ["Minimap.Visible", "Graph.CanvasMenu", "Graph.CanvasInfo", "Workflow.ShowMissingModelsWarning"]) {
    settings[`Comfy.${name}`] = false;
  }
  await page.request.post(`${server}/settings`, { data: settings });
  await page.goto(server, { waitUntil: "domcontentloaded" });
  await page.waitForFunction(() => window.app?.extensionManager && window.app?.graph, null, { timeout: 120_000 });
  if (pictures) await page.evaluate(() => window.app.extensionManager.command.execute("Workspace.ToggleFocusMode"));
  const names = readdirSync(join(repository, "examples")).filter((name) => name.endsWith(".json"));
  for (const file of names.sort()) {
    const name = file.replace(/\.json$/, "");
    const workflow = JSON.parse(readFileSync(join(repository, "examples", file), "utf8"));
    complaints.length = 0;
    await page.evaluate((data) => window.app.loadGraphData(data, true, false, null), workflow);
    await page.waitForTimeout(1500);
    const nodes = await page.evaluate(measure);
    const { output } = await page.evaluate(() => window.app.graphToPrompt());
    if (pictures) {
      const box = await page.evaluate(extent);
      const height = Math.round((SIZE.width * (box[3] - box[1])) / (box[2] - box[0]));
      await page.setViewportSize({ width: SIZE.width, height });
      await page.waitForTimeout(500);
      await page.evaluate(fit, box);
      await page.waitForTimeout(1000);
      const path = join(pictures, `${name}.jpg`);
      for (const quality of JPEG_QUALITIES) {
        const image = await page.screenshot({ type: "jpeg", quality });
        writeFileSync(path, image);
        if (image.length <= LARGEST_BYTES) break;
      }
    }
    console.log(JSON.stringify({ name, prompt: output, overlaps: overlaps(nodes), nodes, complaints }));
  }
} finally {
  await browser.close();
}
