import assert from "node:assert/strict";
import { describe, test } from "node:test";
import { onPage, text } from "./page.mjs";

describe("the live panel", () => {
  test("opens by itself, and fills: phase, step, layer, time left, chart", () =>
    onPage("", async (page) => {
      await page.evaluate(() => window.page.replay(30));
      await page.getByText("Prompt 2 of 4, step 10 of 20").waitFor();
      await page.evaluate(() => window.page.replay(80 + 50));
      await page.getByText("Layers searched: 200").waitFor();
      assert.match(await text(page, ".qvd-page:not([hidden])"), /≈ 21 s/);
      assert.equal(await page.locator("[role=progressbar]").getAttribute("aria-valuenow"), "74");
      assert.ok((await page.locator(".qvd-chart .qvd-bar").count()) > 50);
      assert.equal(await text(page, "[data-node=QVDCalibrate] .qvd-busy"), "Searching the scales 74%");
    }));

  test("does not open in place of another tab, nor where the setting says no", () =>
    onPage("", async (page) => {
      await page.evaluate(() => {
        window.page.recorded.settings.set("QVD.LivePanel", false);
        return window.page.replay(5);
      });
      assert.equal(await page.locator("#side > *").count(), 0);
      const open = await page.evaluate(async () => {
        const { extensionManager } = window.page.app;
        extensionManager.registerSidebarTab({ id: "other", render() {} });
        extensionManager.sidebarTab.toggleSidebarTab("other");
        extensionManager.setting.set("QVD.LivePanel", true);
        await window.page.replay(5);
        return extensionManager.sidebarTab.activeSidebarTabId;
      });
      assert.equal(open, "other");
    }));

  test("survives being closed and opened again, and keeps the last run over a reload", () =>
    onPage("", async (page) => {
      await page.evaluate(() => window.page.replay());
      await page.getByRole("heading", { name: "Calibration finished" }).waitFor();
      const toggle = () => page.evaluate(() => window.page.app.extensionManager.sidebarTab.toggleSidebarTab("qvd"));
      await toggle();
      await toggle();
      await page.getByRole("heading", { name: "Calibration finished" }).waitFor();
      await page.reload();
      await page.waitForSelector("[data-ready]");
      await toggle();
      await page.getByRole("heading", { name: "Calibration finished" }).waitFor();
      assert.ok((await page.locator(".qvd-chart .qvd-bar").count()) > 50);
    }));

  test("the stop button interrupts, by keyboard too, and keeps the focus while messages come", () =>
    onPage("", async (page) => {
      await page.evaluate(() => window.page.replay(10));
      await page.getByRole("button", { name: "Stop" }).focus();
      await page.evaluate(() => window.page.replay(20));
      await page.getByText("step 20 of 20").waitFor();
      await page.keyboard.press("Enter");
      assert.deepEqual(await page.evaluate(() => window.page.api.calls.filter(([name]) => name === "interrupt")), [["interrupt", null]]);
      await page.evaluate(() => window.page.api.say("execution_interrupted", {}));
      await page.getByText("Calibration stopped").first().waitFor();
      assert.equal(await page.getByRole("button", { name: "Stop" }).count(), 0);
    }));

  test("speaks to screen readers seldom: a hundred messages are a few announcements", () =>
    onPage("", async (page) => {
      await page.evaluate(() => window.page.replay(1));
      const spoken = await page.evaluate(async () => {
        let count = 0;
        const region = document.querySelector("[aria-live=polite]");
        new MutationObserver(() => (count += 1)).observe(region, { childList: true, characterData: true, subtree: true });
        await window.page.replay(130);
        await new Promise((resolve) => setTimeout(resolve, 100));
        return [count, region.textContent];
      });
      assert.ok(spoken[0] >= 1 && spoken[0] <= 3, `${spoken[0]} announcements`);
      assert.match(spoken[1], /Searching the scales/);
    }));

  test("an error of the run is shown as text, never as markup", () =>
    onPage("", async (page) => {
      const bad = "<img src=x onerror=\"document.title='hacked'\">";
      await page.evaluate((layer) => {
        window.page.api.say("qvd.calibration", { node: 2, phase: "search", done: 1, total: 2, layer, sqnr_db: [[layer, 3]] });
        window.page.api.say("execution_error", { exception_message: layer });
      }, bad);
      await page.getByText("Calibration failed").first().waitFor();
      assert.match(await text(page, ".qvd-message"), /<img src=x/);
      assert.equal(await page.locator("#side img").count(), 0);
      assert.equal(await page.title(), "QVD: recorded messages");
    }));
});
