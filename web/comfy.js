/** ComfyUI's front end as the other modules see it: the only file that imports from it. */

import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";

export { api, app };

/** The address of a file that a node wrote: `{filename, subfolder, type}`, as `ui` outputs carry it. */
export function viewUrl(file) {
  const query = new URLSearchParams({
    filename: file.filename ?? "",
    subfolder: file.subfolder ?? "",
    type: file.type ?? "temp",
  });
  return api.apiURL(`/view?${query}`);
}

/** The value of a setting; `fallback` where the front end does not know it. */
export function setting(id, fallback) {
  return app.extensionManager?.setting?.get(id) ?? fallback;
}

/** Show a short message in the corner. severity: success, info, warn or error. */
export function toast(severity, summary, detail = "") {
  app.extensionManager?.toast?.add({ severity, summary, detail, life: 4000 });
}

/** The outermost graph of the open workflow. */
export function rootGraph() {
  return app.rootGraph ?? app.graph;
}

/**
 * The node that an id of the server or of the front end names, or null: "12"; "12:3" for node 3 of the subgraph that
 * node 12 holds; "<id of a subgraph>:3" for node 3 of that subgraph.
 */
export function findNode(id) {
  const parts = String(id).split(":");
  let graph = rootGraph();
  if (parts.length > 1) {
    const holder = allNodes().find((node) => node.subgraph?.id === parts[0]);
    if (holder) {
      parts.shift();
      graph = holder.subgraph;
    }
  }
  let node = null;
  for (const part of parts) {
    node = graph?.getNodeById?.(part) ?? graph?.getNodeById?.(Number(part)) ?? null;
    graph = node?.subgraph;
  }
  return node;
}

/** Every node of the workflow, those within subgraphs too. */
export function allNodes(graph = rootGraph(), seen = new Set()) {
  if (!graph || seen.has(graph)) {
    return [];
  }
  seen.add(graph);
  const nodes = graph.nodes ?? graph._nodes ?? [];
  return nodes.flatMap((node) => [node, ...(node.subgraph ? allNodes(node.subgraph, seen) : [])]);
}

/** Let a node grow to what its widgets need; never below `least` = [width, height]. Vue nodes do the former themselves. */
export function growToFit(node, least = [0, 0]) {
  const needed = globalThis.LiteGraph?.vueNodesMode ? 0 : (node.computeSize?.()[1] ?? 0);
  const [width, height] = node.size;
  const size = [Math.max(width, least[0]), Math.max(height, least[1], needed)];
  if (size[0] !== width || size[1] !== height) {
    node.setSize?.(size);
  }
  node.graph?.setDirtyCanvas?.(true, true);
}

/** Call `after` behind whatever the node's own hook `name` does. */
export function chain(node, name, after) {
  const before = node[name];
  node[name] = function (...values) {
    const result = before?.apply(this, values);
    after.apply(this, values);
    return result;
  };
}
