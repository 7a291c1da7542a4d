/** A headless Chromium for tests. `QVD_CHROMIUM` names the program where it is not one of the usual ones. */

import { existsSync } from "node:fs";
import { chromium } from "playwright-core";

const PROGRAMS = [process.env.QVD_CHROMIUM, "/usr/bin/chromium", "/usr/bin/chromium-browser", "/usr/bin/google-chrome"];
const FLAGS = [
  ...["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"],
  ...["--disable-background-networking", "--disable-component-update", "--disable-sync"],
];

/** The program's path, or undefined where there is none. */
export function findChromium() {
  return PROGRAMS.find((path) => path && existsSync(path));
}

/** A browser; close it when done. */
export function launch() {
  return chromium.launch({ executablePath: findChromium(), args: FLAGS });
}

/** Collect what the page complains about: errors and warnings of the console, uncaught exceptions, failed requests. */
export function complaints(page, ignore = () => false) {
  const found = [];
  const add = (text) => ignore(text) || found.push(text);
  page.on("console", (message) => {
    if (message.type() === "error") {
      add(`console: ${message.text()} ${message.location().url}`);
    }
  });
  page.on("pageerror", (error) => add(`exception: ${error.stack ?? error.message}`));
  page.on("requestfailed", (request) => add(`request: ${request.url()} ${request.failure()?.errorText}`));
  return found;
}
