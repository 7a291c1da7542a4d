/** Stands in for ComfyUI's `scripts/app.js`: what web/ uses of it, and no more. Nodes are boxes on the page. */

const tabs = [];
const settingValues = new Map();
const toasts = [];
let open = null;

class Node extends EventTarget {
  constructor(id, comfyClass, widgets) {
    super();
    Object.assign(this, { id, comfyClass, type: comfyClass, title: comfyClass, size: [320, 120], graph: app.rootGraph });
    this.widgets = widgets.map(([name, value]) => ({ name, value, options: {} }));
    this.box = document.createElement("article");
    this.box.className = "node";
    this.box.dataset.node = comfyClass;
    const head = document.createElement("h2");
    head.textContent = comfyClass;
    this.box.append(head);
    document.getElementById("canvas").append(this.box);
  }

  addDOMWidget(name, type, element, options) {
    const widget = { name, type, element, options };
    this.widgets.push(widget);
    this.box.append(element);
    this.fit();
    return widget;
  }

  addWidget(kind, name, value, callback) {
    const button = document.createElement("button");
    const widget = {
      name,
      set label(text) {
        button.textContent = text;
      },
    };
    button.addEventListener("click", callback);
    this.box.append(button);
    this.widgets.push(widget);
    return widget;
  }

  /** As the real front end: a DOM widget gets at least the height it asks for. */
  fit() {
    for (const widget of this.widgets) {
      if (widget.element) {
        widget.element.style.height = `${widget.options.getMinHeight?.() ?? 50}px`;
      }
    }
  }

  computeSize() {
    return [320, 120];
  }

  setSize(size) {
    this.size = size;
    this.box.style.width = `${size[0]}px`;
  }
}

export const app = {
  extensions: [],
  rootGraph: {
    id: "recorded",
    nodes: [],
    getNodeById(id) {
      return this.nodes.find((node) => String(node.id) === String(id)) ?? null;
    },
    setDirtyCanvas() {
      this.nodes.forEach((node) => node.fit());
    },
  },
  canvas: { centerOnNode: (node) => node.box.scrollIntoView(), selectNode() {} },
  extensionManager: {
    registerSidebarTab: (tab) => tabs.push(tab),
    sidebarTab: {
      get activeSidebarTabId() {
        return open?.id ?? null;
      },
      toggleSidebarTab(id) {
        const place = document.getElementById("side");
        open?.destroy?.();
        open = open?.id === id ? null : tabs.find((tab) => tab.id === id);
        place.replaceChildren();
        open?.render(place);
      },
    },
    toast: { add: (toast) => toasts.push(toast) },
    setting: {
      get: (id) => settingValues.get(id),
      set: (id, value) => settingValues.set(id, value),
    },
  },
  registerExtension(extension) {
    this.extensions.push(extension);
    for (const { id, defaultValue } of extension.settings ?? []) {
      settingValues.set(id, settingValues.get(id) ?? defaultValue);
    }
  },
};

/** What the tests reach for. */
export const recorded = {
  tabs,
  toasts,
  settings: settingValues,
  add(id, comfyClass, widgets = []) {
    const node = new Node(id, comfyClass, widgets);
    app.rootGraph.nodes.push(node);
    app.extensions.forEach((extension) => extension.nodeCreated?.(node));
    return node;
  },
};
