/** The texts of this extension in the front end's language, from the pack's `locales/<language>/main.json`. */

import { api, setting } from "./comfy.js";

let texts = {};
let current = "en";

/** Ask the server for every pack's translations, as the front end itself does, and keep ours. */
export async function loadTranslations() {
  current = String(setting("Comfy.Locale", "en"));
  try {
    const all = await api.getCustomNodesI18n();
    texts = pick(all, current)?.qvd ?? {};
  } catch {
    texts = {}; // the English texts stand beside their keys
  }
}

/** The entry of a language, else that of its family ("pt" for "pt-BR"). */
export function pick(all, code) {
  return all?.[code] ?? all?.[code.split("-")[0]];
}

/** A language that Intl knows. */
export function language() {
  try {
    return Intl.getCanonicalLocales(current)[0] ?? "en";
  } catch {
    return "en";
  }
}

/** The text of a dotted key such as "panel.step" with its `{names}` filled in; `english` where there is none. */
export function t(key, english, values = {}) {
  let found = texts;
  for (const part of key.split(".")) {
    found = found?.[part];
  }
  return filled(typeof found === "string" && found ? found : english, values);
}

/** `text` with every `{name}` that `values` knows replaced. */
export function filled(text, values) {
  return text.replace(/\{(\w+)\}/g, (whole, name) => (Object.hasOwn(values, name) ? String(values[name]) : whole));
}
