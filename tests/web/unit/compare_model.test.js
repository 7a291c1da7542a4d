import assert from "node:assert/strict";
import { test } from "node:test";
import { perFrame, pictureCount, pictureOf, shownFrames, wipeAfter } from "../../../web/compare_model.js";

const files = (count) => Array.from({ length: count }, () => ({}));
const comparison = (pictures, frames, more = {}) => ({ frames, reference: files(pictures), test: files(pictures), ...more });

test("the first and the last picture show the first and the last frame, and each is found from its frame", () => {
  for (const [pictures, frames] of [[64, 81], [33, 33], [2, 500]]) {
    const shown = shownFrames(comparison(pictures, frames));
    assert.deepEqual([shown.length, shown[0], shown.at(-1)], [pictures, 0, frames - 1]);
    shown.forEach((frame, index) => assert.equal(pictureOf(frame, shown), index));
  }
});

test("which frames are shown is believed where it is said", () => {
  const shown = shownFrames(comparison(3, 9, { shown_frames: [0, 5, 8] }));
  assert.deepEqual(shown, [0, 5, 8]);
  assert.deepEqual([1, 4, 7].map((frame) => pictureOf(frame, shown)), [0, 1, 2]);
});

test("a single picture is frame 0, none is none", () => {
  assert.deepEqual(shownFrames(comparison(1, 1)), [0]);
  assert.deepEqual(shownFrames({}), []);
  assert.deepEqual(shownFrames(null), []);
  assert.equal(pictureOf(5, [0]), 0);
  assert.equal(pictureOf(5, []), 0);
});

test("only frames that both videos have are shown", () => {
  assert.equal(pictureCount({ reference: [1, 2, 3], test: [1, 2] }), 2);
  assert.equal(pictureCount({}), 0);
  assert.equal(pictureCount(null), 0);
});

test("keys move the divider within its ends, other keys do not", () => {
  assert.equal(wipeAfter("ArrowRight", 50), 51);
  assert.equal(wipeAfter("ArrowLeft", 0), 0);
  assert.equal(wipeAfter("PageUp", 95), 100);
  assert.equal(wipeAfter("Home", 70), 0);
  assert.equal(wipeAfter("End", 70), 100);
  assert.equal(wipeAfter("a", 70), null);
});

test("frames without a finite value have none", () => {
  assert.deepEqual(perFrame({ per_frame: [30, null, Infinity, "inf"] }), [30, null, null, null]);
  assert.deepEqual(perFrame(undefined), []);
});
