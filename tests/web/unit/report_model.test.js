import assert from "node:assert/strict";
import { readFile } from "node:fs/promises";
import { test } from "node:test";
import * as model from "../../../web/report_model.js";

const { qvd_report: [report] } = JSON.parse(await readFile(new URL("../recorded/report.json", import.meta.url)));

test("the worst layers are the smallest values, in order", () => {
  const expected = report.layers.filter((layer) => layer.sqnr_db !== null).map((layer) => layer.sqnr_db).sort((one, other) => one - other);
  assert.deepEqual(model.worstLayers(report, "sqnr_db", 7).map((row) => row.value), expected.slice(0, 7));
});

test("the heat map has every measured layer once, blocks by number and not by letter", () => {
  const map = model.heatMap(report);
  assert.equal(map.rows[2], "blocks.2");
  assert.equal(map.rows[10], "blocks.10");
  assert.deepEqual([map.rows.length, map.columns.length], [30, 10]);
  const cells = map.cells.flat().filter(Boolean);
  assert.equal(cells.length, 300);
  assert.equal(map.low, Math.min(...cells.map((cell) => cell.value)));
  assert.equal(cells.find((cell) => cell.layer.name === "blocks.3.ffn.2").value, report.layers.find((layer) => layer.name === "blocks.3.ffn.2").sqnr_db);
});

test("of layers that share a cell the worst one is shown", () => {
  const layers = [["blocks.0", 30], ["blocks.0", 20], ["blocks.1", 40]].map(([block, sqnr], index) => ({ name: `l${index}`, block, part: "x.*", sqnr_db: sqnr }));
  assert.equal(model.heatMap({ layers }).cells[0][0].value, 20);
});

test("a model without repeated blocks has no heat map", () => {
  assert.equal(model.heatMap({ layers: [{ name: "a", block: "", part: "a", sqnr_db: 3 }] }), null);
  assert.equal(model.heatMap({ layers: [{ name: "blocks.0.a", sqnr_db: 3 }] }), null);
});

test("a report that lacks a layer's place is read from its name", () => {
  assert.deepEqual(model.placeOf("blocks.3.attn1.to_q"), ["blocks.3", "attn1.to_q"]);
  assert.deepEqual(model.placeOf("time_embedding.0"), ["", "time_embedding.0"]);
  const map = model.heatMap({ layers: { "blocks.0.a": { sqnr_db: 1 }, "blocks.1.a": { sqnr_db: 2 } } });
  assert.deepEqual([map.rows, map.columns], [["blocks.0", "blocks.1"], ["a"]]);
});

test("rows are labelled by number only where nothing else tells them apart", () => {
  assert.deepEqual(model.rowLabels(["blocks.0", "blocks.10"]), ["0", "10"]);
  assert.deepEqual(model.rowLabels(["double.0", "single.0"]), ["double.0", "single.0"]);
});

test("an empty report, or none, breaks nothing", () => {
  for (const empty of [undefined, null, {}, { layers: [] }, { layers: [null, {}], kept: [], temporal: [{}] }]) {
    assert.deepEqual(model.layersOf(empty), []);
    assert.deepEqual(model.figuresOf(empty), []);
    assert.deepEqual(model.worstLayers(empty), []);
    assert.equal(model.heatMap(empty), null);
    assert.equal(model.savedShare(empty), null);
    assert.equal(model.mean(empty, "sqnr_db"), null);
    assert.deepEqual(model.keptLayers(empty), []);
    assert.deepEqual(model.temporalRows(empty), []);
    assert.equal(model.bits(empty), "");
  }
});

test("what is saved is a share of the float bytes; unknown sizes save nothing", () => {
  assert.ok(Math.abs(model.savedShare(report) - (1 - 1478 / 2838)) < 1e-9);
  assert.equal(model.savedShare({ float_bytes: 0, int8_bytes: 5 }), null);
});

test("prompts are counted, whether listed, counted or called samples", () => {
  assert.equal(model.promptCount({ calibrated_on: { prompts: 4 } }), 4);
  assert.equal(model.promptCount({ calibrated_on: { prompts: ["a", "b"] } }), 2);
  assert.equal(model.promptCount({ calibrated_on: { samples: 8, prompts: ["a"] } }), 8);
  assert.equal(model.promptCount({}), 0);
});
