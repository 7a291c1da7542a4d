import assert from "node:assert/strict";
import { test } from "node:test";
import { isSkipped, namesIn, skipWidgets, toggled, toggleSkip } from "../../../web/skip_list.js";

test("a list may be separated by commas, semicolons, spaces or lines", () => {
  assert.deepEqual(namesIn("a, b;c\nd  e"), ["a", "b", "c", "d", "e"]);
  assert.deepEqual(namesIn(undefined), []);
});

test("a name goes in once, comes out whole, and lines stay lines, commas commas", () => {
  assert.equal(toggled("", "blocks.1"), "blocks.1");
  assert.equal(toggled("blocks.10", "blocks.1"), "blocks.10\nblocks.1");
  assert.equal(toggled("a, b", "c"), "a, b, c");
  assert.equal(toggled("blocks.10, blocks.1", "blocks.1"), "blocks.10");
  assert.equal(toggled("a\nb", "c"), "a\nb\nc");
});

const settings = (value) => {
  const widget = { name: "modules_to_not_convert", value, calls: 0, callback: () => (widget.calls += 1) };
  return { comfyClass: "QVDQuantizeSettings", widgets: [{ name: "weight_bits", value: 8 }, widget] };
};

test("every settings node gets the name, those that have it are left alone", () => {
  const nodes = [settings(""), settings("x"), { comfyClass: "KSampler", widgets: [] }, { comfyClass: "QVDQuantizeSettings" }];
  const widgets = skipWidgets(nodes);
  assert.equal(widgets.length, 2);
  assert.equal(isSkipped(widgets, "x"), false);
  assert.equal(toggleSkip(widgets, "x"), true);
  assert.deepEqual(widgets.map((widget) => [widget.value, widget.calls]), [["x", 1], ["x", 0]]);
  assert.equal(isSkipped(widgets, "x"), true);
  assert.equal(toggleSkip(widgets, "x"), false);
  assert.deepEqual(widgets.map((widget) => widget.value), ["", ""]);
});

test("without a settings node nothing is skipped", () => {
  assert.equal(isSkipped([], "x"), false);
});
