import assert from "node:assert/strict";
import { test } from "node:test";
import { bytes, decibels, duration, number, percent, shortened } from "../../../web/format.js";

test("bytes have three significant digits and powers of 1000", () => {
  assert.equal(bytes(0), "0\u00a0B");
  assert.equal(bytes(999), "999\u00a0B");
  assert.equal(bytes(1000), "1\u00a0KB");
  assert.equal(bytes(999_950), "1\u00a0MB");
  assert.equal(bytes(2_838_000_000), "2.84\u00a0GB");
  assert.equal(bytes(28_380_000_000), "28.4\u00a0GB");
  assert.equal(bytes(283_800_000_000), "284\u00a0GB");
  assert.equal(bytes(5e15), "5,000\u00a0TB");
});

test("numbers follow the language", () => {
  assert.equal(bytes(2_838_000_000, "fr"), "2,84\u00a0GB");
  assert.equal(decibels(35.25, "de"), "35,3\u00a0dB");
  assert.equal(percent(0.4792, "en"), "48%");
});

test("what is not a finite number is a dash, never NaN", () => {
  for (const format of [bytes, decibels, duration, number, percent]) {
    for (const value of [undefined, null, NaN, Infinity, "3"]) {
      assert.equal(format(value), "–", `${format.name}(${value})`);
    }
  }
  assert.equal(bytes(-1), "–");
  assert.equal(duration(-1), "–");
});

test("durations carry over at a minute and at an hour", () => {
  assert.equal(duration(0.44), "0.4\u00a0s");
  assert.equal(duration(9.94), "9.9\u00a0s");
  assert.equal(duration(9.96), "10\u00a0s");
  assert.equal(duration(59.6), "1:00\u00a0min");
  assert.equal(duration(125), "2:05\u00a0min");
  assert.equal(duration(3599.6), "1:00:00\u00a0h");
  assert.equal(duration(3725), "1:02:05\u00a0h");
});

test("a shortened name keeps both ends and has exactly the length asked for", () => {
  const name = "transformer_blocks.31.attentions.1.to_out.0";
  assert.equal(shortened("blocks.3.ffn.2", 36), "blocks.3.ffn.2");
  for (const length of [9, 10, 36]) {
    const short = shortened(name, length);
    assert.equal([...short].length, length);
    assert.ok(name.startsWith(short.split("…")[0]) && name.endsWith(short.split("…")[1]));
  }
});
