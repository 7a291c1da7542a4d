/** Arithmetic of the compare widget: which saved picture stands for which frame of the video. */

/** The frames that the pictures of a comparison show, ascending; evenly spaced where it does not say which. */
export function shownFrames(payload) {
  const [pictures, frames] = [pictureCount(payload), payload?.frames ?? pictureCount(payload)];
  const evenly = (index) => (pictures > 1 ? Math.round((index * (frames - 1)) / (pictures - 1)) : 0);
  return Array.from({ length: pictures }, (_, index) => payload.shown_frames?.[index] ?? evenly(index));
}

/** The index in `shown` that is nearest to a frame. */
export function pictureOf(frame, shown) {
  return shown.reduce((best, at, index) => (Math.abs(at - frame) < Math.abs(shown[best] - frame) ? index : best), 0);
}

/** How many pictures both videos have. */
export function pictureCount(payload) {
  return Math.min(payload?.reference?.length ?? 0, payload?.test?.length ?? 0);
}

/** The position of the wipe (0 to 100) after a key, or null for a key that does not move it. */
export function wipeAfter(key, position) {
  const steps = { ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1, PageDown: -10, PageUp: 10 };
  const ends = { Home: 0, End: 100 };
  if (key in ends) {
    return ends[key];
  }
  return key in steps ? Math.min(100, Math.max(0, position + steps[key])) : null;
}

/** Values a frame of PSNR or SSIM as numbers; null for one that is missing or infinite. */
export function perFrame(metric) {
  return (metric?.per_frame ?? []).map((value) => (typeof value === "number" && Number.isFinite(value) ? value : null));
}
