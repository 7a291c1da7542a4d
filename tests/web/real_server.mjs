/**
 * The extension in ComfyUI's real front end, classic and with Vue nodes, against a real server with real nodes.
 * COMFYUI_PATH names the checkout. QVD_SERVER takes the line of a `python -m tests.web.serve` that runs already;
 * QVD_PICTURES a folder for screenshots.
 */

import assert from "node:assert/strict";
import { after, before, describe, test } from "node:test";
import { problemsBelow } from "./accessible.mjs";
import { complaints, findChromium, launch } from "./chromium.mjs";
import { bringIntoView, ended, loadPrompt, notOurs, openFrontEnd, queue, waitUntilUp } from "./front_end.mjs";
import { picture, startServer } from "./serve.mjs";

let server;
let browser;
before(async () => {
  assert.ok(findChromium(), "no Chromium: install one, or name it in QVD_CHROMIUM");
  server = await startServer();
  browser = await launch();
});
after(async () => {
  await browser?.close();
  server?.stop();
});

const withSeed = (seed) => {
  const prompt = structuredClone(server.prompt);
  for (const node of Object.values(prompt)) {
    if (node.class_type === "QVDCalibrate") {
      node.inputs.seed = seed;
    }
  }
  return prompt;
};
const show = (page, command) => page.evaluate((id) => window.app.extensionManager.command.execute(id), command);
const badges = (page) => page.locator(".qvd-badges").allInnerTexts();

