/** Accessibility checks by hand, run inside the page on everything below an element: a list of what is wrong. */

/** To be handed to `page.evaluate` with a selector. */
export function problemsBelow(selector) {
  const root = document.querySelector(selector);
  if (!root) {
    return [`nothing matches ${selector}`];
  }
  const problems = [];
  const visible = (node) => node.getClientRects().length > 0;
  const describe = (node) => `<${node.tagName.toLowerCase()} class="${node.getAttribute("class") ?? ""}">`;
  const text = (ids) => ids.split(" ").map((id) => document.getElementById(id)?.textContent ?? "").join(" ").trim();
  const nameOf = (node) =>
    (node.getAttribute("aria-labelledby") && text(node.getAttribute("aria-labelledby"))) ||
    node.getAttribute("aria-label") ||
    node.textContent.trim() ||
    node.getAttribute("title") ||
    "";
  const check = (ok, node, what) => ok || problems.push(`${describe(node)} ${what}`);

  const named = "button, a, input, select, [role=slider], [role=progressbar], [role=tab], [role=tabpanel], [role=img], [role=grid], [role=group], [role=tablist], [role=list]";
  for (const node of root.querySelectorAll(named)) {
    if (visible(node)) {
      check(nameOf(node), node, "has no name");
    }
  }
  for (const node of root.querySelectorAll("[role=slider], [role=progressbar]")) {
    for (const attribute of ["aria-valuenow", "aria-valuemin", "aria-valuemax"]) {
      check(node.hasAttribute(attribute), node, `has no ${attribute}`);
    }
  }
  for (const node of root.querySelectorAll("[role=tab]")) {
    check(document.getElementById(node.getAttribute("aria-controls"))?.getAttribute("role") === "tabpanel", node, "controls no panel");
    check(["true", "false"].includes(node.getAttribute("aria-selected")), node, "is neither selected nor not");
  }
  for (const node of root.querySelectorAll("[role=slider]")) {
    check(!visible(node) || node.tabIndex === 0, node, "cannot be reached with the keyboard");
  }
  for (const grid of root.querySelectorAll("[role=grid]")) {
    const stops = [...grid.querySelectorAll("[role=gridcell]")].filter((cell) => cell.tabIndex === 0);
    check(stops.length === 1, grid, `has ${stops.length} tab stops, expected 1`);
  }
  for (const node of root.querySelectorAll("img")) {
    check(node.hasAttribute("alt"), node, "has no alt text");
  }
  for (const node of root.querySelectorAll("i.pi")) {
    check(node.getAttribute("aria-hidden") === "true", node, "is an icon that screen readers would read");
  }
  for (const node of root.querySelectorAll("[role=listitem]")) {
    check(node.closest("[role=list]"), node, "is in no list");
  }
  const ids = [...root.querySelectorAll("[id]")].map((node) => node.id);
  for (const id of new Set(ids.filter((one, index) => ids.indexOf(one) !== index))) {
    problems.push(`the id ${id} is there more than once`);
  }
  return problems;
}

/** Text below `selector` whose contrast to what is behind it is under 4.5, each as "ratio text". */
export function faintBelow(selector) {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  canvas.canvas.width = canvas.canvas.height = 1;
  const over = (layers) => {
    canvas.clearRect(0, 0, 1, 1);
    for (const colour of layers) {
      canvas.fillStyle = colour;
      canvas.fillRect(0, 0, 1, 1);
    }
    return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const luminance = (colour) => {
    const [red, green, blue] = colour.map((value) => (value / 255 <= 0.04045 ? value / 255 / 12.92 : ((value / 255 + 0.055) / 1.055) ** 2.4));
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
  };
  const faint = [];
  for (const node of document.querySelectorAll(`${selector} *`)) {
    const own = [...node.childNodes].some((child) => child.nodeType === Node.TEXT_NODE && child.textContent.trim());
    if (!own || !node.getClientRects().length || node.closest(".qvd-for-screen-readers, .qvd-picture, option")) {
      continue;
    }
    const layers = [];
    for (let at = node; at; at = at.parentElement) {
      layers.unshift(getComputedStyle(at).backgroundColor);
    }
    const style = getComputedStyle(node);
    const ink = style.fill && node instanceof SVGElement ? style.fill : style.color;
    const behind = luminance(over(layers));
    const front = luminance(over([...layers, ink]));
    const ratio = (Math.max(behind, front) + 0.05) / (Math.min(behind, front) + 0.05);
    if (ratio < 4.5) {
      faint.push(`${ratio.toFixed(2)} ${node.textContent.trim().slice(0, 40)}`);
    }
  }
  return faint;
}
