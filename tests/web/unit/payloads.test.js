import assert from "node:assert/strict";
import { readFile } from "node:fs/promises";
import { test } from "node:test";
import "./stand_ins.js";

const { describe } = await import("../../../web/badge_model.js");
const { runsIn, newestOutputs } = await import("../../../web/history.js");
const payload = async (name) => JSON.parse(await readFile(new URL(`../recorded/${name}.json`, import.meta.url))).qvd[0];
const texts = ({ badges }) => badges.map((badge) => badge.text.replaceAll("\u00a0", " "));

test("a quantized model says bits, coverage, memory, calibration, backend and its warnings", async () => {
  const described = describe([await payload("model")]);
  assert.deepEqual(texts(described), ["W8A8", "302/307", "−48%", "calibrated", "triton"]);
  assert.equal(described.warnings.length, 1);
});

test("scales say where they come from", async () => {
  const scales = await payload("scales");
  assert.deepEqual(texts(describe([scales])), ["from cache", "300 layers", "mean 35.3 dB"]);
  assert.equal(texts(describe([{ ...scales, cache_hit: false, seconds: 96 }]))[0], "calibrated in 1:36 min");
});

test("two experts are told apart, and a warning of both is said once", async () => {
  const scales = { ...(await payload("scales")), warnings: ["few steps"] };
  const { badges, warnings } = describe([scales, scales]);
  assert.deepEqual(badges.filter((badge) => badge.tone === "muted").map((badge) => badge.text), ["high noise", "low noise"]);
  assert.deepEqual(warnings, ["few steps"]);
});

test("a model of which nothing is quantized is marked as bad", () => {
  const { badges } = describe([{ kind: "model", bits: "W8A8", layers: 0, of_layers: 402 }]);
  assert.deepEqual(badges.map((badge) => badge.tone), ["bad", "bad"]);
});

test("a payload without fields has no badges", () => {
  assert.deepEqual(describe([{}]), { badges: [], warnings: [] });
  assert.deepEqual(describe([{ kind: "scales" }]), { badges: [], warnings: [] });
});

test("of the history the newest output of each node counts", () => {
  const entry = (workflow, outputs) => ({ prompt: [0, "id", {}, { extra_pnginfo: { workflow: { id: workflow } } }], outputs });
  const history = { a: entry("w", { 3: { qvd: [1] }, 4: { images: [1] } }), b: entry("w", { 3: { qvd: [2] } }), c: {} };
  const runs = runsIn(history);
  assert.deepEqual(runs.map((run) => run.workflow), ["", "w", "w"]);
  assert.deepEqual(newestOutputs(runs, ["qvd"]), [["3", { qvd: [2] }]]);
  assert.deepEqual(newestOutputs(runsIn(undefined), ["qvd"]), []);
});