for (const [index, vue] of [false, true].entries()) {
  const name = vue ? "vue" : "classic";
  describe(`${name} nodes`, () => {
    let page;
    let complained;

    before(async () => {
      page = await browser.newPage({ viewport: { width: 1280, height: 800 } });
      complained = complaints(page, notOurs);
      const settings = { "Comfy.VueNodes.Enabled": vue, "Comfy.Minimap.Visible": false };
      await openFrontEnd(page, server.url, settings);
      await loadPrompt(page, withSeed((Date.now() + index) % 1e9), "qvd");
      await page.evaluate(bringIntoView, ["QVDCalibrate", "QVDQuantizeModel", "QVDReport"]);
    });
    after(() => page?.close());

    test("a calibration opens the panel and fills it", { timeout: 600_000 }, async () => {
      assert.ok((await badges(page)).includes("not run yet"));
      await queue(page, { wait: false });
      await page.getByRole("heading", { name: /Sampling|Searching/ }).waitFor({ timeout: 300_000 });
      await page.locator(".qvd-busy").waitFor();
      await page.locator(".qvd-chart .qvd-bar").first().waitFor({ timeout: 300_000 });
      await picture(page, `web-live-${name}`);
      assert.equal(await ended(page), "execution_success");
      await page.getByRole("heading", { name: "Calibration finished" }).waitFor();
      assert.ok((await page.locator(".qvd-chart .qvd-bar").count()) >= 10);
    });

    test("the nodes say what came of it", async () => {
      const texts = (await badges(page)).join(" ");
      assert.match(texts, /calibrated in/);
      assert.match(texts, /W8A8/);
      assert.match(texts, /−\d+%/);
    });

    test("the report shows the model that was quantized", async () => {
      await show(page, "QVD.ShowReport");
      await page.getByRole("heading", { name: /WanModel/ }).waitFor();
      assert.ok((await page.locator(".qvd-rows > li").count()) >= 5);
      assert.ok((await page.locator(".qvd-heat .qvd-cell").count()) >= 10);
      await picture(page, `web-report-${name}`);
      const [layer] = (await page.locator(".qvd-name").first().innerText()).split(" ");
      await page.getByRole("button", { name: `Keep ${layer}` }).click();
      const listed = await page.evaluate(() => {
        const node = window.app.graph.nodes.find((one) => one.type === "QVDQuantizeSettings");
        return node.widgets.find((widget) => widget.name === "modules_to_not_convert").value;
      });
      assert.equal(listed, layer);
      await page.getByRole("button", { name: `Keep ${layer}` }).click();
      assert.deepEqual(await page.evaluate(problemsBelow, ".qvd-side-panel"), []);
    });

    test("the divider of the comparison moves, by mouse and by keyboard", async () => {
      await page.evaluate(bringIntoView, ["QVDCompare"]);
      await page.locator(".qvd-layer-under img").waitFor();
      const divider = page.getByRole("slider", { name: "Divider" });
      const box = await page.locator(".qvd-picture").boundingBox();
      await page.mouse.move(box.x + box.width / 2, box.y + box.height / 2);
      await page.mouse.down();
      await page.mouse.move(box.x + box.width * 0.25, box.y + box.height / 3, { steps: 5 });
      await page.mouse.up();
      assert.equal(await divider.getAttribute("aria-valuenow"), "25");
      await page.keyboard.press("ArrowRight");
      assert.equal(await divider.getAttribute("aria-valuenow"), "26");
      await page.getByRole("slider", { name: "Frame" }).focus();
      await page.keyboard.press("ArrowRight");
      assert.match(await page.locator(".qvd-frame-number").innerText(), /^2 \/ \d+$/);
      await picture(page, `web-compare-${name}`);
      assert.deepEqual(await page.evaluate(problemsBelow, ".qvd-compare"), []);
    });

    test("a cached run keeps everything, and so does a reload", { timeout: 300_000 }, async () => {
      await queue(page);
      assert.match((await badges(page)).join(" "), /W8A8/);
      await page.waitForTimeout(1500); // the front end keeps a draft of the workflow a moment after its last change
      await page.reload();
      await waitUntilUp(page);
      await page.getByText("W8A8").first().waitFor({ state: "attached" });
      await page.locator(".qvd-layer-under img").waitFor({ state: "attached" });
      await show(page, "QVD.ShowReport");
      await page.getByRole("heading", { name: /WanModel/ }).waitFor();
    });

    test("the stop button stops a calibration", { timeout: 300_000 }, async () => {
      await show(page, "QVD.ShowCalibration");
      await page.evaluate(() => {
        const node = window.app.graph.nodes.find((one) => one.type === "QVDCalibrate");
        node.widgets.find((widget) => widget.name === "seed").value = Date.now() % 1e9;
      });
      await queue(page, { wait: false });
      await page.getByRole("button", { name: "Stop", exact: true }).click({ timeout: 120_000 });
      assert.equal(await ended(page), "execution_interrupted");
      await page.getByRole("heading", { name: "Calibration stopped" }).waitFor();
    });

    test("a new node starts with the preset of the settings", async () => {
      const presets = await page.evaluate(async () => {
        await window.app.extensionManager.setting.set("QVD.DefaultPreset", "paper");
        const node = window.LiteGraph.createNode("QVDQuantizeModel");
        window.app.graph.add(node);
        const found = node.widgets.find((widget) => widget.name === "preset").value;
        window.app.graph.remove(node);
        await window.app.extensionManager.setting.set("QVD.DefaultPreset", "auto");
        return found;
      });
      assert.equal(presets, "paper");
    });

    test("the cache folder of the settings reaches the server", async () => {
      const folder = await page.evaluate(async () => {
        const ask = async () => (await (await window.app.api.fetchApi("/qvd/settings")).json()).cache_folder;
        const [before_, set] = [await ask(), window.app.extensionManager.setting.set];
        await set("QVD.CacheFolder", `${before_}-elsewhere`);
        for (let tries = 0; tries < 50 && (await ask()) === before_; tries += 1) {
          await new Promise((resolve) => setTimeout(resolve, 100));
        }
        const changed = await ask();
        await set("QVD.CacheFolder", "");
        return [before_, changed];
      });
      assert.equal(folder[1], `${folder[0]}-elsewhere`);
    });

    test("nothing of ours complained", () => {
      assert.deepEqual(complained, []);
    });
  });
}
