import assert from "node:assert/strict";
import { describe, test } from "node:test";
import { everything, onPage, text } from "./page.mjs";

describe("badges", () => {
  test("say bits, memory, cache hit, and open their warnings by keyboard", () =>
    onPage("", async (page) => {
      await everything(page);
      assert.match(await text(page, "[data-node=QVDQuantizeModel] .qvd-badges"), /W8A8\s*302\/307\s*−48%\s*calibrated\s*triton/);
      assert.match(await text(page, "[data-node=QVDCalibrate] .qvd-badges"), /from cache/);
      const warnings = page.getByRole("button", { name: "Warnings: 1" });
      await warnings.focus();
      await page.keyboard.press("Enter");
      assert.equal(await warnings.getAttribute("aria-expanded"), "true");
      await page.getByText("blocks.29.ffn.2 has an SQNR of 17.4 dB").waitFor();
    }));

  test("never reach over the edge of their widget, even with an open list", () =>
    onPage("", async (page) => {
      await everything(page);
      await page.getByRole("button", { name: "Warnings: 1" }).click();
      await page.evaluate(() => window.page.app.rootGraph.setDirtyCanvas());
      const over = await page.locator(".qvd-node").evaluateAll((nodes) => nodes.map((node) => node.scrollHeight - node.clientHeight));
      assert.ok(over.every((pixels) => pixels <= 0), `${over}`);
    }));

  test("a new node starts with the preset of the settings", () =>
    onPage("", async (page) => {
      const preset = await page.evaluate(() => {
        window.page.recorded.settings.set("QVD.DefaultPreset", "best");
        return window.page.recorded.add(9, "QVDQuantizeModel", [["preset", "fast"]]).widgets[0].value;
      });
      assert.equal(preset, "best");
    }));
});
