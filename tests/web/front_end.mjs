/** Steps in ComfyUI's real front end that several checks share. */

/** Open the front end at `url` with these settings, and wait until it and our extension are up. */
export async function openFrontEnd(page, url, settings) {
  for (const [id, value] of Object.entries({ "Comfy.TutorialCompleted": true, ...settings })) {
    const response = await fetch(`${url}/settings/${id}`, { method: "POST", body: JSON.stringify(value) });
    if (!response.ok) {
      throw new Error(`the setting ${id} was refused with ${response.status}`);
    }
  }
  await page.goto(url, { waitUntil: "domcontentloaded" });
  await waitUntilUp(page);
}

/** Wait until the graph is there and the QVD tab is registered. */
export async function waitUntilUp(page) {
  await page.waitForFunction(() => window.app?.extensionManager?.getSidebarTabs?.().some((tab) => tab.id === "qvd"), null, { timeout: 120_000 });
  await page.waitForFunction(() => window.app.canvas?.graph && !document.querySelector("#splash-loader"), null, { timeout: 60_000 });
}

/** Load a prompt in the API's format as the open workflow. */
export function loadPrompt(page, prompt, name) {
  return page.evaluate(([graph, title]) => window.app.loadApiJson(graph, title), [prompt, name]);
}

/** Queue the open workflow and wait for how it ends: "execution_success", "execution_error" or "execution_interrupted". */
export async function queue(page, { wait = true } = {}) {
  await page.evaluate(() => {
    const ends = ["execution_success", "execution_error", "execution_interrupted"];
    window.qvdEnd = null;
    for (const type of ends) {
      window.app.api.addEventListener(type, (event) => (window.qvdEnd ??= [type, event.detail]), { once: true });
    }
    return window.app.queuePrompt(0, 1);
  });
  return wait ? ended(page) : null;
}

/** How the queued workflow ended. */
export async function ended(page, timeout = 300_000) {
  await page.waitForFunction(() => window.qvdEnd, null, { timeout });
  const [type, detail] = await page.evaluate(() => window.qvdEnd);
  if (type === "execution_error") {
    throw new Error(`${detail.node_type}: ${detail.exception_message}`);
  }
  return type;
}
