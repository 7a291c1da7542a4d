/** The icons of our buttons, drawn on a grid of 16 by 16. */

import { element, svg } from "./dom.js";

const SHAPES = {
  play: "M4 2.5v11l9-5.5z",
  pause: "M4 3h3v10H4zM9 3h3v10H9z",
  stop: "M3.5 3.5h9v9h-9z",
  difference: "M8 2a6 6 0 1 0 0 12A6 6 0 0 0 8 2zm0 1.5v9a4.5 4.5 0 0 1 0-9z",
  locked: "M5 7V5a3 3 0 0 1 6 0v2h1.5v7h-9V7zm1.5 0h3V5a1.5 1.5 0 0 0-3 0z",
  unlocked: "M5 7V4.5a3 3 0 0 1 5.9-.8l-1.5.4A1.5 1.5 0 0 0 6.5 4.5V7h6v7h-9V7zm0 1.5v4h6v-4z",
  place: "M8 1.5a4.5 4.5 0 0 0-4.5 4.5C3.5 9.5 8 14.5 8 14.5s4.5-5 4.5-8.5A4.5 4.5 0 0 0 8 1.5zm0 3a1.6 1.6 0 1 1 0 3.2 1.6 1.6 0 0 1 0-3.2z",
  download: "M7.2 2h1.6v6l2.2-2.2 1.1 1.1L8 11 3.9 6.9 5 5.8 7.2 8zM3 12.4h10V14H3z",
  gauge: "M8 3a6.5 6.5 0 0 0-6.5 6.5V12h13V9.5A6.5 6.5 0 0 0 8 3zm4.8 7.5H9.4l2-3.7-1-.600-2.5 4.3H3.2v-1a4.8 4.8 0 0 1 9.6 0z",
  chart: "M2 2h1.5v10.5H14V14H2zm3.5 5H7v4H5.5zm3-3H10v7H8.5zm3 2H13v5h-1.5z",
};

/** An icon as decoration: what it means has to stand beside it or in its button's name. */
export function icon(name) {
  return svg(
    "svg",
    { class: "qvd-icon", viewBox: "0 0 16 16", "aria-hidden": "true", focusable: "false" },
    svg("path", { d: SHAPES[name], "fill-rule": "evenodd" }),
  );
}

/** A push button with an icon, a name for screen readers and a tooltip. */
export function iconButton(name, label, onclick, attributes = {}) {
  return element(
    "button",
    { type: "button", class: "qvd-icon-button", "aria-label": label, title: label, onclick, ...attributes },
    icon(name),
  );
}
