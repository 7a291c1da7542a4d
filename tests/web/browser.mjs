/** Drives the recorded page in a real browser: what the panels show, what pointer and keys do, who can read it. */

import "./browser/live.mjs";
import "./browser/badges.mjs";
import "./browser/report.mjs";
import "./browser/compare.mjs";
import "./browser/everyone.mjs";
