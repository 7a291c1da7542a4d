import assert from "node:assert/strict";
import { readFile } from "node:fs/promises";
import { test } from "node:test";
import { advance, emptyRun, ended, fraction, isRunning, rollingMean, worst } from "../../../web/calibration_state.js";

const messages = JSON.parse(await readFile(new URL("../recorded/messages.json", import.meta.url)));
const replayed = (count) => messages.slice(0, count).reduce(advance, emptyRun());

test("the recorded calibration goes from sampling over search to done and collects every layer once", () => {
  assert.equal(replayed(1).phase, "sampling");
  assert.equal(replayed(81).phase, "search");
  const run = replayed(messages.length);
  assert.equal(run.phase, "done");
  assert.equal(run.levels.length, 300);
  assert.equal(new Set(run.levels.map(([layer]) => layer)).size, 300);
});

test("progress never falls and ends at 1", () => {
  let before = 0;
  let run = emptyRun();
  for (const message of messages) {
    run = advance(run, message);
    assert.ok(fraction(run) >= before && fraction(run) <= 1);
    before = fraction(run);
  }
  assert.equal(before, 1);
});

test("a message leaves the run before it as it was", () => {
  const run = Object.freeze({ ...replayed(90), levels: Object.freeze([...replayed(90).levels]) });
  assert.notEqual(advance(run, messages[90]), run);
});

test("the last run stays until another one begins", () => {
  const done = replayed(messages.length);
  const next = advance(done, messages[0]);
  assert.equal(next.levels.length, 0);
  assert.equal(next.phase, "sampling");
  assert.equal(advance(done, { ...messages[0], node: "9" }).node, "9");
  assert.equal(advance(done, messages.at(-1)).levels.length, done.levels.length);
});

test("a result from the cache shows no levels of the run before it", () => {
  const run = advance(replayed(messages.length), { node: "2", phase: "cached", seconds: 0.1 });
  assert.deepEqual(run.levels, []);
  assert.equal(fraction(run), 1);
  assert.equal(isRunning(run), false);
});

test("a run that starts over without an end is a new run; a second expert is not", () => {
  const half = replayed(100);
  assert.deepEqual(advance(half, messages[0]).levels, []);
  const low = advance({ ...half, expert: "high" }, { ...messages[100], expert: "low", sqnr_db: [] });
  assert.equal(low.levels.length, half.levels.length);
});

test("levels that are missing, null or infinite are left out", () => {
  const run = advance(emptyRun(), { node: 7, phase: "search", sqnr_db: [["a", 30], ["b", null], ["c", Infinity]] });
  assert.deepEqual(run.levels, [["a", 30, ""]]);
  assert.equal(run.node, "7");
  assert.equal(advance(run, { node: 7, phase: "search" }).levels, run.levels);
});

test("an empty message does no harm, and counts of 0 divide nothing", () => {
  const run = advance(emptyRun(), {});
  assert.equal(fraction(run), 0);
  assert.equal(fraction({ ...emptyRun(), phase: "sampling", steps: 0, total: 0 }), 0);
});

test("only a running calibration can be ended from outside", () => {
  assert.equal(ended(replayed(90), "interrupted").phase, "interrupted");
  const done = replayed(messages.length);
  assert.equal(ended(done, "failed"), done);
  assert.equal(ended(emptyRun(), "failed").phase, "");
});

test("the rolling mean is that of the last values", () => {
  const values = [3, 1, 4, 1, 5, 9, 2, 6];
  const brute = values.map((_, index) => {
    const part = values.slice(Math.max(0, index - 2), index + 1);
    return part.reduce((sum, value) => sum + value, 0) / part.length;
  });
  rollingMean(values, 3).forEach((value, index) => assert.ok(Math.abs(value - brute[index]) < 1e-12));
});

test("the worst levels come first and the list itself stays in order", () => {
  const levels = [["a", 30, ""], ["b", 10, ""], ["c", 20, ""]];
  assert.deepEqual(worst(levels, 2).map(([layer]) => layer), ["b", "c"]);
  assert.equal(levels[0][0], "a");
});
