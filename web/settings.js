/** The settings of this extension and what they do. Names are translated by `locales/<language>/settings.json`. */

import { api, setting } from "./comfy.js";

const PRESETS = ["auto", "fast", "best", "paper"];
const WITH_PRESET = ["QVDQuantizeModel", "QVDCalibrate", "QVDCalibrateTwoExperts"];

/** `settings` of the extension, as the front end wants them. */
export const settings = [
  {
    id: "QVD.DefaultPreset",
    name: "Preset of new nodes",
    category: ["QVD", "General", "DefaultPreset"],
    tooltip: "The preset that newly added QVD nodes start with; auto: the one each node has by itself. Nodes of opened workflows keep theirs.",
    type: "combo",
    options: PRESETS,
    defaultValue: PRESETS[0],
  },
  {
    id: "QVD.LivePanel",
    name: "Open the QVD panel when a calibration starts",
    category: ["QVD", "General", "LivePanel"],
    tooltip: "Only where no other side panel is open.",
    type: "boolean",
    defaultValue: true,
  },
  {
    id: "QVD.CacheFolder",
    name: "Folder of the scale cache",
    category: ["QVD", "General", "CacheFolder"],
    tooltip: "A folder of the machine that runs ComfyUI. Empty: the default folder.",
    type: "text",
    defaultValue: "",
    onChange: sendCacheFolder,
  },
];

let sent = "";

/** Tell the server the cache folder where it differs from what it was told last; older servers do not listen. */
async function sendCacheFolder(folder) {
  const wanted = String(folder ?? "").trim();
  if (wanted === sent) {
    return;
  }
  sent = wanted;
  try {
    await api.fetchApi("/qvd/settings", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ cache_folder: wanted }),
    });
  } catch {
    sent = ""; // not reached: try again with the next change
  }
}

/** What the server says of itself: {cache_folder, default_cache_folder, version}; {} where it does not. */
export async function serverSettings() {
  try {
    const response = await api.fetchApi("/qvd/settings");
    return response.ok ? await response.json() : {};
  } catch {
    return {};
  }
}

/** Give a node that was just made the preset of the settings. A workflow that is loaded overwrites it. */
export function applyDefaultPreset(node) {
  if (!WITH_PRESET.includes(node.comfyClass)) {
    return;
  }
  const widget = node.widgets?.find((one) => one.name === "preset");
  const preset = setting("QVD.DefaultPreset", PRESETS[0]);
  if (widget && (widget.options?.values ?? PRESETS).includes(preset)) {
    widget.value = preset;
  }
}
