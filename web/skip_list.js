/** The list of layers that stay in full precision, as a text widget of a QVD Quantize Settings node holds it. */

export const SETTINGS_NODE = "QVDQuantizeSettings";
export const SKIP_WIDGET = "modules_to_not_convert";

/** The names in a widget's text: separated by commas, semicolons or white space. */
export function namesIn(text) {
  return String(text ?? "")
    .split(/[\s,;]+/)
    .filter(Boolean);
}

/** The text with `name` added, or taken out where it is in: one a line, or with commas where the text has some. */
export function toggled(text, name) {
  const names = namesIn(text);
  const next = names.includes(name) ? names.filter((other) => other !== name) : [...names, name];
  return next.join(String(text ?? "").includes(",") ? ", " : "\n");
}

/** The widgets that hold a skip list, of all QVD Quantize Settings among `nodes`. */
export function skipWidgets(nodes) {
  return nodes
    .filter((node) => (node.comfyClass ?? node.type) === SETTINGS_NODE)
    .flatMap((node) => node.widgets?.filter((widget) => widget.name === SKIP_WIDGET) ?? []);
}

/** Is `name` in the skip list of every one of these widgets? */
export function isSkipped(widgets, name) {
  return widgets.length > 0 && widgets.every((widget) => namesIn(widget.value).includes(name));
}

/** Add `name` to every widget's list, or take it out of all where all have it. Returns whether it is in now. */
export function toggleSkip(widgets, name) {
  const remove = isSkipped(widgets, name);
  for (const widget of widgets) {
    if (namesIn(widget.value).includes(name) === remove) {
      widget.value = toggled(widget.value, name);
      widget.callback?.(widget.value);
    }
  }
  return !remove;
}
