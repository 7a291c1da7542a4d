/** What the live panel knows of a calibration: a plain value that each "qvd.calibration" message moves on. */

export const ENDED = ["done", "cached", "failed", "interrupted"];
const KEPT_LEVELS = 2000;

/**
 * No calibration seen yet. done, total: units of work of the whole run, steps and layers together.
 * levels: [layer, SQNR in dB, expert] in the order in which the layers were searched.
 */
export function emptyRun() {
  return {
    node: "",
    phase: "",
    prompt: 0,
    prompts: 0,
    step: 0,
    steps: 0,
    done: 0,
    total: 0,
    layer: "",
    eta: null,
    seconds: 0,
    expert: "",
    message: "",
    levels: [],
  };
}

export const isRunning = (run) => run.phase !== "" && !ENDED.includes(run.phase);

/** Does `message` open a run of its own, other than the one that `run` holds? */
export function startsAnew(run, message) {
  if (run.node !== String(message.node ?? "")) {
    return true;
  }
  if (!isRunning(run)) {
    return run.phase !== message.phase;
  }
  return message.seconds < run.seconds; // the clock was set back
}

/** The run after `message`; neither is changed. Fields that a message leaves out keep their value. */
export function advance(run, message) {
  const before = startsAnew(run, message) ? emptyRun() : run;
  const after = { ...before };
  for (const key of Object.keys(before)) {
    if (key !== "levels" && message[key] !== undefined && message[key] !== null) {
      after[key] = message[key];
    }
  }
  after.node = String(after.node);
  after.eta = Number.isFinite(message.eta) ? message.eta : null;
  after.message = message.message ?? "";
  const fresh = (message.sqnr_db ?? [])
    .filter(([, level]) => Number.isFinite(level))
    .map(([layer, level]) => [String(layer), level, after.expert]);
  after.levels = fresh.length ? [...before.levels, ...fresh].slice(-KEPT_LEVELS) : before.levels;
  return after;
}

/** The run after the front end itself said that execution ended: "failed" or "interrupted". */
export function ended(run, phase, message = "") {
  return isRunning(run) ? { ...run, phase, message, eta: null } : run;
}

/** How much of the run is done, 0 to 1. */
export function fraction(run) {
  if (run.phase === "done" || run.phase === "cached") {
    return 1;
  }
  return run.total > 0 ? Math.min(1, Math.max(0, run.done / run.total)) : 0;
}

/** Mean of the last `window` values up to each. */
export function rollingMean(values, window = 12) {
  let sum = 0;
  return values.map((value, index) => {
    sum += value - (index >= window ? values[index - window] : 0);
    return sum / Math.min(index + 1, window);
  });
}

/** The `count` levels with the largest error, the worst first. */
export function worst(levels, count = 5) {
  return [...levels].sort((one, other) => one[1] - other[1]).slice(0, count);
}
