/** Charts as inline SVG: axes, bars, lines, and a scale of colours that colour-blind people can read. */

import { element, svg } from "./dom.js";

/** Ends of a blue-to-orange scale by way of a neutral, told apart in all usual forms of colour blindness. */
const WORST = [213, 94, 0];
const MIDDLE = [240, 228, 175];
const BEST = [0, 114, 178];

const mix = (one, other, share) => one.map((value, index) => Math.round(value + (other[index] - value) * share));

/** The colour of a share: 0 the worst (orange), 1 the best (blue). */
export function scaleColour(share) {
  const at = Math.min(1, Math.max(0, share));
  const [red, green, blue] = at < 0.5 ? mix(WORST, MIDDLE, at * 2) : mix(MIDDLE, BEST, at * 2 - 1);
  return `rgb(${red} ${green} ${blue})`;
}

/** Where `value` lies between `low` and `high`, 0 to 1; 0.5 where these are the same. */
export function place(value, low, high) {
  return high > low ? Math.min(1, Math.max(0, (value - low) / (high - low))) : 0.5;
}

/** At most `count` + 1 round numbers that cover `low` to `high`; the first and the last enclose both. */
export function ticks(low, high, count = 4) {
  if (!(high > low)) {
    return [Math.floor(low) - 1, Math.floor(low), Math.floor(low) + 1];
  }
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].find((factor) => factor * power >= rough * 0.999) * power;
  const first = Math.floor(low / step) * step;
  const marks = [];
  for (let index = 0; first + (index - 1) * step < high - step * 1e-9; index += 1) {
    marks.push(Number((first + index * step).toPrecision(12)));
  }
  return marks;
}

const SIZE = { width: 340, height: 120, left: 30, right: 6, top: 8, bottom: 8 };

function frame(low, high, name, count) {
  const marks = ticks(low, high, count);
  const [bottom, top] = [marks[0], marks[marks.length - 1]];
  const height = SIZE.height - SIZE.top - SIZE.bottom;
  const y = (value) => SIZE.top + height * (1 - (value - bottom) / (top - bottom));
  const lines = marks.flatMap((mark) => [
    svg("line", { class: "qvd-grid", x1: SIZE.left, x2: SIZE.width - SIZE.right, y1: y(mark), y2: y(mark) }),
    svg("text", { class: "qvd-tick", x: SIZE.left - 5, y: y(mark) + 3, "text-anchor": "end" }, String(mark)),
  ]);
  const root = svg(
    "svg",
    { class: "qvd-chart", viewBox: `0 0 ${SIZE.width} ${SIZE.height}`, role: "img", "aria-label": name },
    lines,
  );
  return { root, y, floor: y(bottom) };
}

const inner = SIZE.width - SIZE.left - SIZE.right;

/**
 * Bars with a line of their rolling mean.
 * bars: [{value, label, weak}], `weak` ones in the warning colour; mean: one value a bar.
 */
export function barChart(bars, mean, name) {
  const values = bars.map((bar) => bar.value);
  const { root, y, floor } = frame(Math.min(0, ...values), Math.max(1, ...values), name, 5);
  const pitch = Math.min(14, inner / Math.max(1, bars.length));
  const x = (index) => SIZE.left + pitch * index;
  for (const [index, bar] of bars.entries()) {
    const top = Math.min(y(bar.value), floor);
    root.append(
      svg(
        "rect",
        {
          class: bar.weak ? "qvd-bar qvd-weak" : "qvd-bar",
          x: x(index) + pitch * 0.1,
          width: pitch * 0.8,
          y: top,
          height: Math.max(1, floor - top),
        },
        svg("title", {}, bar.label),
      ),
    );
  }
  if (mean.length > 1) {
    const points = mean.map((value, index) => `${(x(index) + pitch / 2).toFixed(1)},${y(value).toFixed(1)}`);
    root.append(svg("polyline", { class: "qvd-mean", points: points.join(" ") }));
  }
  return root;
}

/**
 * A line over frames, with a marker that can be moved.
 * values: numbers, or null for a frame without one. Returns {root, mark(index), indexAt(event)}.
 */
export function lineChart(values, name) {
  const known = values.filter((value) => Number.isFinite(value));
  const { root, y, floor } = frame(Math.min(...known, Infinity), Math.max(...known, -Infinity), name, 4);
  const x = (index) => SIZE.left + (inner * (values.length > 1 ? index : 0.5)) / Math.max(1, values.length - 1);
  const points = values
    .map((value, index) => (Number.isFinite(value) ? `${x(index).toFixed(1)},${y(value).toFixed(1)}` : ""))
    .filter(Boolean);
  const line = svg("line", { class: "qvd-marker", y1: SIZE.top, y2: floor });
  const dot = svg("circle", { class: "qvd-dot", r: 3.5 });
  root.append(svg("polyline", { class: "qvd-line", points: points.join(" ") }), line, dot);

  function mark(index) {
    line.setAttribute("x1", x(index));
    line.setAttribute("x2", x(index));
    dot.setAttribute("cx", x(index));
    dot.setAttribute("cy", Number.isFinite(values[index]) ? y(values[index]) : -100);
  }

  function indexAt(event) {
    const box = root.getBoundingClientRect();
    const along = ((event.clientX - box.left) / box.width) * SIZE.width;
    return Math.round(place(along, SIZE.left, SIZE.width - SIZE.right) * (values.length - 1));
  }

  return { root, mark, indexAt };
}

/** A thin bar that fills a share of its width, for a table's cell; its number stands beside it. */
export function meter(share, weak = false) {
  const bar = element("span", { class: weak ? "qvd-meter qvd-weak" : "qvd-meter", "aria-hidden": "true" });
  bar.append(element("span", { style: `width:${(Math.min(1, Math.max(0, share)) * 100).toFixed(1)}%` }));
  return bar;
}
