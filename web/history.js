/** Results of earlier runs, from the server's history: what a page that was just loaded did not hear. */

import { api } from "./comfy.js";

const DEPTH = 24;
const NO_ID = "00000000-0000-0000-0000-000000000000"; // of a workflow that was made from a prompt

/** The newest runs first: [{workflow, outputs}]; workflow: the id of the workflow that was queued, or "". */
export async function earlierRuns() {
  try {
    const response = await api.fetchApi(`/history?max_items=${DEPTH}`);
    return response.ok ? runsIn(await response.json()) : [];
  } catch {
    return [];
  }
}

/** The runs in an answer of `/history`, which lists the oldest first. */
export function runsIn(history) {
  return Object.values(history ?? {})
    .map((entry) => ({
      workflow: String(entry?.prompt?.[3]?.extra_pnginfo?.workflow?.id ?? "").replace(NO_ID, ""),
      outputs: entry?.outputs ?? {},
    }))
    .reverse();
}

/** For each node id, the newest output that holds `key`: [[id, output]]. */
export function newestOutputs(runs, keys) {
  const found = new Map();
  for (const { outputs } of runs) {
    for (const [id, output] of Object.entries(outputs)) {
      if (!found.has(id) && keys.some((key) => output?.[key]?.length)) {
        found.set(id, output);
      }
    }
  }
  return [...found];
}
