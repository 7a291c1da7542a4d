/**
 * Takes the pictures of docs/images: `node tests/web/pictures.mjs <folder>`. They show the recorded page: ComfyUI's
 * stand-ins, recorded messages of a made-up model, drawn frames. QVD_SERVER or COMFYUI_PATH adds one of the real front
 * end with a tiny model.
 */

import { join } from "node:path";
import { launch } from "./chromium.mjs";
import { bringIntoView, loadPrompt, openFrontEnd, queue } from "./front_end.mjs";
import { serve } from "./recorded/serve.mjs";
import { startServer } from "./serve.mjs";

const folder = process.argv[2] ?? "docs/images";
const browser = await launch();

async function recorded(name, query, size, steps, selector) {
  const page = await browser.newPage({ viewport: size, deviceScaleFactor: 1 });
  await page.goto(`${pages.url}/?${query}`);
  await page.waitForSelector("[data-ready]");
  await steps(page);
  await page.waitForTimeout(400);
  await (selector ? page.locator(selector) : page).screenshot({ path: join(folder, `${name}.png`) });
  await page.close();
}

const live = (page) => page.evaluate(() => window.page.replay(130));
async function all(page) {
  await page.evaluate(async () => {
    await window.page.replay();
    for (const [node, recording] of Object.entries({ calibrate: "scales", quantize: "model", report: "report", compare: "compare" })) {
      await window.page.execute(node, recording);
    }
  });
  await page.locator(".qvd-layer-under img").waitFor();
}
async function report(page) {
  await all(page);
  await page.getByRole("button", { name: "Open the report" }).click();
}

/** Run inside the page: these nodes in a row, the others out of sight. */
function apart(types) {
  let right = 0;
  for (const node of window.app.graph.nodes) {
    const shown = types.includes(node.type);
    node.pos = shown ? [right, 0] : [node.pos[0] - 6000, node.pos[1]];
    right += shown ? node.size[0] + 60 : 0;
  }
}

const pages = await serve();
for (const theme of ["dark", "light"]) {
  await recorded(`web-live-${theme}`, `theme=${theme}&side=340`, { width: 1280, height: 720 }, live, "#side");
  await recorded(`web-report-${theme}`, `theme=${theme}&side=400`, { width: 1280, height: 2050 }, report, "#side");
  await recorded(`web-page-${theme}`, `theme=${theme}&side=400`, { width: 1280, height: 860 }, report);
  await recorded(`web-compare-${theme}`, `theme=${theme}`, { width: 1280, height: 860 }, all, "[data-node=QVDCompare]");
}
await recorded("web-narrow-dark", "theme=dark&side=230", { width: 1280, height: 900 }, report, "#side");
pages.close();

if (process.env.QVD_SERVER || process.env.COMFYUI_PATH) {
  const server = await startServer();
  const page = await browser.newPage({ viewport: { width: 1280, height: 640 } });
  await openFrontEnd(page, server.url, { "Comfy.VueNodes.Enabled": true, "Comfy.Minimap.Visible": false });
  await loadPrompt(page, server.prompt, "qvd");
  await queue(page);
  await page.evaluate(() => window.app.extensionManager.command.execute("QVD.ShowReport"));
  await page.evaluate(apart, ["QVDCalibrate", "QVDQuantizeModel", "QVDReport"]);
  await page.waitForTimeout(300);
  await page.evaluate(bringIntoView, ["QVDCalibrate", "QVDQuantizeModel", "QVDReport"]);
  await page.addStyleTag({ content: ".qvd-foot { display: none !important; }" }); // names a folder of this machine
  await page.waitForTimeout(6000); // until the toast of the finished job is gone
  await page.screenshot({ path: join(folder, "web-comfyui.png") });
  await page.close();
  server.stop();
}
await browser.close();
