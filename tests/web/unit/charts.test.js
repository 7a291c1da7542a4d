import assert from "node:assert/strict";
import { test } from "node:test";
import { place, scaleColour, ticks } from "../../../web/charts.js";

test("ticks enclose the data with few, evenly spaced numbers", () => {
  for (const [low, high] of [[0, 41], [31.2, 38.9], [-3, 2], [0, 1], [1e-4, 3e-4], [17, 17.01], [0, 98765]]) {
    const marks = ticks(low, high, 4);
    const step = marks[1] - marks[0];
    assert.ok(marks[0] <= low && marks.at(-1) >= high, `${marks} does not enclose ${low} to ${high}`);
    assert.ok(marks.length >= 2 && marks.length <= 7, `${marks}`);
    marks.slice(1).forEach((mark, index) => assert.ok(Math.abs(mark - marks[index] - step) < step * 1e-6));
  }
});

test("ticks of one value have it inside", () => {
  const marks = ticks(30, 30);
  assert.ok(marks[0] < 30 && marks.at(-1) > 30);
});

const channels = (colour) => colour.match(/\d+/g).map(Number);

test("the scale runs from orange to blue and stays within its ends", () => {
  assert.deepEqual(channels(scaleColour(0)), [213, 94, 0]);
  assert.deepEqual(channels(scaleColour(1)), [0, 114, 178]);
  assert.equal(scaleColour(-1), scaleColour(0));
  assert.equal(scaleColour(2), scaleColour(1));
});

test("both ends differ where colour-blind people look: in blue, not in red against green alone", () => {
  const [low, high] = [channels(scaleColour(0)), channels(scaleColour(1))];
  assert.ok(high[2] - low[2] > 150);
});

test("a place is a share between the ends, and the middle where they are one", () => {
  assert.equal(place(15, 10, 20), 0.5);
  assert.equal(place(5, 10, 20), 0);
  assert.equal(place(25, 10, 20), 1);
  assert.equal(place(10, 10, 10), 0.5);
});
