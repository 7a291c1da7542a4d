/** What the badges on a node say, from the `qvd` payload of its `ui` output: [{text, tone, title}]. */

import { bytes, decibels, duration, number, percent } from "./format.js";
import { language, t } from "./translate.js";

const badge = (text, tone = "plain", title = "") => ({ text, tone, title });

/**
 * The badges of a node's payloads, and their warnings: `{badges, warnings}`. Missing fields mean fewer badges.
 * Two payloads are those of a high-noise and a low-noise expert.
 */
export function describe(payloads) {
  const warnings = payloads.flatMap((payload) => (payload.warnings ?? []).map(String));
  const names = payloads.length === 2 ? [t("badge.high", "high noise"), t("badge.low", "low noise")] : [];
  const badges = payloads.flatMap((payload, index) => [
    ...(names[index] ? [badge(names[index], "muted")] : []),
    ...(payload.kind === "scales" ? ofScales(payload) : ofModel(payload)),
  ]);
  return { badges, warnings: [...new Set(warnings)] };
}

function ofModel(payload) {
  const badges = [];
  if (payload.bits) {
    const family = payload.family ? t("badge.family", "Model family: {family}", payload) : "";
    badges.push(badge(payload.bits, payload.layers === 0 ? "bad" : "good", family));
  }
  if (payload.layers !== undefined) {
    const counts = { layers: payload.layers, all: payload.of_layers ?? "?" };
    const text =
      payload.of_layers === undefined ? t("badge.layers", "{layers} layers", counts) : `${counts.layers}/${counts.all}`;
    const title = [
      t("badge.coverage", "{layers} of {all} layers are quantized", counts),
      payload.kept ? t("badge.kept", "{kept} kept in full precision", payload) : "",
      payload.temporal ? t("badge.temporal", "{temporal} temporal", payload) : "",
    ];
    badges.push(badge(text, payload.layers === 0 ? "bad" : "plain", title.filter(Boolean).join(" · ")));
  }
  if (Number.isFinite(payload.saved)) {
    const from = bytes(payload.float_bytes, language());
    const to = bytes(payload.int8_bytes, language());
    const title = t("badge.memory", "Weights: {from} before, {to} now", { from, to });
    badges.push(badge(`−${percent(payload.saved, language())}`, payload.saved > 0 ? "good" : "warn", title));
  }
  if (payload.calibrated !== undefined) {
    badges.push(
      payload.calibrated
        ? badge(t("badge.calibrated", "calibrated"), "plain", activation(payload))
        : badge(t("badge.uncalibrated", "data-free"), "plain", t("badge.uncalibratedHint", "Quantized without scales from a calibration")),
    );
  }
  if (payload.backend) {
    badges.push(badge(payload.backend, "plain", t("badge.backend", "Implementation of the int8 operators")));
  }
  return badges;
}

function activation(payload) {
  return payload.activation ? t("badge.activation", "Activation scales: {activation}", payload) : "";
}

function ofScales(payload) {
  const badges = [];
  const file = payload.file ? t("badge.file", "Cache file: {file}", payload) : "";
  if (payload.cache_hit !== undefined) {
    const took = duration(payload.seconds, language());
    badges.push(
      payload.cache_hit
        ? badge(t("badge.cacheHit", "from cache"), "good", file)
        : badge(t("badge.fresh", "calibrated in {took}", { took }), "good", file),
    );
  }
  if (payload.layers !== undefined) {
    badges.push(badge(t("badge.layers", "{layers} layers", { layers: number(payload.layers, 0, language()) })));
  }
  if (Number.isFinite(payload.mean_sqnr_db)) {
    const [worst] = payload.worst ?? [];
    const title = worst
      ? t("badge.worst", "Mean over the layers; the worst is {layer} with {level}", {
          layer: worst[0],
          level: decibels(worst[1], language()),
        })
      : "";
    badges.push(badge(t("badge.mean", "mean {level}", { level: decibels(payload.mean_sqnr_db, language()) }), "plain", title));
  }
  return badges;
}
