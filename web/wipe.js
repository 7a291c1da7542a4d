/** Two pictures on top of each other and a divider between them that pointer and arrow keys move. */

import { wipeAfter } from "./compare_model.js";
import { element } from "./dom.js";
import { t } from "./translate.js";

/** `{root, show(reference, test), single(on), shape(width, height)}`; the reference is left of the divider. */
export function wipe() {
  const under = element("div", { class: "qvd-layer-under" });
  const over = element("div", { class: "qvd-layer-over" });
  const left = element("span", { class: "qvd-side qvd-side-left" }, t("compare.reference", "Reference"));
  const right = element("span", { class: "qvd-side qvd-side-right" }, t("compare.test", "Quantized"));
  const handle = element(
    "div",
    {
      class: "qvd-handle",
      role: "slider",
      tabindex: 0,
      "aria-label": t("compare.wipe", "Divider between reference and quantized"),
      "aria-orientation": "horizontal",
      "aria-valuemin": 0,
      "aria-valuemax": 100,
    },
    element("span", { class: "qvd-grip", "aria-hidden": "true" }),
  );
  const picture = element("div", { class: "qvd-picture" }, under, over, left, right, handle);
  const root = element("div", { class: "qvd-stage" }, picture);
  let position = 50;

  function move(to) {
    position = Math.min(100, Math.max(0, to));
    picture.style.setProperty("--qvd-wipe", `${position}%`);
    handle.setAttribute("aria-valuenow", String(Math.round(position)));
    handle.setAttribute("aria-valuetext", t("compare.wipeAt", "{share} % reference", { share: Math.round(position) }));
  }

  function follow(event) {
    const box = picture.getBoundingClientRect();
    move(((event.clientX - box.left) / box.width) * 100);
  }

  picture.addEventListener("pointerdown", (event) => {
    if (event.button !== 0 || picture.classList.contains("qvd-single")) {
      return;
    }
    event.preventDefault();
    event.stopPropagation();
    handle.focus({ preventScroll: true });
    picture.setPointerCapture(event.pointerId);
    follow(event);
  });
  picture.addEventListener("pointermove", (event) => {
    if (picture.hasPointerCapture(event.pointerId)) {
      follow(event);
    }
  });
  handle.addEventListener("keydown", (event) => {
    const next = wipeAfter(event.key, position);
    if (next !== null) {
      event.preventDefault();
      move(next);
    }
  });

  function show(reference, test) {
    under.replaceChildren(...[test ?? reference].filter(Boolean));
    over.replaceChildren(...[test ? reference : null].filter(Boolean));
  }

  /** Show one picture alone, without the divider. */
  function single(on) {
    picture.classList.toggle("qvd-single", on);
    handle.tabIndex = on ? -1 : 0;
    handle.setAttribute("aria-hidden", String(on));
  }

  function shape(width, height) {
    const ratio = width > 0 && height > 0 ? width / height : 16 / 9;
    picture.style.setProperty("--qvd-ratio", String(ratio));
  }

  move(50);
  shape(16, 9);
  return { root, show, single, shape };
}
