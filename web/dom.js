/** Elements from plain values. Text only ever becomes a text node: nothing here reads markup. */

const SVG = "http://www.w3.org/2000/svg";

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on") && typeof value === "function") {
      node.addEventListener(name.slice(2), value);
    } else if (value === true) {
      node.setAttribute(name, "");
    } else if (value !== false && value !== null && value !== undefined) {
      node.setAttribute(name, String(value));
    }
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

/** An HTML element; attributes named `on<event>` are listeners, `true` is an empty attribute, `null` none. */
export function element(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

/** An SVG element, with the same rules. */
export function svg(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

/** Keep the keys that `root`'s controls use from also being shortcuts of the canvas. */
export function keepKeys(root) {
  const used = new Set(["ArrowLeft", "ArrowRight", "ArrowUp", "ArrowDown", "Home", "End", "PageUp", "PageDown"]);
  const pressed = new Set([" ", "Enter"]);
  root.addEventListener("keydown", (event) => {
    if (used.has(event.key) || pressed.has(event.key)) {
      event.stopPropagation();
    }
  });
}
