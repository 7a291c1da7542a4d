/** Starts `serve.py`, and keeps screenshots where they are wanted. */

import { spawn } from "node:child_process";
import { dirname, join } from "node:path";
import { createInterface } from "node:readline";
import { fileURLToPath } from "node:url";

const root = join(dirname(fileURLToPath(import.meta.url)), "..", "..");

/** `{url, prompt, stop()}` of a server of our own, or of the one that QVD_SERVER describes. */
export async function startServer() {
  if (process.env.QVD_SERVER) {
    return { ...JSON.parse(process.env.QVD_SERVER), stop() {} };
  }
  const python = process.env.PYTHON ?? join(root, ".venv", "bin", "python");
  const child = spawn(python, ["-m", "tests.web.serve"], { cwd: root, stdio: ["pipe", "pipe", "inherit"] });
  const ended = new Promise((_, reject) => child.once("exit", (code) => reject(new Error(`serve.py ended with ${code}`))));
  const lines = createInterface({ input: child.stdout });
  const line = new Promise((resolve) => lines.once("line", resolve));
  const started = JSON.parse(await Promise.race([line, ended]));
  ended.catch(() => {});
  return { ...started, stop: () => child.stdin.end() };
}

/** Take a picture of the page where QVD_PICTURES names a folder. */
export async function picture(page, name) {
  if (process.env.QVD_PICTURES) {
    await page.waitForTimeout(500); // toasts and transitions
    await page.screenshot({ path: join(process.env.QVD_PICTURES, `${name}.png`) });
  }
}
