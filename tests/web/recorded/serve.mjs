/** A server for the recorded page: web/ where ComfyUI would serve it, stand-ins for its scripts, drawn frames. */

import { readdir, readFile } from "node:fs/promises";
import { createServer } from "node:http";
import { dirname, extname, join, normalize } from "node:path";
import { fileURLToPath } from "node:url";

const here = dirname(fileURLToPath(import.meta.url));
const root = join(here, "..", "..", "..");
const TYPES = { ".js": "text/javascript", ".css": "text/css", ".html": "text/html", ".json": "application/json" };
const ROUTES = [
  ["/extensions/qvd/", join(root, "web")],
  ["/scripts/", here],
  ["/", here],
];

async function translations() {
  const all = {};
  for (const language of await readdir(join(root, "locales"))) {
    const text = await readFile(join(root, "locales", language, "main.json"), "utf8").catch(() => "{}");
    all[language] = JSON.parse(text);
  }
  return all;
}

/** A frame of a made-up video: a ball on a hill; "test" is a little coarser, "difference" shows where. */
export function drawn(name) {
  const [kind, index] = name.replace(".svg", "").split("_");
  const x = 80 + Number(index) * 20;
  const y = 250 - 130 * Math.sin((Number(index) / 32) * Math.PI);
  const sky = kind === "test" ? "#2b5f8c" : "#29608f";
  const scene =
    kind === "difference"
      ? `<rect width="832" height="480" fill="#000"/><circle cx="${x}" cy="${y}" r="58" fill="none" stroke="#f80" stroke-width="9"/>`
      : `<rect width="832" height="480" fill="${sky}"/><circle cx="650" cy="110" r="52" fill="#ffd97a"/>
         <path d="M0 360 Q220 250 420 350 T832 320 V480 H0Z" fill="${kind === "test" ? "#3f7f59" : "#3d8059"}"/>
         <circle cx="${x}" cy="${y}" r="${kind === "test" ? 59 : 56}" fill="#e8744f"/>
         <circle cx="${x - 18}" cy="${y - 20}" r="14" fill="${kind === "test" ? "#eb8d6c" : "#f4a488"}"/>`;
  return `<svg xmlns="http://www.w3.org/2000/svg" width="832" height="480" viewBox="0 0 832 480">${scene}</svg>`;
}

async function answer(url, settings) {
  if (url.pathname === "/api/i18n") {
    return ["application/json", JSON.stringify(await translations())];
  }
  if (url.pathname === "/api/view") {
    return ["image/svg+xml", drawn(url.searchParams.get("filename"))];
  }
  if (url.pathname === "/api/history") {
    return ["application/json", JSON.stringify(settings.history)];
  }
  if (url.pathname === "/api/qvd/settings") {
    const about = { cache_folder: "", default_cache_folder: "/home/user/.cache/qvd", version: "0.1.0" };
    return ["application/json", JSON.stringify(about)];
  }
  const [prefix, folder] = ROUTES.find(([start]) => url.pathname.startsWith(start));
  const path = normalize(join(folder, url.pathname.slice(prefix.length) || "index.html"));
  if (!path.startsWith(folder)) {
    throw new Error("outside");
  }
  return [TYPES[extname(path)] ?? "application/octet-stream", await readFile(path)];
}

/** `{url, settings, close()}`; settings.history: what `/history` answers. */
export async function serve(port = 0) {
  const settings = { history: {} };
  const server = createServer(async (request, response) => {
    try {
      const [type, body] = await answer(new URL(request.url, "http://localhost"), settings);
      response.writeHead(200, { "Content-Type": type, "Cache-Control": "no-store" }).end(body);
    } catch {
      response.writeHead(404).end();
    }
  });
  await new Promise((resolve) => server.listen(port, "127.0.0.1", resolve));
  return { url: `http://127.0.0.1:${server.address().port}`, settings, close: () => server.close() };
}
