import assert from "node:assert/strict";
import { describe, test } from "node:test";
import { everything, onPage, text } from "./page.mjs";

describe("the compare widget", () => {
  const open = async (page) => {
    await everything(page);
    await page.locator(".qvd-layer-under img").waitFor();
  };
  const wipe = (page) => page.getByRole("slider", { name: "Divider" });
  const position = async (page) => Number(await wipe(page).getAttribute("aria-valuenow"));

  test("the divider follows the pointer and the arrow keys", () =>
    onPage("", async (page) => {
      await open(page);
      const box = await page.locator(".qvd-picture").boundingBox();
      await page.mouse.move(box.x + box.width / 2, box.y + box.height / 2);
      await page.mouse.down();
      await page.mouse.move(box.x + box.width * 0.25, box.y + 20, { steps: 4 });
      await page.mouse.up();
      assert.equal(await position(page), 25);
      const clip = await page.locator(".qvd-layer-over").evaluate((layer) => getComputedStyle(layer).clipPath);
      assert.match(clip, /75%/);
      await page.keyboard.press("ArrowRight");
      await page.keyboard.press("PageUp");
      assert.equal(await position(page), 36);
      await page.keyboard.press("Home");
      assert.equal(await position(page), 0);
    }));

  test("the scrubber moves by arrow keys, and picture, number and marker with it", () =>
    onPage("", async (page) => {
      await open(page);
      await page.getByRole("slider", { name: "Frame" }).focus();
      await page.keyboard.press("ArrowRight");
      await page.keyboard.press("ArrowRight");
      await page.waitForFunction(() => document.querySelector(".qvd-layer-under img").src.includes("test_02"));
      assert.equal(await text(page, ".qvd-frame-number"), "3 / 33");
      assert.match(await page.locator(".qvd-layer-over img").getAttribute("src"), /reference_02/);
      assert.match(await page.getByRole("slider", { name: "Frame" }).getAttribute("aria-valuetext"), /dB/);
    }));

  test("plays, pauses, shows the difference and goes to the worst frame", () =>
    onPage("", async (page) => {
      await open(page);
      await page.getByRole("button", { name: "Play" }).click();
      await page.waitForFunction(() => Number(document.querySelector(".qvd-scrubber").value) >= 3);
      await page.getByRole("button", { name: "Pause" }).click();
      const difference = page.getByRole("button", { name: "Show the difference" });
      await difference.click();
      await page.waitForFunction(() => document.querySelector(".qvd-layer-under img").src.includes("difference"));
      assert.equal(await difference.getAttribute("aria-pressed"), "true");
      assert.equal(await wipe(page).count(), 0);
      await page.getByRole("button", { name: "worst frame 23" }).click();
      await page.waitForFunction(() => document.querySelector(".qvd-layer-under img").src.includes("difference_22"));
    }));

  test("a click on the chart goes to that frame", () =>
    onPage("", async (page) => {
      await open(page);
      const chart = page.locator(".qvd-frame-chart svg");
      const box = await chart.boundingBox();
      await page.mouse.click(box.x + box.width - 6, box.y + box.height / 2);
      await page.waitForFunction(() => document.querySelector(".qvd-frame-number").textContent === "33 / 33");
    }));

  test("a comparison without frames, or with one, shows what it can", () =>
    onPage("", async (page) => {
      await page.evaluate(() => window.page.nodes.compare.onExecuted({ qvd_compare: [{ frames: 0 }] }));
      await page.getByText("The comparison holds no frames.").waitFor();
      await page.evaluate(() => {
        const file = (kind) => [{ filename: `${kind}_00.svg`, subfolder: "", type: "temp" }];
        const identical = { frames: 1, width: 832, height: 480, identical: true, psnr: { mean: null, min: null, worst_frame: 0, per_frame: [null] } };
        window.page.nodes.compare.onExecuted({ qvd_compare: [{ ...identical, reference: file("reference"), test: file("test") }] });
      });
      await page.getByText("identical").waitFor();
      assert.ok(await page.locator(".qvd-frame-chart").isHidden());
    }));

  test("stops when its node is removed", () =>
    onPage("", async (page) => {
      await open(page);
      await page.getByRole("button", { name: "Play" }).click();
      await page.evaluate(() => window.page.nodes.compare.onRemoved());
      const before_ = await text(page, ".qvd-frame-number");
      await page.waitForTimeout(400);
      assert.equal(await text(page, ".qvd-frame-number"), before_);
    }));
});
