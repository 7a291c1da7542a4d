/** Pictures of a video, loaded once and shown without flicker. */

import { viewUrl } from "./comfy.js";

/** `get(kind, index)` is a promise of a decoded image element; kinds: reference, test, difference. */
export function frameStore(payload) {
  const loaded = new Map();

  function get(kind, index) {
    const file = payload[kind]?.[index];
    if (!file) {
      return Promise.resolve(null);
    }
    const key = `${kind} ${index}`;
    if (!loaded.has(key)) {
      const image = new Image();
      image.draggable = false;
      image.alt = "";
      image.src = viewUrl(file);
      loaded.set(key, image.decode().then(() => image, () => null));
    }
    return loaded.get(key);
  }

  return { get };
}
