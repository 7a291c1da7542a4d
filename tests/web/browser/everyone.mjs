import assert from "node:assert/strict";
import { describe, test } from "node:test";
import { faintBelow, problemsBelow } from "../accessible.mjs";
import { everything, onPage } from "./page.mjs";

describe("everyone can use it", () => {
  for (const theme of ["dark", "light"]) {
    test(`${theme}: names, roles, tab stops and contrast are in order`, () =>
      onPage(`theme=${theme}`, async (page) => {
        const check = async (selector) => {
          assert.deepEqual(await page.evaluate(problemsBelow, selector), []);
          assert.deepEqual(await page.evaluate(faintBelow, selector), []);
        };
        await page.evaluate(() => window.page.replay(130));
        await page.getByText("Layers searched: 200").waitFor();
        await check("#side");
        await everything(page);
        await page.locator(".qvd-layer-under img").waitFor();
        await page.getByRole("button", { name: "Open the report" }).click();
        await page.getByRole("heading", { name: "WanModel" }).waitFor();
        await check("#side");
        for (const node of ["QVDCalibrate", "QVDQuantizeModel", "QVDCompare"]) {
          await check(`[data-node=${node}] .qvd`);
        }
      }));
  }

  test("arrow keys change the tab, and the keys of our controls do not reach the canvas", () =>
    onPage("", async (page) => {
      await page.evaluate(() => {
        window.leaked = [];
        addEventListener("keydown", (event) => window.leaked.push(event.key));
        window.page.replay(3);
      });
      await page.getByRole("tab", { name: "Calibration" }).focus();
      await page.keyboard.press("ArrowRight");
      assert.equal(await page.getByRole("tab", { name: "Report" }).getAttribute("aria-selected"), "true");
      assert.equal(await page.locator(":focus").innerText(), "Report");
      await page.keyboard.press("Escape");
      assert.deepEqual(await page.evaluate(() => window.leaked), ["Escape"]);
    }));

  test("a narrow side bar cuts nothing off", () =>
    onPage("side=230", async (page) => {
      await everything(page);
      for (const tab of ["Calibration", "Report"]) {
        await page.evaluate(() => window.page.app.extensionManager.sidebarTab.activeSidebarTabId ?? window.page.app.extensionManager.sidebarTab.toggleSidebarTab("qvd"));
        await page.getByRole("tab", { name: tab }).click();
        const [wide, room] = await page.locator(".qvd-page:not([hidden])").evaluate((panel) => [panel.scrollWidth, panel.clientWidth]);
        assert.ok(wide <= room, `${tab}: ${wide} px in ${room}`);
      }
    }));

  test("with reduced motion nothing moves by itself", () =>
    onPage(
      "",
      async (page) => {
        await page.evaluate(() => window.page.replay(30));
        const bar = page.locator(".qvd-progress span");
        assert.equal(await bar.evaluate((part) => getComputedStyle(part).transitionDuration), "0s");
      },
      { reducedMotion: "reduce" },
    ));
});
