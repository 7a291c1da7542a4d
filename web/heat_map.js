/** A heat map depth by kind as a grid that the arrow keys walk through, with one line that says what is where. */

import { place, scaleColour } from "./charts.js";
import { element } from "./dom.js";
import { rowLabels } from "./report_model.js";
import { t } from "./translate.js";

/** map: of `heatMap`; write(value): a value in words; choose(layer): what Enter and a click do. */
export function heatMapView(map, { write, choose, name }) {
  const says = element("p", { class: "qvd-hint qvd-reading", "aria-live": "off" }, t("report.heatHint", "Point at a cell, or walk with the arrow keys."));
  const cells = [];
  const labels = rowLabels(map.rows);
  const body = element("tbody");

  function tell(cell) {
    says.textContent = `${cell.layer.name}: ${write(cell.value)}`;
  }

  for (const [row, values] of map.cells.entries()) {
    const line = element("tr", {}, element("th", { scope: "row", title: map.rows[row] }, labels[row]));
    cells.push(
      values.map((cell, column) => {
        const data = element("td", { role: "gridcell", tabindex: -1, class: cell ? "qvd-cell" : "qvd-cell qvd-void" });
        if (cell) {
          const share = place(cell.value, map.low, map.high);
          data.style.setProperty("--qvd-cell", scaleColour(share));
          data.setAttribute("aria-label", `${map.rows[row]} ${map.columns[column]}: ${write(cell.value)}`);
          data.title = `${cell.layer.name}\n${write(cell.value)}`;
          data.addEventListener("pointerenter", () => tell(cell));
          data.addEventListener("focus", () => tell(cell));
          data.addEventListener("click", () => choose(cell.layer));
        } else {
          data.setAttribute("aria-label", t("report.noLayer", "no layer"));
        }
        line.append(data);
        return data;
      }),
    );
    body.append(line);
  }
  cells[0][0].tabIndex = 0;

  const heads = map.columns.map((column) => element("th", { scope: "col", title: column }, element("span", {}, column)));
  const grid = element(
    "table",
    { class: "qvd-heat", role: "grid", "aria-label": name },
    element("thead", {}, element("tr", {}, element("td"), heads)),
    body,
  );
  grid.addEventListener("keydown", (event) => walk(event, cells, map, choose));
  const legend = element(
    "div",
    { class: "qvd-scale", "aria-hidden": "true" },
    element("span", {}, write(map.low)),
    element("span", { class: "qvd-ramp", style: `background:linear-gradient(90deg,${[0, 0.25, 0.5, 0.75, 1].map(scaleColour).join(",")})` }),
    element("span", {}, write(map.high)),
  );
  return element("div", { class: "qvd-stack" }, legend, element("div", { class: "qvd-scroll" }, grid), says);
}

function walk(event, cells, map, choose) {
  const row = cells.findIndex((line) => line.includes(event.target));
  const column = cells[row]?.indexOf(event.target);
  if (row < 0) {
    return;
  }
  const [last, end] = [cells.length - 1, cells[row].length - 1];
  const next = {
    ArrowUp: [row - 1, column],
    ArrowDown: [row + 1, column],
    ArrowLeft: [row, column - 1],
    ArrowRight: [row, column + 1],
    Home: [row, 0],
    End: [row, end],
    PageUp: [0, column],
    PageDown: [last, column],
  }[event.key];
  if (next) {
    event.preventDefault();
    const target = cells[Math.min(last, Math.max(0, next[0]))][Math.min(end, Math.max(0, next[1]))];
    event.target.tabIndex = -1;
    target.tabIndex = 0;
    target.focus();
  } else if ((event.key === "Enter" || event.key === " ") && map.cells[row][column]) {
    event.preventDefault();
    choose(map.cells[row][column].layer);
  }
}
