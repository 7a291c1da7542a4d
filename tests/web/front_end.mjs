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

/** Load a prompt in the API's format as the open workflow, with an id of its own as one that a user drew. */
export function loadPrompt(page, prompt, name) {
  return page.evaluate(
    async ([graph, title]) => {
      await window.app.loadApiJson(graph, title);
      await window.app.loadGraphData({ ...window.app.graph.serialize(), id: crypto.randomUUID() }, true, true, title);
    },
    [prompt, name],
  );
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

/**
 * Complaints that the front end has without us: files that a new user does not have, its own early look at a graph, the
 * models of its default workflow, and requests that a reload or an answer without a body cuts short.
 */
export function notOurs(text) {
  return /userdata|user\.css|graph accessed before initialization|huggingface\.co|net::ERR_ABORTED/.test(text);
}

/** Run inside the page: zoom so that all nodes of these types are in view, right of the side bar. */
export function bringIntoView(types) {
  const nodes = window.app.graph.nodes.filter((node) => types.includes(node.type));
  const left = Math.min(...nodes.map((node) => node.pos[0])) - 30;
  const top = Math.min(...nodes.map((node) => node.pos[1])) - 60;
  const right = Math.max(...nodes.map((node) => node.pos[0] + node.size[0])) + 30;
  const bottom = Math.max(...nodes.map((node) => node.pos[1] + node.size[1])) + 30;
  const { ds } = window.app.canvas;
  const room = { left: 400, top: 110, width: window.innerWidth - 420, height: window.innerHeight - 130 };
  ds.scale = Math.min(1.1, room.width / (right - left), room.height / (bottom - top));
  ds.offset[0] = -left + room.left / ds.scale;
  ds.offset[1] = -top + room.top / ds.scale;
  window.app.canvas.setDirty(true, true);
}
