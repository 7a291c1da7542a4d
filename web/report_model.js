/** What the report panel shows, computed from a report's JSON (`qvd_core.report.Report`). Any field may be missing. */

/** Figures of a layer that the panel can show. better: more of it is better. weak: from here on it is a problem. */
export const FIGURES = ["sqnr_db", "end_sqnr_db", "coverage"];

const isNumber = (value) => typeof value === "number" && Number.isFinite(value);

/** The layers of a report as a list of plain objects with a name. */
export function layersOf(report) {
  const layers = report?.layers ?? [];
  const list = Array.isArray(layers) ? layers : Object.entries(layers).map(([name, figures]) => ({ name, ...figures }));
  return list.filter((layer) => layer && typeof layer.name === "string");
}

/** The figures that at least one layer has. */
export function figuresOf(report) {
  const layers = layersOf(report);
  return FIGURES.filter((figure) => layers.some((layer) => isNumber(layer[figure])));
}

/** The `count` layers with the smallest `figure`, the worst first: [{layer, value, before, share}]. */
export function worstLayers(report, figure = "sqnr_db", count = 10) {
  const known = layersOf(report).filter((layer) => isNumber(layer[figure]));
  const best = Math.max(...known.map((layer) => layer[figure]), 0) || 1;
  return known
    .sort((one, other) => one[figure] - other[figure] || one.name.localeCompare(other.name))
    .slice(0, count)
    .map((layer) => ({
      layer,
      value: layer[figure],
      before: isNumber(layer[`${figure}_before`]) ? layer[`${figure}_before`] : null,
      share: Math.max(0, layer[figure] / best),
    }));
}

/** Mean of a figure over the layers that have it, or null. */
export function mean(report, figure) {
  const values = layersOf(report)
    .map((layer) => layer[figure])
    .filter(isNumber);
  return values.length ? values.reduce((sum, value) => sum + value, 0) / values.length : null;
}

/** How many layers there are of each kind, as {linear: 380, temporal: 4}. */
export function kinds(report) {
  const counts = {};
  for (const layer of layersOf(report)) {
    const kind = layer.kind || "linear";
    counts[kind] = (counts[kind] ?? 0) + 1;
  }
  return counts;
}

/** Block and part of a layer's name, for a report that does not say them. */
export function placeOf(name) {
  const parts = name.split(".");
  const index = parts.findIndex((part, at) => at > 0 && at < parts.length - 1 && /^\d+$/.test(part));
  return index < 0 ? ["", name] : [parts.slice(0, index + 1).join("."), parts.slice(index + 1).join(".")];
}

const natural = new Intl.Collator("en", { numeric: true });

/**
 * Depth by kind: {rows, columns, cells, low, high}; null for fewer than two rows.
 * rows: the blocks in order of depth. columns: the parts, in the order of the model. cells: rows of
 * {layer, value} or null; where several layers share a cell, the worst of them.
 */
export function heatMap(report, figure = "sqnr_db") {
  const rows = new Map();
  const columns = new Set();
  for (const layer of layersOf(report)) {
    const [block, part] = layer.block === undefined ? placeOf(layer.name) : [layer.block, layer.part ?? ""];
    if (block === "" || !isNumber(layer[figure])) {
      continue;
    }
    columns.add(part);
    const row = rows.get(block) ?? rows.set(block, new Map()).get(block);
    const cell = row.get(part);
    if (!cell || layer[figure] < cell.value) {
      row.set(part, { layer, value: layer[figure] });
    }
  }
  if (rows.size < 2) {
    return null;
  }
  const names = [...rows.keys()].sort(natural.compare);
  const parts = [...columns];
  const cells = names.map((name) => parts.map((part) => rows.get(name).get(part) ?? null));
  const values = cells.flat().flatMap((cell) => (cell ? [cell.value] : []));
  return { rows: names, columns: parts, cells, low: Math.min(...values), high: Math.max(...values) };
}

/** A short head for a row: "blocks.3" as "3" where all rows only differ in the number. */
export function rowLabels(rows) {
  const stems = new Set(rows.map((row) => row.replace(/\.\d+$/, "")));
  return stems.size === 1 ? rows.map((row) => row.slice(row.lastIndexOf(".") + 1)) : rows;
}

/** Layer -> why it stays in full precision, as sorted pairs. */
export function keptLayers(report) {
  const kept = report?.kept ?? {};
  const pairs = Array.isArray(kept) ? kept.map((name) => [String(name), ""]) : Object.entries(kept);
  return pairs.sort(([one], [other]) => natural.compare(one, other));
}

/** Share of the model's bytes that quantization saves, or null. */
export function savedShare(report) {
  const { float_bytes: before, int8_bytes: after } = report ?? {};
  return isNumber(before) && isNumber(after) && before > 0 && after > 0 ? 1 - after / before : null;
}

/** What is deployed for each set of temporal features: [{layers, name, score, kept}]. */
export function temporalRows(report) {
  return (report?.temporal ?? []).flatMap((group) => {
    const deployed = (group.quantizers ?? []).find((quantizer) => quantizer.deployed);
    return deployed ? [{ layers: group.layers ?? [], name: deployed.name, score: deployed.td_score, kept: deployed.tdr }] : [];
  });
}

/** "W8A8" from the settings of a report, or "". */
export function bits(report) {
  const { weight_bits: weights, activation_bits: activations } = report?.settings ?? {};
  return weights && activations ? `W${weights}A${activations}` : "";
}

/** How many prompts the calibration ran, or 0 where the report does not say. */
export function promptCount(report) {
  const { samples, prompts } = report?.calibrated_on ?? {};
  const count = samples ?? (Array.isArray(prompts) ? prompts.length : prompts);
  return isNumber(count) ? count : 0;
}
