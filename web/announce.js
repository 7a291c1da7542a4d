/** A polite live region that speaks seldom enough to be listened to. */

import { element } from "./dom.js";

/** `{region, say}`: `say(text)` at most every `interval` ms; the last text of a burst is said late, not lost. */
export function announcer(interval = 5000) {
  const region = element("div", { class: "qvd-for-screen-readers", role: "status", "aria-live": "polite" });
  let spoken = 0;
  let timer = null;
  let pending = "";

  function speak() {
    timer = null;
    spoken = Date.now();
    if (region.textContent !== pending) {
      region.textContent = pending;
    }
  }

  /** urgent: do not wait, as when a phase ends. */
  function say(text, urgent = false) {
    pending = text;
    if (urgent) {
      clearTimeout(timer);
      speak();
    } else if (timer === null) {
      timer = setTimeout(speak, Math.max(0, spoken + interval - Date.now()));
    }
  }

  return { region, say };
}
