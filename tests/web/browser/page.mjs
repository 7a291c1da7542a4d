/** One server and one browser for all tests of the recorded page, and what these have in common. */

import assert from "node:assert/strict";
import { after, before } from "node:test";
import { complaints, findChromium, launch } from "../chromium.mjs";
import { serve } from "../recorded/serve.mjs";

export let server;
let browser;

before(async () => {
  assert.ok(findChromium(), "no Chromium: install one, or name it in QVD_CHROMIUM");
  server = await serve();
  browser = await launch();
});
after(async () => {
  await browser?.close();
  server?.close();
});

/** A fresh page; the test fails where it complained of anything. */
export async function onPage(query, steps, options = {}) {
  const context = await browser.newContext({ viewport: { width: 1280, height: 900 }, ...options });
  const page = await context.newPage();
  const complained = complaints(page);
  await page.goto(`${server.url}/?${query}`);
  await page.waitForSelector("[data-ready]");
  await steps(page);
  assert.deepEqual(complained, []);
  await context.close();
}

/** What can be read below a selector. */
export const text = async (page, selector) => (await page.locator(selector).innerText()).replaceAll("\u00a0", " ");

/** Every recording at once. */
export function everything(page) {
  return page.evaluate(async () => {
    await window.page.replay();
    for (const [node, name] of Object.entries({ calibrate: "scales", quantize: "model", report: "report", compare: "compare" })) {
      await window.page.execute(node, name);
    }
  });
}
