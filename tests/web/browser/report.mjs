import assert from "node:assert/strict";
import { describe, test } from "node:test";
import { everything, onPage, server, text } from "./page.mjs";

describe("the report panel", () => {
  const open = async (page) => {
    await everything(page);
    await page.getByRole("button", { name: "Open the report" }).click();
    await page.getByRole("heading", { name: "WanModel" }).waitFor();
  };

  test("shows summary, worst layers, heat map, temporal features and what is kept", () =>
    onPage("", async (page) => {
      await open(page);
      const shown = await text(page, "#qvd-page-report");
      for (const part of ["−48%", "2.84 GB → 1.48 GB", "Wan 2.1", "300 linear · 2 temporal", "blocks.29.ffn.2", "17.4 dB", "logk", "99.3%", "Kept in full precision: 5"]) {
        assert.ok(shown.includes(part), part);
      }
      assert.equal(await page.locator(".qvd-heat .qvd-cell:not(.qvd-void)").count(), 300);
      assert.equal(await page.locator(".qvd-rows > li").count(), 10);
    }));

  test("a layer goes to the skip list of the settings node and comes back, by keyboard", () =>
    onPage("", async (page) => {
      await open(page);
      const list = () => page.evaluate(() => window.page.nodes.settings.widgets[0].value);
      await page.getByRole("button", { name: "Keep blocks.29.ffn.2 in full precision" }).focus();
      await page.keyboard.press("Space");
      assert.equal(await list(), "blocks.29.ffn.2");
      const pressed = page.locator(":focus");
      assert.equal(await pressed.getAttribute("aria-pressed"), "true");
      await page.keyboard.press("Space");
      assert.equal(await list(), "");
    }));

  test("a layer's name is copied", () =>
    onPage(
      "",
      async (page) => {
        await open(page);
        await page.getByRole("button", { name: "blocks.29.ffn.2, 17.4 dB" }).click();
        await page.waitForFunction(() => window.page.recorded.toasts.length === 1);
        assert.equal(await page.evaluate(() => navigator.clipboard.readText()), "blocks.29.ffn.2");
      },
      { permissions: ["clipboard-read", "clipboard-write"] },
    ));

  test("arrow keys walk the heat map and one line reads the cell", () =>
    onPage("", async (page) => {
      await open(page);
      await page.locator(".qvd-heat [role=gridcell][tabindex='0']").focus();
      for (const key of ["ArrowDown", "ArrowRight", "End", "PageDown"]) {
        await page.keyboard.press(key);
      }
      assert.match(await text(page, ".qvd-reading"), /blocks\.29\.ffn\.2: 17\.4 dB/);
      assert.equal(await page.locator(".qvd-heat [role=gridcell][tabindex='0']").count(), 1);
    }));

  test("another figure is chosen and the focus stays on the choice", () =>
    onPage("", async (page) => {
      await open(page);
      const select = page.getByLabel("Figure");
      await select.selectOption("coverage");
      assert.match(await text(page, ".qvd-rows > li:first-child"), /%/);
      assert.ok(await page.locator(".qvd-figure-select:focus").count());
    }));

  test("is there after a reload, from the server's history", () =>
    onPage("", async (page) => {
      const outputs = await page.evaluate(async () => ({ 3: await window.page.recording("model"), 4: await window.page.recording("report") }));
      server.settings.history = { a: { prompt: [0, "a", {}, { extra_pnginfo: { workflow: { id: "recorded" } } }], outputs } };
      await page.reload();
      await page.waitForSelector("[data-ready]");
      await page.getByRole("button", { name: "Open the report" }).click();
      await page.getByRole("heading", { name: "WanModel" }).waitFor();
      assert.match(await text(page, "[data-node=QVDQuantizeModel] .qvd-badges"), /W8A8/);
      server.settings.history = {};
    }));

  test("a report with nothing in it shows what it can", () =>
    onPage("", async (page) => {
      await page.evaluate(() => {
        window.page.nodes.report.onExecuted({ qvd_report: [{}] });
        window.page.nodes.report.box.querySelector("button").click();
      });
      await page.getByText("No figures per layer").waitFor();
    }));
});
