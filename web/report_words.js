/** The words of the report panel for the names that a report's JSON uses. */

import { decibels, duration, number, percent } from "./format.js";
import { language, t } from "./translate.js";

/** Figures of a layer. */
export const FIGURE_NAMES = {
  sqnr_db: () => t("report.sqnr", "SQNR of the layer"),
  end_sqnr_db: () => t("report.end", "SQNR of the model's output"),
  coverage: () => t("report.coverage", "Share of levels used"),
};

/** Means of these figures. */
export const MEANS = {
  sqnr_db: () => t("report.meanSqnr", "Mean SQNR of a layer"),
  end_sqnr_db: () => t("report.meanEnd", "Mean SQNR of the output"),
  coverage: () => t("report.meanCoverage", "Mean share of levels used"),
};

/** How activations are quantized. */
export const ACTIVATIONS = {
  token: () => t("report.token", "per token, while running"),
  static: () => t("report.static", "one per layer"),
  static_bucket: () => t("report.bucket", "per range of timesteps"),
  static_frame: () => t("report.frame", "per frame"),
};

/** Kinds of layers. */
export const KINDS = {
  linear: () => t("report.linear", "linear"),
  conv2d: () => t("report.conv2d", "2D convolution"),
  conv3d: () => t("report.conv3d", "3D convolution"),
  temporal: () => t("report.temporalKind", "temporal"),
};

/** Figures of quality and speed. */
export const MEASURED = {
  psnr_db: () => t("report.psnr", "PSNR to full precision"),
  ssim: () => t("report.ssim", "SSIM to full precision"),
  frechet_distance: () => t("report.frechet", "Fréchet distance to full precision"),
  seconds_per_step_float: () => t("report.floatStep", "A step in full precision"),
  seconds_per_step_int8: () => t("report.int8Step", "A step quantized"),
  seconds_calibrating: () => t("report.calibrating", "Calibration took"),
};

/** A figure's value in words. */
export const write = (figure, value) => (figure === "coverage" ? percent(value, language()) : decibels(value, language()));

/** A measured figure with its unit, which its name tells; null stands for infinite. */
export function measured(name, value) {
  if (value === null) {
    return "∞";
  }
  if (name.includes("_db")) {
    return decibels(value, language());
  }
  return name.startsWith("seconds") ? duration(value, language()) : number(value, 4, language());
}
