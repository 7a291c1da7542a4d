import assert from "node:assert/strict";
import { readdir, readFile } from "node:fs/promises";
import { before, test } from "node:test";
import "./stand_ins.js";

const root = new URL("../../../", import.meta.url);
const read = async (path) => readFile(new URL(path, root), "utf8");
const json = async (path) => JSON.parse(await read(path));
const languages = await readdir(new URL("locales/", root));
const placeholders = (text) => [...text.matchAll(/\{(\w+)\}/g)].map(([, name]) => name).sort();

/** Every key with its English text, as the sources say them. */
async function textsOfSources() {
  const found = new Map();
  for (const file of (await readdir(new URL("web/", root))).filter((name) => name.endsWith(".js"))) {
    for (const [, key, text] of (await read(`web/${file}`)).matchAll(/\bt\(\s*"([\w.]+)",\s*("(?:[^"\\]|\\.)*")/g)) {
      assert.ok(!found.has(key) || found.get(key) === JSON.parse(text), `${key} has two texts`);
      found.set(key, JSON.parse(text));
    }
  }
  return found;
}

const flat = (tree, prefix = "") =>
  Object.entries(tree).flatMap(([key, value]) => (typeof value === "string" ? [[prefix + key, value]] : flat(value, `${prefix}${key}.`)));

let sources;
before(async () => {
  sources = await textsOfSources();
});

test("the English locale is what the sources say", async () => {
  assert.ok(sources.size > 100);
  assert.deepEqual(new Map(flat((await json("locales/en/main.json")).qvd)), new Map([...sources].sort()));
});

for (const language of languages) {
  test(`${language}: every text is translated and keeps its placeholders`, async () => {
    for (const file of ["main", "settings", "commands"]) {
      const english = new Map(flat(await json(`locales/en/${file}.json`)));
      const translated = new Map(flat(await json(`locales/${language}/${file}.json`)));
      assert.deepEqual([...translated.keys()].sort(), [...english.keys()].sort(), file);
      for (const [key, text] of translated) {
        assert.deepEqual(placeholders(text), placeholders(english.get(key)), `${file} ${key}`);
        assert.ok(text.trim() === text && text !== "", `${file} ${key}`);
        assert.doesNotMatch(text, /[|@]/, `${file} ${key}: the front end would read a plural or a link`);
      }
    }
  });
}

test("every setting and command has a name in the locale, the same as in the sources", async () => {
  const { settings } = await import("../../../web/settings.js");
  const names = await json("locales/en/settings.json");
  for (const { id, name, tooltip, options } of settings) {
    const entry = names[id.replace(".", "_")];
    assert.deepEqual([entry.name, entry.tooltip], [name, tooltip]);
    assert.deepEqual(Object.keys(entry.options ?? {}), options ?? []);
  }
  const commands = await json("locales/en/commands.json");
  const source = await read("web/qvd.js");
  for (const [, id, label] of source.matchAll(/id: "(QVD\.\w+)",\s+label: "([^"]+)"/g)) {
    assert.equal(commands[id.replace(".", "_")].label, label);
  }
});

test("placeholders are filled, unknown ones and texts without any stay", async () => {
  const { filled, pick } = await import("../../../web/translate.js");
  assert.equal(filled("{a} of {b} {c}", { a: 1, b: "$&" }), "1 of $& {c}");
  assert.equal(filled("{constructor}", {}), "{constructor}");
  assert.equal(pick({ zh: 1 }, "zh-TW"), 1);
  assert.equal(pick({ "zh-TW": 2, zh: 1 }, "zh-TW"), 2);
  assert.equal(pick({}, "xx"), undefined);
});
